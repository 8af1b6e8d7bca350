"""Sources are parsed by many threads at once: rollout workers generate and grade tasks on threads."""

import ast
import threading

from envs import syntax


def test_only_one_thread_parses_at_a_time(monkeypatch):
    inside, most = [0], [0]

    def slow(source):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.002)
        inside[0] -= 1
        return real(source)

    real = ast.parse
    monkeypatch.setattr(ast, "parse", slow)
    threads = [threading.Thread(target=lambda: [syntax.parse("x = 1") for _ in range(5)]) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert most == [1]


def test_the_tree_is_the_same():
    assert ast.dump(syntax.parse(b"x = [1, 'two']")) == ast.dump(ast.parse("x = [1, 'two']"))
