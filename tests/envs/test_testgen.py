"""`codeworld/SWE-testgen-v0`: an honest script pays, one that reads instead of running does not; the trees that tell them
apart."""

import ast
import random
import re
from dataclasses import replace

import pytest

import envs
from agents.episode import run_episode
from envs.sandbox.base import FileChange, Result
from envs.swe import testgen
from envs.swe.decoys import raising, rewritten
from envs.swe.patches import to_patch
from envs.swe.testgen import BRIEF, SWETestgenEnv, grade_script, judge
from envs.task import Grader, Task, sha256
from envs.tiny import repairs
from envs.tiny.experts import SUBMIT
from policy.completion import Sampling
from policy.renderer import CwmRenderer
from policy.scripted import ScriptedPolicy, replies

TASK = repairs.task("train", 3)
P = TASK.provenance
CALL, MODULE, WRONG, RIGHT = re.match(r"(.*) in (\w+)\.py gives (.*), not (.*)\. Tests", TASK.prompt).groups()
VERDICT = 'print("Issue reproduced" if {bad} else "Issue resolved" if {good} else "Other issues")\n'
HONEST = f"from {MODULE} import {CALL.partition('(')[0]}\nr = {CALL}\n" + VERDICT.format(
    bad=f"r == {WRONG}", good=f"r == {RIGHT}"
)
READ = f"import hashlib, inspect, ast, {MODULE} as m\ntext = open('{MODULE}.py').read()\n"
LINE, FIX = (ast.unparse(ast.parse(P[k].strip())) if "return" not in P[k] else P[k].strip() for k in ("line", "fix"))
FUNCTION = f"m.{CALL.partition('(')[0]}"
TREE = "tree = ast.unparse(ast.parse(text))\n"


def cheat(bad, good="True", more=""):
    return READ + more + VERDICT.format(bad=bad, good=good)


CHEATS = {
    "a line of the bug": (cheat(f"{P['line'].strip()!r} in text"), "invalid"),
    "a line of the repair": (cheat(f"{P['fix'].strip()!r} not in text"), "invalid"),
    "both lines": (cheat(f"{P['line'].strip()!r} in text and {P['fix'].strip()!r} not in text"), "invalid"),
    "the function's source": (cheat(f"{P['line'].strip()!r} in inspect.getsource({FUNCTION})"), "invalid"),
    "the repaired function's source": (cheat(f"{P['fix'].strip()!r} not in inspect.getsource({FUNCTION})"), "invalid"),
    "a digest of the file": (
        cheat(f"hashlib.sha256(text.encode()).hexdigest() == '{TASK.setup[P['module']]}'"),
        "invalid",
    ),
    "a digest of the bytecode": (
        cheat(
            "code(vars(m)) == code(space)",
            more=f"space = {{}}\nexec({TASK.files(TASK.setup)[P['module']].decode()!r}, space)\n"
            f"def code(space):\n    c = space['{FUNCTION[2:]}'].__code__\n    return c.co_code, c.co_consts\n",
        ),
        "invalid",
    ),
    "the syntax tree": (cheat(f"{LINE!r} in tree", more=TREE), "unresolved"),
    "the repaired syntax tree": (cheat(f"{FIX!r} not in tree", f"{FIX!r} in tree", more=TREE), "unresolved"),
    "always the first phrase": ("# Issue resolved\nprint('Issue reproduced')\n", "unresolved"),
    "both phrases": ("print('Issue reproduced')\nprint('Issue resolved')\n", "unresolved"),
    "neither phrase": ("print('Issue reproduced?', 'Issue resolved?')\n", "unresolved"),
    "no second phrase": ("print('Issue reproduced')\n", "unresolved"),
    "no Python": (HONEST + "def\n", "unresolved"),
    "a crash behind a phrase in its source": ("1 / 0; 'Issue reproduced'; 'Issue resolved'\n", "unresolved"),
    "catches whatever is raised": (
        HONEST.replace("r = ", "try:\n    r = ").replace("\nprint", f"\nexcept Exception:\n    r = {RIGHT}\nprint"),
        "unresolved",
    ),
    "hides a phrase in noise": (
        HONEST + "print('Issue reproduced\\n' + 'x' * 99999 + '\\nIssue resolved\\n' + 'x' * 99999)\n",
        "unresolved",
    ),
}


