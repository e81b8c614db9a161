import importlib
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[3] / "examples"
MINIATURE = EXAMPLES / "miniature"


@pytest.fixture(scope="module")
def miniature():
    """Imports a script of the miniatures by name, as a script beside it would; nothing stays for other test files."""
    path, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(MINIATURE))
    yield importlib.import_module
    sys.path[:] = path
    for name in set(sys.modules) - before:
        # Modules beside other scripts have the same names.
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(EXAMPLES):
            del sys.modules[name]
