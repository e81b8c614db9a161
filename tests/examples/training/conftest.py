import runpy
import sys
from pathlib import Path

import pytest


TRAINING = Path(__file__).parents[3] / "examples" / "training"


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs a script as `python` would, but in this process, and returns what it prints."""

    def run(command, *words, prepare=lambda: None):
        script, *more = command.split()
        monkeypatch.setattr(sys, "argv", [str(TRAINING / f"{script}.py"), *more, *map(str, words)])
        prepare()
        capsys.readouterr()
        runpy.run_path(sys.argv[0], run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.syspath_prepend(str(TRAINING))
    before = set(sys.modules)
    yield run
    # Modules beside other scripts have the same names.
    for name in set(sys.modules) - before:
        if str(TRAINING) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]
