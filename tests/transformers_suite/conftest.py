"""Puts transformers' own test mixins on the path as `tests.*`. Run by `make test-transformers`, in this folder."""

import os
import sys

import pytest
from prepare import prepare


os.environ["HF_HUB_OFFLINE"] = "1"

try:
    sys.path.insert(0, str(prepare()))
    missing = ""
except OSError as error:
    missing = f"transformers' own tests are not to be had. {error}"


def pytest_configure():
    if missing and os.environ.get("CI") == "true":
        raise pytest.UsageError(missing)


class _SkippedModule(pytest.Module):
    def collect(self):
        pytest.skip(missing, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return _SkippedModule.from_parent(parent, path=module_path) if missing else None


def pytest_sessionfinish(session, exitstatus):
    if missing and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK
