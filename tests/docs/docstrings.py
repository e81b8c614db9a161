"""Counts what the docstrings of the public objects say, and finds what they leave out.

Public is what a module's `__all__` names. In a module without one it is every class and function without an underscore
that is defined there, as for `from module import *`. Of a public class, public are the methods and properties that
classes of this package define, inherited ones included.
An override is documented where it comes from, in transformers, torch or PEFT, if that has a docstring and the override
has no parameter of its own; what it raises itself must still be said here.

`python tests/docs/docstrings.py [PART OF A NAME]` prints the findings.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from functools import cache, cached_property


PACKAGE = "llava_family"
# A module that needs one of these is left out where it is not installed.
OPTIONAL = ("lmms_eval",)

TENSOR = re.compile(r"\b(\w*Tensor|ndarray)\b")
SHAPE = re.compile(r"\bshapes? `\(|\bof any shape\b|\bof the shape of `|\bscalar\b")
DTYPE = re.compile(
    r"\b((Float|Long|Int|Bool)Tensor|(b?float|u?int)\d+|uint8|bool|booleans?|integers?|dtypes?|in 8 bits|8-bit)\b"
)
# Names of numbers that count something, or measure it
MEASURE = re.compile(
    r"(^|_)(width|height|sizes?|edge|sides?|lengths?|area|bytes|seconds|timeout|flops|capacity|box(es)?)(_|$)"
)
NO_MEASURE = ("hidden_size", "intermediate_size", "vocab_size", "projector_hidden_size")
UNIT = re.compile(
    r"(?i)\b(pixels?|px|patch(es)?|tokens?|positions?|bytes?|FLOPs|seconds?|words?|samples?|features?|rows?|numbers?)\b"
)
NUMBER = re.compile(r"\b(int|float|tuple\[int|list\[int|list\[float|tuple\[float)")
# Of transformers' templates, where a name is missing
PLACEHOLDER = re.compile(r"\ba None\b|\b(image_processor|tokenizer|video_processor|processor)_class\b")
SOURCE = re.compile(r"\bSource: (?P<text>.+?)(\n\s*\n|$)", re.DOTALL)
KNOWN_SOURCE = re.compile(
    r"\b(section|equation|table|figure|paper|arXiv|original|released|transformers|torch|torchvision|PEFT|PIL|numpy|TRL"
    r"|LLaVA|MoE-LLaVA|vLLM|Hub|huggingface_hub|safetensors|DeepSpeed|matplotlib|gradio|lmms-eval|no counterpart)\b",
)
SECTION = re.compile(r"(Args|Parameters|Attributes|Returns|Yields|Raises):\s*$")
STANDARD_SOURCES = ("ModelArgs", "ModelOutputArgs", "ImageProcessorArgs", "ProcessorArgs", "ConfigArgs")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a docstring says of one parameter or field."""

    type: str
    text: str

    @property
    def all(self) -> str:
        return f"{self.type} {self.text}"


class Docstring:
    """A docstring by its sections, in the layout that transformers uses."""

    def __init__(self, text: str | None):
        self.text = inspect.cleandoc(text or "")
        self.sections: dict[str, list[str]] = {}
        intro: list[str] = []
        body = intro
        for line in self.text.splitlines():
            if match := SECTION.match(line):
                body = self.sections.setdefault(match[1].replace("Parameters", "Args"), [])
            elif line.strip() and not line[0].isspace():
                body = intro
                intro.append(line)
            else:
                body.append(line)
        self.summary = "\n".join(intro).strip().split("\n\n")[0]

    def section(self, name: str) -> str:
        return " ".join(" ".join(self.sections.get(name, ())).split())

    def _blocks(self, name: str) -> Iterator[str]:
        """Lines of a section that are indented least, each with what belongs to it."""
        lines = [line for line in self.sections.get(name, ()) if line.strip()]
        indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
        block: list[str] = []
        for line in lines:
            if len(line) - len(line.lstrip()) == indent and block:
                yield " ".join(block)
                block = []
            block.append(line.strip())
        if block:
            yield " ".join(block)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        entries = {}
        for section in ("Args", "Attributes"):
            for block in self._blocks(section):
                names, type_, text = _split_entry(block)
                entries.update(dict.fromkeys(names, Entry(type_, text)))
        return entries

    @cached_property
    def raised(self) -> set[str]:
        """Under `Raises:`, or in a sentence where `auto_docstring` flattens sections: those of `custom_intro`."""
        named = {block.partition(":")[0].strip("` ") for block in self._blocks("Raises")}
        return named | set(re.findall(r"\bRaises an? `(\w+)`", self.text))


def _split_entry(block: str) -> tuple[list[str], str, str]:
    """Names, type and text of `name, name (type): text`, or of `name: text`."""
    names, opened, rest = block.partition("(")
    if not opened or not re.fullmatch(r"[\w*, ]+ ", names):
        names, _, text = block.partition(":")
        return [name.strip("* ") for name in names.split(",")], "", text.strip()
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    return [name.strip("* ") for name in names.split(",")], rest[: end - 1], rest[end:].lstrip(":. ")


@dataclasses.dataclass(frozen=True)
class Item:
    """A public object, found in `module`; `node` is its source."""

    name: str
    kind: str  # class, function, method, property, override, constant
    module: types.ModuleType
    value: object
    node: ast.AST | None
    owner: ast.ClassDef | None = None

    @property
    def docstring(self) -> Docstring:
        return Docstring(getattr(self.value, "__doc__", None))


def public_items(package: types.ModuleType) -> list[Item]:
    """All public objects of a package and of its modules, each once."""
    items: dict[str, Item] = {}
    for module in modules_of(package):
        for name in public_names(module):
            value = getattr(module, name)
            place = inspect.getmodule(value) if inspect.isclass(value) or is_function(value) else module
            if place is None or not place.__name__.startswith(package.__name__):
                place = module
            for item in _items_of(f"{place.__name__}.{name}", place, value, package.__name__):
                items.setdefault(item.name, item)
    return list(items.values())


def modules_of(package: types.ModuleType) -> Iterator[types.ModuleType]:
    """A package and all of its modules, or a module alone."""
    yield package
    for info in pkgutil.walk_packages(getattr(package, "__path__", ()), f"{package.__name__}."):
        try:
            yield importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in OPTIONAL:
                raise


def public_names(module: types.ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("__")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        if inspect.isclass(value) or is_function(value)
    ]


def is_function(value: object) -> bool:
    """Whether a value is a function, or a decorated one."""
    return callable(value) and not inspect.isclass(value) and inspect.isfunction(inspect.unwrap(value))


def _items_of(name: str, module: types.ModuleType, value: object, package: str) -> Iterator[Item]:
    if inspect.isclass(value) and value.__module__.startswith(package):
        yield Item(name, "class", module, value, class_node(value))
        yield from _members(value, package)
    elif is_function(value):
        yield Item(name, "function", module, value, source_nodes(module).get(value.__qualname__))
    elif not inspect.isclass(value):
        yield Item(name, "constant", module, value, None)


def _members(cls: type, package: str) -> Iterator[Item]:
    for index, base in enumerate(cls.__mro__):
        if not base.__module__.startswith(package):
            continue
        for name, value in vars(base).items():
            function = underlying(value)
            if name.startswith("_") or not is_function(function):
                continue
            if function.__module__ != base.__module__ and not hasattr(function, "__wrapped__"):
                continue  # made by a decorator of the class, such as `strict`
            node = source_nodes(sys.modules[base.__module__]).get(f"{base.__qualname__}.{name}")
            if node is None:
                continue
            kind = "property" if isinstance(value, (property, cached_property)) else "method"
            others = [vars(other).get(name) for other in cls.__mro__[index + 1 :] if _is_foreign(other, package)]
            if is_documented_there(function, [other for other in others if other is not None]):
                kind = "override"
            place = sys.modules[base.__module__]
            yield Item(f"{base.__module__}.{base.__qualname__}.{name}", kind, place, function, node, class_node(base))


def underlying(member: object) -> object:
    """The function of a property, of a class method or of a static one."""
    if isinstance(member, property):
        return member.fget
    return getattr(member, "func" if isinstance(member, cached_property) else "__func__", member)


def _is_foreign(cls: type, package: str) -> bool:
    return cls is not object and not cls.__module__.startswith(package)


def is_documented_there(function: object, others: list[object]) -> bool:
    """Whether the method that this one overrides is documented, and has all of its parameters."""
    if not others:
        return False
    base = underlying(others[0])
    if not callable(base) or not getattr(base, "__doc__", None):
        return not callable(base)  # a class attribute, such as `model_input_names`, that is a property here
    return named_parameters(function) <= named_parameters(base)


def named_parameters(function: object) -> set[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind not in variadic} - {"self", "cls"}


@cache
def source_nodes(module: types.ModuleType) -> dict[str, ast.AST]:
    """Classes and functions of a module's source by their qualified names."""
    nodes: dict[str, ast.AST] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                # A setter has its property's name.
                nodes.setdefault(f"{prefix}{child.name}", child)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.If, ast.Try)):
                visit(child, prefix)

    visit(ast.parse(inspect.getsource(module)), "")
    return nodes


def class_node(cls: type) -> ast.ClassDef | None:
    return source_nodes(sys.modules[cls.__module__]).get(cls.__qualname__)  # type: ignore[return-value]


def parameters_of(item: Item) -> dict[str, str]:
    """Name and annotation, as text, of what must be described."""
    if item.kind != "class":
        return _parameters(item.node)
    cls, package = item.value, item.module.__name__.partition(".")[0]
    own = [base for base in cls.__mro__ if base.__module__.startswith(package) and class_node(base) is not None]
    if _has_fields(cls):
        return {name: text for base in reversed(own) for name, text in _fields(class_node(base)).items()}
    for base in own:
        for child in class_node(base).body:
            if isinstance(child, ast.FunctionDef) and child.name == "__init__":
                keywords = _keywords(sys.modules[base.__module__], child.args.kwarg) if child.args.kwarg else {}
                return keywords | _parameters(child)
    return {}


def _has_fields(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) or hasattr(cls, "_fields") or hasattr(cls, "__required_keys__")


def _fields(node: ast.ClassDef) -> dict[str, str]:
    fields = {}
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            annotation = ast.unparse(child.annotation)
            if not child.target.id.startswith("_") and "ClassVar" not in annotation:
                fields[child.target.id] = annotation
    return fields


def _keywords(module: types.ModuleType, kwarg: ast.arg) -> dict[str, str]:
    """Fields of the package's own TypedDict in `**kwargs: Unpack[...]`."""
    match = re.fullmatch(r"Unpack\[(\w+)\]", ast.unparse(kwarg.annotation) if kwarg.annotation else "")
    if match is None:
        return {}
    typed_dict = getattr(module, match[1])
    fields: dict[str, str] = {}
    for base in (typed_dict, *getattr(typed_dict, "__orig_bases__", ())):
        if inspect.isclass(base) and base.__module__.startswith(module.__name__.partition(".")[0]):
            fields |= _fields(class_node(base))
    return fields


def _parameters(node: ast.AST | None) -> dict[str, str]:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return {}
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return {
        argument.arg: ast.unparse(argument.annotation) if argument.annotation else ""
        for argument in arguments
        if argument.arg not in ("self", "cls") and not argument.arg.startswith("_")
    }


def raised_by(item: Item) -> set[str]:
    """Exceptions that the object's source raises, by itself or in a private helper of its module that it calls."""
    nodes, owner = source_nodes(item.module), item.owner
    if item.kind == "class":
        owner = item.node
        starts = [child for child in owner.body if getattr(child, "name", "") in ("__init__", "__post_init__")]
    else:
        starts = [item.node]
    raised: set[str] = set()
    for start in starts:
        raised |= _raised(start)
        for called in _called(start):
            helper = nodes.get(called)
            if helper is None and owner is not None:
                helper = next((child for child in owner.body if getattr(child, "name", "") == called), None)
            if isinstance(helper, ast.FunctionDef) and called.startswith("_") and not called.startswith("__"):
                raised |= _raised(helper)
    return raised


def _raised(node: ast.AST) -> set[str]:
    names = set()
    for child, caught in _walk(node, ()):
        if isinstance(child, ast.Raise) and child.exc is not None:
            error = child.exc.func if isinstance(child.exc, ast.Call) else child.exc
            name = ast.unparse(error).rpartition(".")[2]
            if name[:1].isupper() and name not in caught and "Exception" not in caught:
                names.add(name)
    return names


def _called(node: ast.AST) -> set[str]:
    calls = [child.func for child in ast.walk(node) if isinstance(child, ast.Call)]
    return {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}


def _walk(node: ast.AST, caught: tuple[str, ...]) -> Iterator[tuple[ast.AST, tuple[str, ...]]]:
    """All nodes, each with the names of what handlers around it catch."""
    yield node, caught
    if isinstance(node, ast.Try):
        handled = [ast.unparse(handler.type) for handler in node.handlers if handler.type is not None]
        inner = (*caught, *re.findall(r"\w+", " ".join(handled)))
        for child in node.body:
            yield from _walk(child, inner)
        for child in (*node.handlers, *node.orelse, *node.finalbody):
            yield from _walk(child, caught)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, caught)


@cache
def standard_texts() -> set[str]:
    """What transformers says of parameters that all of its models have."""
    library = importlib.import_module("transformers.utils.auto_docstring")
    texts = library.get_args_doc_from_source([getattr(library, name) for name in STANDARD_SOURCES])
    return {" ".join(entry["description"].split()) for entry in texts.values() if isinstance(entry, dict)}


def check(item: Item, described: dict[str, Entry] | None = None) -> tuple[list[str], Counter]:
    """Findings, and how many things were looked at for each rule.

    `described` are parameters that another object's docstring describes, which this one's refers to.
    """
    findings: list[str] = []
    counts: Counter = Counter()

    def expect(rule: str, holds: bool, message: str) -> None:
        counts[rule] += 1
        if not holds:
            findings.append(f"{item.name}: {message}")

    if item.kind == "constant":
        expect("constants", _is_commented(item), "a constant needs a comment above it, or a string below it.")
        return findings, counts
    docstring = item.docstring
    expected = raised_by(item)
    if item.kind == "override" and not docstring.text:
        for error in sorted(expected):
            expect(
                "raises",
                False,
                f"raises {error}, of which what it overrides does not tell: say when, under `Raises:`.",
            )
        return findings, counts
    summary = docstring.summary
    expect("summaries", len(summary.split()) >= 3, "has no summary, a sentence that says what it is or does.")
    expect("summaries", not PLACEHOLDER.search(docstring.text), "has a placeholder of transformers' templates in it.")
    for error in sorted(expected):
        expect("raises", error in docstring.raised, f"raises {error}: say when, under `Raises:`.")
    if item.kind in ("class", "function"):
        found = SOURCE.search(docstring.text) or SOURCE.search(inspect.cleandoc(item.module.__doc__ or ""))
        text = found["text"] if found else ""
        known = bool(KNOWN_SOURCE.search(text))
        expect("sources", known, "has no `Source: ...`, in its docstring or its module's (paper's section, original "
               "code, counterpart in a library, or `no counterpart` and why).")  # fmt: skip
    if item.kind == "override":
        return findings, counts
    entries = docstring.entries | (described or {})
    for name, annotation in parameters_of(item).items():
        _check_parameter(name, annotation, entries.get(name), expect)
    if item.kind in ("function", "method", "property"):
        _check_returned(item, docstring, expect)
    return findings, counts


def referred_entries(item: Item, items: list[Item]) -> dict[str, Entry]:
    """What the docstrings describe that one refers to by "arguments are as in [`Name`]"."""
    entries: dict[str, Entry] = {}
    for name in re.findall(r"arguments\s+are\s+as\s+in\s+\[`([\w.]+)`\]", item.docstring.text):
        for other in items:
            if other.name.endswith(f".{name}"):
                entries |= other.docstring.entries
    return entries


def _check_parameter(name: str, annotation: str, entry: Entry | None, expect) -> None:
    expect("parameters", entry is not None, f"`{name}` is not described under `Args:` (or `Attributes:`).")
    if entry is None:
        return
    expect("types", "`" in entry.type, f"`{name}` has no type in backticks: `{name} (`type`): text`.")
    expect("descriptions", len(entry.text.split()) >= 2, f"`{name}` has a type, but no description.")
    is_standard = " ".join(entry.text.split()) in standard_texts()
    if TENSOR.search(f"{annotation} {entry.type}") and "Callable" not in annotation:
        expect("shapes", is_standard or bool(SHAPE.search(entry.all)), f"`{name}` has no shape: of shape `(...)`.")
        expect("dtypes", is_standard or bool(DTYPE.search(entry.all)), f"`{name}` has no dtype.")
    if MEASURE.search(name) and name not in NO_MEASURE and NUMBER.search(f"{annotation} {entry.type}"):
        expect("units", bool(UNIT.search(entry.text)), f"`{name}` has no unit (pixels, patches, tokens, bytes, ...).")


def _check_returned(item: Item, docstring: Docstring, expect) -> None:
    annotation = ast.unparse(item.node.returns) if item.node.returns else ""
    if not annotation:
        own = [child for child in ast.walk(item.node) if isinstance(child, (ast.Return, ast.Yield))]
        if not any(child.value is not None for child in own):
            return
    if annotation in ("None", "NoReturn", "Iterator[None]"):
        return
    text = docstring.section("Returns") + docstring.section("Yields")
    is_property = item.kind == "property"
    is_predicate = annotation == "bool" and docstring.summary.startswith("Whether")
    if not is_property and not is_predicate:
        expect(
            "returns", "`" in text, "returns something: say its type, in backticks, and what it is under `Returns:`."
        )
    text = docstring.text if is_property else text
    if TENSOR.search(annotation):
        expect("shapes", bool(SHAPE.search(text)), "returns a tensor or array, but no shape of it is said.")
        expect("dtypes", bool(DTYPE.search(text)), "returns a tensor or array, but no dtype of it is said.")
    name = item.name.rpartition(".")[2]
    if MEASURE.search(name) and NUMBER.search(annotation):
        expect("units", bool(UNIT.search(docstring.text)), "returns a measure, but no unit of it is said.")


def _is_commented(item: Item) -> bool:
    """Whether a constant has a comment above it or a string below it, where it is assigned."""
    name, module = item.name.rpartition(".")[2], item.module
    lines = inspect.getsource(module).splitlines()
    body = ast.parse("\n".join(lines)).body
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            place = importlib.import_module("." * node.level + (node.module or ""), module.__package__)
            return _is_commented(dataclasses.replace(item, module=place))
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if name in [ast.unparse(target) for target in targets if target is not None]:
            is_string = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            return is_string or lines[node.lineno - 2].startswith("#")
    return False


def check_package(package: types.ModuleType) -> tuple[list[str], Counter]:
    findings: list[str] = []
    counts: Counter = Counter()
    items = public_items(package)
    for item in items:
        counts[item.kind] += 1
        found, looked_at = check(item, referred_entries(item, items))
        findings += found
        counts += looked_at
    return findings, counts


if __name__ == "__main__":
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    all_findings, all_counts = check_package(importlib.import_module(PACKAGE))
    print("\n".join(finding for finding in all_findings if part in finding))
    print(len(all_findings), "findings;", dict(all_counts))
