"""The code of a family in one folder, whatever way its modules import each other."""

import ast
import re

import pytest

from llava_family.hub.flattening import ALLOWED_IMPORTS, flatten


ENTRIES = {
    family: [f"{family}.{kind}_{family}" for kind in ("modeling", "processing", "image_processing")]
    for family in ("llava_uhd", "moe_llava", "llava_mole")
}


def package(tmp_path, **modules):
    for name, source in modules.items():
        path = tmp_path / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("family", ENTRIES)
def test_families_become_siblings_alone(family):
    sources = flatten(ENTRIES[family])
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in sources, (name, ast.unparse(node))
        # transformers looks for the text
        found = re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE)
        assert all(f"{module}.py" in sources for module in found)
    # Nothing that only this package needs
    assert not {name for name in sources if re.match(r"auto|cli|routing|model\.py|layer\.py", name)}
    assert ("modeling_llava_uhd.py" in sources) and (f"modeling_{family}.py" in sources)


def test_nothing_but_imports_changes(tmp_path):
    source = '"""From .a import b."""\nif True:\n    from ..one.a import (  # why\n        b)\nfrom .c import d\n'
    root = package(tmp_path, two__m=source, two__c="d = 1\n", one__a="b = 2\n")
    sources = flatten(["two.m"], root)
    assert sources == {
        "m.py": source.replace("from ..one.a import", "from .a import"),
        "a.py": "b = 2\n",
        "c.py": "d = 1\n",
    }


def test_circles_end(tmp_path):
    root = package(tmp_path, one__a="from .b import y\n", one__b="def f():\n    from .a import x\n")
    assert list(flatten(["one.a"], root)) == ["a.py", "b.py"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from . import b", r"a.py:1 must import from a module by name"),
        ("from .. import two", r"a.py:1 must import from a module by name"),
        ("from ...elsewhere import b", r"a.py:1 must import from a module by name"),
        ("from .missing import b", r"one.missing must be a module of the package, but there is no .*missing.py"),
        ("from ..two.a import b", r"must have different names, but one.a and two.a do not"),
        ("import matplotlib.pyplot as plt", r"a.py:1 imports 'matplotlib.pyplot', which who loads"),
        ("def f():\n    from torchvision import io", r"a.py:2 imports 'torchvision'"),
        ("import llava_family", r"a.py:1 imports 'llava_family'"),
        (
            "try:\n    from llava_family.auto import x\nexcept ImportError:\n    x = 1",
            r"a.py:2 imports 'llava_family.auto'",
        ),
    ],
)
def test_what_transformers_would_not_follow_is_an_error(tmp_path, source, message):
    root = package(tmp_path, one__a=source, two__a="b = 1\n")
    with pytest.raises(ValueError, match=message):
        flatten(["one.a"], root)


def test_optional_packages_are_those_in_try_blocks(tmp_path):
    source = "import os\nimport torch\ntry:\n    import flash_attn\nexcept ImportError:\n    flash_attn = None\n"
    assert flatten(["one.a"], package(tmp_path, one__a=source)) == {"a.py": source}
    assert "torchvision" not in ALLOWED_IMPORTS