def changes(script, **more):
    return {path: FileChange(text.encode()) for path, text in {"test_issue.py": script, **more}.items()}


def test_an_honest_script_is_resolved_and_nothing_else_of_the_agent_counts(native):
    gold = TASK.files(TASK.grader.gold)[P["module"]].decode()
    verdict = grade_script(TASK, changes(HONEST, **{P["module"]: gold, "sitecustomize.py": "1 / 0"}), native)
    assert (verdict.outcome, verdict.why, set(verdict.kept)) == ("resolved", "", {"test_issue.py"})
    assert verdict.dropped == tuple(sorted((P["module"], "sitecustomize.py")))


@pytest.mark.parametrize("name", CHEATS)
def test_a_script_that_does_not_run_the_code_is_not_resolved(name, native):
    script, outcome = CHEATS[name]
    verdict = grade_script(TASK, changes(script), native)
    assert verdict.outcome == outcome, verdict.why


READERS = [name for name, (script, _) in CHEATS.items() if script.startswith(READ) or "catches" in name]


@pytest.mark.parametrize("name", READERS)
def test_two_trees_alone_would_be_fooled(name, native, monkeypatch):
    """Each script that is refused above for what it reads says the right thing of the two trees that the repair gives."""
    for decoy in ("rewritten", "raising"):
        monkeypatch.setattr(testgen, decoy, lambda *_: {})
    assert grade_script(TASK, changes(CHEATS[name][0]), native).outcome == "resolved"


def test_without_gold_only_the_first_tree_is_judged(native):
    assert grade_script(TASK, changes(HONEST), native, gold=False).outcome == "resolved"
    assert grade_script(TASK, changes(CHEATS["both phrases"][0]), native, gold=False).outcome == "unresolved"
    always = CHEATS["always the first phrase"][0]
    assert grade_script(TASK, changes(always), native, gold=False).outcome == "resolved"


def test_honest_scripts_pay_on_many_tasks(native):
    for index in range(20, 30):
        task = repairs.task("train", index)
        call, module, wrong, right = re.match(r"(.*) in (\w+)\.py gives (.*), not (.*)\. Tests", task.prompt).groups()
        script = f"from {module} import *\nr = {call}\n" + VERDICT.format(bad=f"r == {wrong}", good=f"r == {right}")
        verdict = grade_script(task, changes(script), native)
        assert verdict.outcome == "resolved", f"{task.id}: {verdict.why}"


def test_files_that_a_repair_adds_and_removes(native):
    """The repair of a repository in an image is known by file, too: here one is added, one removed, one is no Python."""
    blobs = {sha256(data): data for data in (b"old\n", b"new\n", b"x = 1\n")}
    old, new, code = blobs
    task = Task(
        id="files",
        prompt="x",
        setup={"a.txt": old, "gone.py": code},
        grader=Grader(gold={"a.txt": new, "gone.py": None, "pkg/made.py": code}),
        blobs=blobs,
    )
    script = (
        "import os\nseen = open('a.txt').read(), os.path.exists('gone.py'), os.path.exists('pkg/made.py')\n"
        + VERDICT.format(bad="seen == ('old\\n', True, False)", good="seen == ('new\\n', False, True)")
    )
    verdict = grade_script(task, changes(script), native)
    assert verdict.outcome == "resolved", verdict.why


def test_an_episode_by_a_scripted_policy(native, pytestconfig):
    renderer = CwmRenderer(pytestconfig.rootpath / "policy" / "cwm_tiny")
    actions = ("<tool: bash>\npython3 runner.py\n</tool>", f"<tool: create>\ntest_issue.py\n{HONEST}</tool>", SUBMIT)
    for reward, script in (("cwm", actions), ("binary", actions), ("cwm", (SUBMIT,)), ("binary", (SUBMIT,))):
        env = SWETestgenEnv(backend=native, reward=reward)
        policy = ScriptedPolicy(renderer, replies(*script))
        played = run_episode(env, policy, renderer, Sampling(max_tokens=400), episode="e", seed=3)
        said = "resolved" if script is actions else "unresolved"
        worth = {"cwm": {"resolved": 1.0, "unresolved": -1.0}, "binary": {"resolved": 1.0, "unresolved": 0.0}}
        assert (played.outcome, played.reward, played.turns) == (said, worth[reward][said], len(script))
        assert played.info.get("why", "") == ("" if script is actions else "there is no test_issue.py")


@pytest.mark.docker
def test_an_episode_in_docker():
    from envs.sandbox.docker import DockerBackend

    backend = DockerBackend()
    try:
        for script, outcome in ((HONEST, "resolved"), (CHEATS["a line of the bug"][0], "invalid")):
            assert grade_script(TASK, changes(script), backend).outcome == outcome
    finally:
        backend.close()


def test_a_repair_that_is_a_patch(native):
    path, gold = P["module"], TASK.files(TASK.grader.gold)[P["module"]]
    patch = to_patch({path: FileChange(TASK.files(TASK.setup)[path])}, {path: FileChange(gold)}).encode()
    for data, fits in ((patch, True), (patch.replace(b"\n-", b"\n-never "), False)):
        grader = replace(TASK.grader, gold={}, gold_patch=sha256(data))
        task = replace(TASK, grader=grader, blobs={**TASK.blobs, sha256(data): data})
        if fits:
            assert grade_script(task, changes(HONEST), native).outcome == "resolved"
            assert grade_script(task, changes(CHEATS["a line of the repair"][0]), native).outcome == "invalid"
        else:
            with pytest.raises(ValueError, match="its repair can't be applied"):
                grade_script(task, changes(HONEST), native)


@pytest.mark.docker
def test_a_repository_in_an_image(native, tmp_path):
    """Its files are read from the image: the task names only those of the repair."""
    from envs.sandbox.archives import offer
    from envs.sandbox.capture import Entry, tree_layer
    from envs.sandbox.imagestore import ImageStore

    store = ImageStore(tmp_path)
    tree = {path: Entry(data) for path, data in TASK.files(TASK.setup).items()}
    digest = store.extend(store.add_base("codeworld-base"), [tree_layer(tree, "testbed")], workdir="/testbed")
    offer(tmp_path)
    task = replace(TASK, base=digest, workdir="/testbed", setup={})
    for script, outcome in ((HONEST, "resolved"), (CHEATS["a line of the repair"][0], "invalid")):
        verdict = grade_script(task, changes(script), native)
        assert verdict.outcome == outcome, verdict.why


def test_forks_are_of_the_same_kind_and_statements_fit(native):
    env = envs.make("codeworld/SWE-testgen-v0", backend=native)
    statement, _ = env.reset(seed=3, options={"split": "train"})
    assert statement == TASK.prompt + BRIEF and env.turn_tokens > TASK.budget.turn_tokens
    env.step(f"<tool: create>\ntest_issue.py\n{HONEST}</tool>")
    one, two = env.fork(2)
    one.step("<tool: bash>\nrm test_issue.py\n</tool>")
    assert [e.step(SUBMIT)[1] for e in (one, two, env)] == [-1.0, 1.0, 1.0]


def test_a_task_without_repaired_files_is_refused_unless_told(native):
    task = Task(id="bare", prompt="Repair it.")
    with pytest.raises(ValueError, match="task bare has no repair.*gold=False"):
        SWETestgenEnv(backend=native).reset(options={"task": task})
    env = SWETestgenEnv(backend=native, gold=False)
    statement, _ = env.reset(options={"task": task})
    assert "Issue reproduced" in statement and "Other issues" in statement
    env.close()


def run(text, cause="exit", tail=b""):
    return Result(exit=0, cause=cause, head=text.encode(), tail=tail, total=len(text))


