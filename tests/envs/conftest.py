"""A native backend for the tests of environments; without one, they skip (or fail where CI says it must be there)."""

import os

import pytest


@pytest.fixture(scope="session")
def native():
    from envs.errors import Unsupported
    from envs.sandbox.native import NativeBackend

    try:
        backend = NativeBackend()
        backend.create().close()
    except Unsupported as error:
        if "native" in os.environ.get("CODEWORLD_REQUIRE", ""):
            pytest.fail(f"native sandboxes are required here: {error}")
        pytest.skip(str(error))
    yield backend
    backend.close()
