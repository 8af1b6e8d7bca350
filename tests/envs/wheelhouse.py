"""Wheels made from what is installed here, and a tiny package that builds itself: installations without network."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path

TESTING = ("pip", "pytest", "pluggy", "iniconfig", "packaging", "pygments")


def rewheel(name: str, to: Path) -> Path:
    """The installed distribution `name` as a wheel again."""
    dist = importlib.metadata.distribution(name)
    files = {}
    for file in dist.files or ():
        path = str(file)
        if (
            not path.startswith("..")
            and not path.endswith((".pyc", "/RECORD"))
            and Path(dist.locate_file(file)).is_file()
        ):
            files[path] = Path(dist.locate_file(file)).read_bytes()
    info = next(path.partition("/")[0] for path in files if path.endswith(".dist-info/METADATA"))
    return wheel(to / f"{info.removesuffix('.dist-info')}-py3-none-any.whl", info, files)


def wheel(path: Path, info: str, files: dict[str, bytes]) -> Path:
    lines = []
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(data)}")
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,\n"]))
    return path


def simple(path: Path, name: str, version: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> Path:
    """A wheel of a few modules."""
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: here\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    return wheel(path / f"{name}-{version}-py3-none-any.whl", info, files | meta)


BACKEND = b'''
import os, pathlib, zipfile

NAME, META = "tiny-1.0.dist-info", """Metadata-Version: 2.1
Name: tiny
Version: 1.0
Requires-Dist: needed>=1
Requires-Dist: lint; extra == "lint"
Requires-Dist: helper; extra == "test"
Requires-Dist: absent-everywhere; extra == "test"
Requires-Dist: pytest; extra == "test"
Provides-Extra: test
Provides-Extra: lint
"""


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    pathlib.Path("src/tiny/version.txt").write_text(os.environ.get("SETUPTOOLS_SCM_PRETEND_VERSION", "?"))
    os.makedirs("build/lib/tiny", exist_ok=True)
    pathlib.Path("build/lib/tiny/__init__.py").write_text("left = 1")
    name = "tiny-1.0-py3-none-any.whl"
    files = {"tiny.pth": os.path.abspath("src") + "\\n", NAME + "/METADATA": META,
        NAME + "/WHEEL": "Wheel-Version: 1.0\\nGenerator: tiny\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"}
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(NAME + "/RECORD", "".join(f"{path},,\\n" for path in [*files, NAME + "/RECORD"]))
    return name
'''

TINY: dict[str, bytes] = {
    "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "backend.py": BACKEND,
    "src/tiny/__init__.py": b"import needed\n\n\ndef double(x):\n    return 2 * x\n",
    "tests/test_tiny.py": b"""import helper
import pytest
import surprise
import tiny


def test_double():
    assert tiny.double(2) == 4


@pytest.mark.parametrize("x", [1, 2])
def test_each(x):
    assert tiny.double(x) == x + x


def test_wrong():
    assert tiny.double(1) == 3


@pytest.mark.skip
def test_skipped():
    pass
""",
}
