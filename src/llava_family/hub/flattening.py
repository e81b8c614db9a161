"""Flattens modules of this package into one folder, as transformers wants the code of a Hub repository.

transformers finds the files that a module needs by the text `from .x import y`, and follows nothing else: no parent
package, no name that is imported from the package itself. Before it runs anything it imports all packages that a file
names, so none may be named that the reader need not have.

Source: `get_relative_imports` and `get_imports` of transformers' `dynamic_module_utils`.
"""

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path


PACKAGE = __package__.split(".")[0]
ROOT = Path(__file__).parents[1]

# What transformers itself needs to run a model with images
ALLOWED_IMPORTS = {"PIL", "huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers"}


def flatten(modules: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """The source of modules and of all that they import of the package, with its imports rewritten to siblings.

    Args:
        modules (`Iterable[str]`): Names inside the package, such as `"llava_uhd.modeling_llava_uhd"`.
        root (`Path`, *optional*): Folder of the package.

    Returns:
        `dict[str, str]`: Source by file name, in the order of `modules`, each followed by what it needs.

    Raises:
        ValueError: if a module is missing, imports in a way that transformers does not follow, needs a package that
            the reader may not have, or has the name of another one.
    """
    sources: dict[str, str] = {}
    origins: dict[str, str] = {}
    pending = list(modules)
    while pending:
        module = pending.pop(0)
        name = f"{module.rpartition('.')[2]}.py"
        if origins.setdefault(name, module) != module:
            raise ValueError(
                f"Modules in one folder must have different names, but {origins[name]} and {module} do not."
            )
        if name not in sources:
            sources[name], needed = _flatten_module(module, root)
            pending = [*needed, *pending]
    return sources


def _flatten_module(module: str, root: Path) -> tuple[str, list[str]]:
    """The rewritten source of a module, and the modules that it imports of the package."""
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        raise ValueError(f"{module} must be a module of the package, but there is no {path}.")
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    needed = []
    tree = ast.parse(source)
    _check_packages(tree, path)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        # `module` is below the package as deep as it has dots; each dot of the import but the first leads up one.
        parents = module.split(".")[: -node.level]
        if node.module is None or node.level > module.count(".") + 1:
            raise ValueError(f"{path}:{node.lineno} must import from a module by name, as in `from .x import y`.")
        needed.append(".".join([*parents, node.module]))
        line = lines[node.lineno - 1]
        statement = re.sub(
            r"from\s+[.\w]+", f"from .{node.module.rpartition('.')[2]}", line[node.col_offset :], count=1
        )
        lines[node.lineno - 1] = line[: node.col_offset] + statement
    return "".join(lines), needed


def _check_packages(tree: ast.Module, path: Path) -> None:
    """ValueError if an import needs a package that the reader may lack; transformers lets those in `try` blocks be."""
    tried = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            package = name.split(".")[0]
            allowed = package in ALLOWED_IMPORTS or package in sys.stdlib_module_names
            if not allowed and (package == PACKAGE or id(node) not in tried):
                raise ValueError(
                    f"{path}:{node.lineno} imports {name!r}, which who loads the repository may not have. Import only "
                    f"{', '.join(sorted(ALLOWED_IMPORTS))}, and modules of {PACKAGE} by `from .x import y`."
                )
