"""Where repositories come from: an index of our own, git repositories, archives that are up to something."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from envs.sandbox.capture import Entry
from envs.swe.index import sdist
from envs.swe.sources import fetch
from tests.envs.gitrepo import commit, git


def archive(files: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, value in files.items():
            info = value if isinstance(value, tarfile.TarInfo) else tarfile.TarInfo()
            info.name = name
            if isinstance(value, bytes):
                info.size = len(value)
            tar.addfile(info, io.BytesIO(value) if isinstance(value, bytes) else None)
    return out.getvalue()


def special(kind: bytes, target: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname, info.mode = kind, target, mode
    return info


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return out.getvalue()


class Index:
    """A package index of one project, `demo`; it counts what is asked of it."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, dict]] = {}
        self.asked: list[str] = []
        self.html = False
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                index.asked.append(self.path)
                name = self.path.rpartition("/")[2]
                if self.path == "/simple/demo/":
                    self.answer(200, index.page())
                elif name in index.files:
                    self.answer(200, index.files[name][0])
                else:
                    self.answer(500 if "broken" in self.path else 404, b"")

            def answer(self, status, data):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/simple"

    def add(self, name: str, data: bytes | None = None, **more) -> None:
        data = archive({"demo-1/a.py": b"a = 1\n"}) if data is None else data
        self.files[name] = data, {"hashes": {"sha256": hashlib.sha256(data).hexdigest()}, **more}

    def page(self) -> bytes:
        if self.html:
            links = [
                f'<a href="../../files/{name}#sha256={more["hashes"]["sha256"]}" {"data-yanked" if more.get("yanked") else ""}'
                f' data-requires-python="{more.get("requires-python", "").replace(">", "&gt;")}">{name}</a>'
                for name, (_, more) in self.files.items()
            ]
            return f"<html><body>{''.join(links)}</body></html>".encode()
        files = [
            {"filename": name, "url": f"{self.url}/../files/{name}", **more} for name, (_, more) in self.files.items()
        ]
        return json.dumps({"files": files}).encode()


@pytest.fixture
def index(monkeypatch):
    made = Index()
    monkeypatch.setenv("PIP_INDEX_URL", made.url)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.parametrize("html", [False, True])
def test_the_newest_release_that_runs_is_taken(index, tmp_path, html):
    index.html = html
    for name in (
        "demo-1.9.tar.gz",
        "demo-1.10.tar.gz",
        "demo-2.0rc1.tar.gz",
        "demo-1.10-py3-none-any.whl",
        "demo_x-9.tar.gz",
    ):
        index.add(name)
    index.add("demo-3.0.tar.gz", yanked="broken")
    index.add("demo-4.0.tar.gz", **{"requires-python": ">=3.12,<5"})
    assert fetch("pypi:demo", tmp_path, python="3.11").version == "1.10"
    assert fetch("pypi:Demo", tmp_path, python="3.12").version == "4.0"
    source = fetch("pypi:demo==2.0rc1", tmp_path, python="3.11")
    assert (source.name, source.version, source.commit, source.repository) == ("demo", "2.0rc1", "", None)
    assert source.tree() == {"a.py": Entry(b"a = 1\n")}
    before = len(index.asked)
    assert sdist("demo", "1.9", tmp_path, "3.11").name == "demo-1.9.tar.gz" and len(index.asked) == before + 2
    assert fetch("pypi:demo==1.9", tmp_path).version == "1.9" and len(index.asked) == before + 2  # not asked again
    with pytest.raises(ValueError, match="has no commits"):
        source.tree("a" * 40)