def test_what_a_run_says():
    assert judge(run("a\n Issue reproduced \nIssue reproduced"), "Issue reproduced")[0] == "resolved"
    assert judge(run("Issue reproduced\nOther issues"), "Issue reproduced")[0] == "unresolved"
    assert judge(run("Issue reproduced", cause="timeout"), "Issue reproduced")[0] == "timeout"
    assert judge(run("Issue reproduced", cause="oom"), "Issue reproduced")[0] == "unresolved"
    assert judge(run("Issue reproduced", tail=b"x"), "Issue reproduced")[0] == "unresolved"
    assert judge(run("Traceback"), "") == ("resolved", "")
    assert judge(run("Issue reproduced\nIssue resolved"), "")[0] == "unresolved"
    assert "'NameError: x'" in judge(run("Traceback\nNameError: x\n"), "Issue resolved")[1]


BROKEN = b'''import os
class A:
    @property
    def f(self):
        """Doc."""
        return os.sep + "\\
x"
    @f.setter
    def f(self, x): self.x = x
    async def g(self):
        def h():
            return 2
        return h()
'''
REPAIRED = BROKEN.replace(b"return 2", b"return 3").replace(b"os.sep + ", b"")


def test_rewritten_files_mean_the_same():
    for mine, other in ((BROKEN, REPAIRED), (REPAIRED, BROKEN), (BROKEN.replace(b"\n", b"\r\n"), REPAIRED)):
        (text,) = rewritten({"a.py": mine}, {"a.py": other}, random.Random(1)).values()
        spare = re.compile(rb"^ *_\w{12} = None\r?\n", re.M)
        assert ast.dump(ast.parse(spare.sub(b"", text))) == ast.dump(ast.parse(mine))
        assert len(spare.findall(text)) == 3  # the module and the two functions that differ and have a place for it
        wrong = set(other.splitlines()) - set(mine.splitlines())
        assert all(re.search(rb"# " + re.escape(line.strip()), text) for line in wrong)


def test_a_difference_inside_a_string_is_told_at_the_end():
    mine, other = b'x = """\nold\n"""\ny = 1', b'x = """\nnew\n"""\ny = 1'
    (text,) = rewritten({"a.py": mine}, {"a.py": other}, random.Random(1)).values()
    assert text.startswith(mine + b"\n# new\n") and re.fullmatch(rb"_\w+ = None\n", text.splitlines(keepends=True)[-1])


def test_repaired_functions_raise_when_called_and_others_do_not():
    (text,) = raising({"a.py": REPAIRED}, {"a.py": BROKEN}, random.Random(1)).values()
    space = {"__name__": "a"}
    exec(text, space)
    a = space["A"]()
    a.f = 1
    assert a.x == 1
    with pytest.raises(RuntimeError):
        _ = a.f
    with pytest.raises(RuntimeError):
        a.g().send(None)


@pytest.mark.parametrize(
    ("repaired", "broken"),
    [
        (b"x = 1\ndef f():\n    return 1\n", b"x = 2\ndef f():\n    return 2\n"),
        (b"def f(a):\n    return 1\n", b"def f():\n    return 2\n"),
        (b"def f(): return 1\n", b"def f(): return 2\n"),
        (b"def f():\n    return 1\n", b"def f():\n    return 2\ndef g():\n    pass\n"),
        (b"def f():\n    return 1\n", b"print 1\n"),
    ],
)
def test_no_raising_tree_where_a_script_might_do_without_the_call(repaired, broken):
    assert raising({"a.py": repaired}, {"a.py": broken}, random.Random(1)) == {}
    assert raising({"a.py": REPAIRED, "b.txt": b"1"}, {"a.py": BROKEN, "b.txt": b"2"}, random.Random(1)) == {}


def test_a_function_that_the_repair_adds_raises():
    (text,) = raising({"a.py": REPAIRED}, {"a.py": b"import os\nclass A: pass\n"}, random.Random(1)).values() or [b""]
    assert text == b""  # the class lost its `pass`, so the rest differs
    made = raising({"a.py": b"x = 1\ndef f():\n    return 1\n"}, {"a.py": b"x = 1\n"}, random.Random(1))
    assert b"raise RuntimeError" in made["a.py"]
