"""The package index, asked for source distributions. They are fetched, never built: no code of a package runs here.

Source of the protocol: PEP 503 and PEP 691.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

INDEX = "https://pypi.org/simple"
"""Where neither `PIP_INDEX_URL` nor pip's configuration names another."""
SECONDS = 60.0
"""Wall clock of one answer."""
BYTES_MAX = 512 << 20
"""Of one file that is fetched, and of one repository's files together."""
_RELEASE = re.compile(r"^\d+(\.\d+)*(\.post\d+)?$")


def sdist(name: str, version: str, cache: Path, python: str) -> Path:
    """The source distribution of a package (version "": the newest that `python` can run, pre-releases left out).

    A version that is in `cache` already is not asked for again. Raises `ValueError`.
    """
    what = f"pypi:{name}" + (f"=={version}" if version else "")
    directory = cache / "sdists" / name
    for path in directory.glob("*") if version else ():
        if version_of(path.name, name) == version:
            return path
    files = _files(name, what)
    found = {v: f for f in files if (v := version_of(f["filename"], name)) and not f.get("yanked")}
    if not found:
        raise ValueError(f"{what}: the index has no source distribution of it; give a git URL of its repository")
    if version and version not in found:
        raise ValueError(f"{what}: no source distribution of this version; there are {', '.join(list(found)[-8:])}")
    fit = [v for v, f in found.items() if _RELEASE.match(v) and _runs(f.get("requires-python"), python)]
    if not version and not fit:
        raise ValueError(f"{what}: no release of it runs on Python {python}; name a version: pypi:{name}==VERSION")
    chosen = found[version or max(fit, key=_order)]
    path = directory / chosen["filename"]
    if not path.exists():
        data = _get(chosen["url"], what)
        wanted = (chosen.get("hashes") or {}).get("sha256")
        if wanted and hashlib.sha256(data).hexdigest() != wanted:
            raise ValueError(f"{what}: {path.name} has other content than the index says; try again")
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f".{os.getpid()}.partial"
        partial.write_bytes(data)
        partial.rename(path)
    return path


def version_of(filename: str, name: str) -> str | None:
    """The version in a source distribution's file name."""
    stem = next((filename.removesuffix(end) for end in (".tar.gz", ".zip", ".tar.bz2") if filename.endswith(end)), "")
    head, _, version = stem.rpartition("-")
    return version if re.sub(r"[-_.]+", "-", head).lower() == name else None


def _order(version: str) -> tuple[list[int], int]:
    release, _, post = version.partition(".post")
    return [int(part) for part in release.split(".")], int(post or -1)


def _runs(requires: str | None, python: str) -> bool:
    """Whether the lower bounds of `requires-python` admit `python`; what else it says, the installer sees."""
    have = [int(part) for part in python.split(".")]
    bounds = re.findall(r">=?\s*(\d+(?:\.\d+)*)", requires or "")
    return all(have >= [int(part) for part in bound.split(".")][:2] for bound in bounds)


def _files(name: str, what: str) -> list[dict[str, Any]]:
    """The files of a project, as the index lists them. Source: PEP 503 and 691."""
    url = f"{_index().rstrip('/')}/{name}/"
    data = _get(url, what, accept="application/vnd.pypi.simple.v1+json, text/html;q=0.1")
    try:
        return list(json.loads(data)["files"])
    except ValueError:
        return _Anchors(url, data.decode("utf-8", "replace")).files


class _Anchors(HTMLParser):
    """The links of a project's page, as its JSON form lists them."""

    def __init__(self, url: str, text: str) -> None:
        super().__init__()
        self.files: list[dict[str, Any]] = []
        self._url = url
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One link."""
        found = dict(attrs)
        if tag == "a" and found.get("href"):
            url, _, digest = urllib.parse.urljoin(self._url, found["href"] or "").partition("#")
            kind, _, digest = digest.partition("=")
            name = urllib.parse.unquote(url.rpartition("/")[2])
            entry: dict[str, Any] = {"filename": name, "url": url, "yanked": "data-yanked" in found}
            self.files.append(entry | {"hashes": {kind: digest}, "requires-python": found.get("data-requires-python")})


def _index() -> str:
    given = os.environ.get("PIP_INDEX_URL")
    if not given:
        ask = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
        given = subprocess.run(
            ask, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        ).stdout.strip()
    return given or INDEX


def _get(url: str, what: str, accept: str = "*/*") -> bytes:
    if urllib.parse.urlsplit(url).scheme not in ("https", "http", "file"):
        raise ValueError(f"{what}: the index leads to {url[:100]!r}, which is not fetched")
    try:
        request = urllib.request.Request(url, headers={"Accept": accept, "User-Agent": "codeworld"})
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            data: bytes = answer.read(BYTES_MAX + 1)
    except urllib.error.HTTPError as error:
        cause = "no such package" if error.code == 404 else f"the index answers {error.code} {error.reason}"
        raise ValueError(f"{what}: {cause}; check the name, or try later") from None
    except OSError as error:
        cause = str(getattr(error, "reason", None) or error)
        raise ValueError(f"{what}: the index can't be reached ({cause}); check the network and PIP_INDEX_URL") from None
    if len(data) > BYTES_MAX:
        raise ValueError(f"{what}: more than {BYTES_MAX >> 20} MiB; it is not fetched")
    return data
