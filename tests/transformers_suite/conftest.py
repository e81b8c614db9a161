"""Puts transformers' own test mixins on the path as `tests.*`. Run by `make test-transformers`, in this folder."""

import os
import sys

import pytest
from prepare import TINY_MODELS, prepare
from table import Tables


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(TINY_MODELS)

try:
    sys.path.insert(0, str(prepare()))
    missing = ""
except OSError as error:
    missing = f"transformers' own tests are not to be had. {error}"


def pytest_addoption(parser):
    parser.addoption("--write-tables", action="store_true", help="write docs/conformance.md instead of comparing it")


def pytest_configure(config):
    if missing and os.environ.get("CI") == "true":
        raise pytest.UsageError(missing)
    if not missing:
        config.pluginmanager.register(Tables(config))


class _SkippedModule(pytest.Module):
    def collect(self):
        pytest.skip(missing, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return _SkippedModule.from_parent(parent, path=module_path) if missing else None


def pytest_sessionfinish(session, exitstatus):
    if missing and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK
