"""Tools: the wire format, and edits that are exact, in a real sandbox."""

from pathlib import Path

import pytest

from envs import tools
from envs.tools import FormatError, ToolCall, parse

ALL = ("bash", "edit", "create", "submit")


def test_one_call():
    assert parse("thinking\n<tool: bash>\nls -l\npwd\n</tool>", ALL) == ToolCall("bash", "ls -l\npwd")
    assert parse("<tool: submit>\n</tool>", ALL) == ToolCall("submit", "")
    assert parse("<tool: submit>\nfix.patch\n</tool>", ALL) == ToolCall("submit", "fix.patch")


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("", "found 0 opening and 0 closing"),
        ("just words", "found 0 opening"),
        ("<tool: bash>\nls", "1 opening and 0 closing"),
        ("<tool: bash>\nls\n</tool><tool: bash>\nls\n</tool>", "2 opening"),
        ("<tool: bash> ls </tool>", "a new line"),
        ("<tool: bash>\n\n</tool>", "empty"),
        ("<tool: rm>\nx\n</tool>", "unknown tool 'rm'. Tools: bash, edit, create, submit."),
    ],
)
def test_what_is_no_call_says_so(action, said):
    error = parse(action, ALL)
    assert isinstance(error, FormatError) and said in error.text and "\n" not in error.text


@pytest.fixture
def sandbox(native):
    box = native.create(
        files={
            "a.py": b"x = 1\ny = 2\nx = 1\n",
            "crlf.txt": b"one\r\ntwo\r\n",
            "latin.txt": b"caf\xe9\n",
            "d/b.py": b"z\n",
        }
    )
    yield box
    box.close()


def block(path, search, replace):
    return f"{path}\n<<<<<<< SEARCH\n{search}\n=======\n{replace}\n>>>>>>> REPLACE"


def test_edit_replaces_whole_lines_once(sandbox):
    assert tools.edit(sandbox, block("a.py", "y = 2", "y = 3\nz = 4"), context=0) == "Edited a.py at line 2."
    assert sandbox.read("a.py") == b"x = 1\ny = 3\nz = 4\nx = 1\n"
    assert "at line 1" in tools.edit(sandbox, block("a.py", "x = 1\ny = 3", "x = 0"), context=1)
    assert sandbox.read("a.py") == b"x = 0\nz = 4\nx = 1\n"


def test_edit_can_delete_and_keeps_crlf(sandbox):
    assert "Edited" in tools.edit(sandbox, "a.py\n<<<<<<< SEARCH\ny = 2\n=======\n>>>>>>> REPLACE")
    assert sandbox.read("a.py") == b"x = 1\nx = 1\n"
    assert "Edited" in tools.edit(sandbox, block("crlf.txt", "two", "drei"))
    assert sandbox.read("crlf.txt") == b"one\r\ndrei\r\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (block("a.py", "x = 1", "x = 2"), "occurs 2 times in a.py, at lines 1, 3"),
        (block("a.py", "x = ", "x = 2"), "does not occur"),
        (block("a.py", "", "x"), "SEARCH is empty"),
        (block("none.py", "x", "y"), "none.py does not exist"),
        (block("d", "x", "y"), "is a directory"),
        (block("latin.txt", "caf", "tea"), "not UTF-8"),
        ("a.py", "a path and one"),
        (block("a.py", "y = 2", "q") + "\n" + block("a.py", "y", "q"), "a path and one"),
    ],
)
def test_edit_errors_are_one_sentence_and_change_nothing(sandbox, body, said):
    before = sandbox.read("a.py")
    answer = tools.edit(sandbox, body)
    assert answer.startswith("Error: ") and said in answer and "\n" not in answer
    assert sandbox.read("a.py") == before


def test_create(sandbox):
    assert tools.create(sandbox, "d/new.py\na\nb") == "Created d/new.py."
    assert sandbox.read("d/new.py") == b"a\nb\n"
    assert "exists" in tools.create(sandbox, "a.py\nx")
    assert tools.create(sandbox, "new/x.py\nx") == "Created new/x.py."
    assert "is a directory" in tools.create(sandbox, "d\nx")


def test_paths_follow_the_shell(sandbox):
    tools.bash(sandbox, "cd d", timeout=5, limit=1000)
    assert "Edited b.py" in tools.edit(sandbox, block("b.py", "z", "w"))
    assert sandbox.read("/repo/d/b.py") == b"w\n"


def test_bash_says_what_ended_a_command(sandbox):
    assert tools.bash(sandbox, "echo hi; false", timeout=5, limit=1000) == "hi\n"
    said = tools.bash(sandbox, "echo begun; sleep 60", timeout=1, limit=1000)
    assert "begun" in said and "killed after 1 seconds" in said
    said = tools.bash(sandbox, "echo begun; sleep 60", timeout=60, limit=1000, silence=0.5)
    assert "begun" in said and "killed after 0.5 seconds without output" in said
    assert tools.bash(sandbox, "seq 1 100000", timeout=5, limit=100).endswith("\n[...]")
    assert len(tools.bash(sandbox, "seq 1 100000", timeout=5, limit=100)) < 120


def test_playing_by_hand_shows_control_characters_written_out() -> None:
    from envs.__main__ import visible

    assert visible("ok\tä\n\x1b]0;title\x07\x9b2J\r\x00") == "ok\tä\n\\x1b]0;title\\x07\\x9b2J\\r\\x00"


def test_a_file_that_can_not_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    from benchmarks.__main__ import main as measure
    from envs.__main__ import main

    for bad in (tmp_path, tmp_path / "missing" / "x.json"):
        for command, args in ((main, ["doctor"]), (main, ["attack"]), (measure, ["systems", "soak"])):
            with pytest.raises(ValueError, match=r"^--json [^\n]*; name a file that can be written$"):
                command([*args, "--json", str(bad)])