def test_what_the_index_lacks_is_said_in_a_line(index, tmp_path, monkeypatch):
    def refused(source, why):
        with pytest.raises(ValueError, match=why) as told:
            fetch(source, tmp_path)
        assert "\n" not in str(told.value) and source.partition("=")[0] in str(told.value)

    index.add("demo-1.0-py3-none-any.whl")
    refused("pypi:demo", "no source distribution of it")
    index.add("demo-1.0.tar.gz", **{"requires-python": ">=99"})
    refused("pypi:demo", "no release of it runs on Python")
    refused("pypi:demo==7", "no source distribution of this version; there are 1.0")
    refused("pypi:absent", "no such package")
    refused("pypi:broken", "answers 500")
    refused("pypi:a b", "no name of a package")
    refused("pypi:--index-url=x", "no name of a package")
    index.files["demo-1.0.tar.gz"] = b"other", index.files["demo-1.0.tar.gz"][1]
    refused("pypi:demo==1.0", "other content than the index says")
    assert not list(tmp_path.rglob("*.tar.gz"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    refused("pypi:demo", "can't be reached")
    monkeypatch.setenv("PIP_INDEX_URL", "ftp://127.0.0.1/simple")
    refused("pypi:demo", "is not fetched")


LINK = tarfile.SYMTYPE
UNSAFE = {
    "absolute": ({"/etc/x": b""}, "unsafe path"),
    "upwards": ({"demo-1/../../x": b""}, "unsafe path"),
    "link out": ({"demo-1/x": special(LINK, "../../etc/passwd")}, "leaves the repository"),
    "absolute link": ({"demo-1/x": special(LINK, "/etc/passwd")}, "leaves the repository"),
    "through a link": ({"demo-1/x": special(LINK, "y"), "demo-1/x/z": b""}, "lies below a file or link"),
    "hard link out": ({"demo-1/x": special(tarfile.LNKTYPE, "../../etc/passwd")}, "does not hold"),
    "device": ({"demo-1/x": special(tarfile.CHRTYPE)}, "device or FIFO"),
    "FIFO": ({"demo-1/x": special(tarfile.FIFOTYPE)}, "device or FIFO"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_archives_are_refused(index, tmp_path, case):
    files, why = UNSAFE[case]
    index.add("demo-1.0.tar.gz", archive(files))
    with pytest.raises(ValueError, match=why) as told:
        fetch("pypi:demo", tmp_path).tree()
    assert "\n" not in str(told.value) and "demo-1.0.tar.gz" in str(told.value)


def test_archives_that_can_be_read_are(index, tmp_path):
    run = special(tarfile.REGTYPE, mode=0o755)
    files = {
        "demo-1/a.py": b"a",
        "demo-1/run": run,
        "demo-1/l": special(LINK, "d/../a.py"),
        "PAX": b"not below the top",
    }
    files |= {
        "demo-1/h": special(tarfile.LNKTYPE, "demo-1/a.py"),
        "demo-1/sub/.git": b"gitdir: x",
        "demo-1/.GIT/config": b"",
    }
    index.add("demo-1.0.tar.gz", archive(files))
    tree = fetch("pypi:demo==1.0", tmp_path).tree()
    assert tree == {"a.py": Entry(b"a"), "run": Entry(b"", 0o755), "l": Entry(link="d/../a.py"), "h": Entry(b"a")}
    index.add("demo-1.1.zip", zipped({"demo-1.1/a.py": b"z"}))
    assert fetch("pypi:demo==1.1", tmp_path).tree() == {"a.py": Entry(b"z")}
    index.add("demo-1.2.zip", zipped({"demo-1.1/../../a.py": b"z"}))
    index.add("demo-1.3.tar.gz", b"\x1f\x8bgarbage")
    for version, why in (("1.2", "unsafe path"), ("1.3", "not a readable archive")):
        with pytest.raises(ValueError, match=why):
            fetch(f"pypi:demo=={version}", tmp_path).tree()


@pytest.fixture
def repository(tmp_path):
    path = tmp_path / "some repo"
    first = commit(path, {"a.py": b"a = 1\n", "odd \xe9.txt": b"x\n", "sub/x.sh": b"#!/bin/sh\n"}, tag="v1.2.3")
    (path / "sub/x.sh").chmod(0o755)
    (path / "link").symlink_to("a.py")
    attributes = b"a.py export-ignore\n*.txt filter=evil eol=crlf\nsub/x.sh export-subst\n"
    second = commit(path, {".gitattributes": attributes, "sub/x.sh": b"$Format:%H$\n"})
    return path, first, second


def test_a_commit_is_read_as_it_is(repository, tmp_path):
    """No attribute, filter, hook or setting of the repository has a say."""
    path, first, second = repository
    mark = tmp_path / "ran"
    for key in ("filter.evil.smudge", "core.fsmonitor", "core.sshCommand", "core.pager", "uploadpack.packObjectsHook"):
        git(path, "config", key, f"touch '{mark}'")
    for hook in ("post-checkout", "reference-transaction", "post-index-change"):
        (path / ".git/hooks" / hook).write_text(f"#!/bin/sh\ntouch '{mark}'\n")
        (path / ".git/hooks" / hook).chmod(0o755)
    source = fetch(str(path), tmp_path / "cache")
    assert (source.name, source.version, source.commit) == ("some-repo", "1.2.3", second)
    tree = source.tree()
    assert tree["sub/x.sh"] == Entry(b"$Format:%H$\n", 0o755) and tree["link"] == Entry(link="a.py")
    assert tree["odd \xe9.txt"] == Entry(b"x\n") and tree["a.py"] == Entry(b"a = 1\n") and len(tree) == 5
    assert source.tree(first).keys() == {"a.py", "odd \xe9.txt", "sub/x.sh"}
    for where in (f"{path}@{first}", f"{path}@v1.2.3", f"file://{path}@{first[:12]}"):
        assert fetch(where, tmp_path / "cache").commit == first
    assert not mark.exists()


def test_a_url_is_cloned_once_and_asked_again_for_what_is_new(repository, tmp_path):
    path, first, second = repository
    source = fetch(f"git+file://{path}", tmp_path / "cache")
    assert source.commit == second and source.repository.is_relative_to(tmp_path / "cache")
    third = commit(path, {"b.py": b""})
    assert fetch(f"file://{path}", tmp_path / "cache").commit == third
    path.rename(tmp_path / "moved")
    assert fetch(f"file://{path}@{first}", tmp_path / "cache").tree() == source.tree(first)  # needs no network
    with pytest.raises(ValueError, match="git fetch failed"):
        fetch(f"file://{path}", tmp_path / "cache")


def test_what_git_lacks_is_said_in_a_line(repository, tmp_path, monkeypatch):
    path, *_ = repository

    def refused(source, why):
        with pytest.raises(ValueError, match=why) as told:
            fetch(source, tmp_path / "cache").tree()
        assert "\n" not in str(told.value)

    (tmp_path / "plain").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    refused(str(tmp_path / "plain"), "not a git repository")
    refused(str(tmp_path / "absent"), "no such directory")
    refused(f"{path}@{'0' * 40}", "no commit '0000")
    refused(f"{path}@--help", "no commit '--help'")
    refused(f"file://{tmp_path}/absent", "git clone failed")
    refused("ext::sh -c touch% x://", "git clone failed|no such directory")
    assert not (tmp_path / "x").exists()
    (path / "out").symlink_to("../../etc")
    commit(path, {})
    refused(str(path), "'out' is a link that leaves the repository")


def test_submodules_are_left_out(repository, tmp_path):
    path, first, _ = repository
    git(path, "update-index", "--add", "--cacheinfo", f"160000,{first},module")
    git(path, "commit", "-q", "-m", "submodule")
    assert "module" not in fetch(str(path), tmp_path).tree()
