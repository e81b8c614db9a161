"""Docstrings as Python has them: transformers' `auto_docstring` writes most of them while classes are made."""

import inspect
import re
from importlib import import_module

import griffe

import llava_family


TRANSFORMERS = "https://huggingface.co/docs/transformers/en/"
ITEM = re.compile(r"^( +\w+ \()(.+)(\):)$", flags=re.MULTILINE)


def as_markdown(text: str) -> str:
    """What only the builder of transformers' documentation understands becomes Markdown."""
    text = re.sub(r"<Tip.*?</Tip>\n*", "", text, flags=re.DOTALL)
    text = text.replace("](../", f"]({TRANSFORMERS}")
    text = re.sub(r"\[`~?(?:[\w.]+\.)?(\w+(?:\.\w+)?)`\](?![(\[])", reference, text)
    # A section begins behind an empty line, and types are code without backticks.
    text = re.sub(r"(?<=[^\n]\n)(?=(?:Args|Parameters|Returns|Raises):\n)", "\n", text)
    return ITEM.sub(type_of, text)


def type_of(match: re.Match) -> str:
    kind = match[2].replace(", *kwargs*", "")
    return match[1] + re.sub(r"\[`(\w+)`\]\[[\w.]+\]|[`*~]", lambda part: part[1] or "", kind) + match[3]


def reference(match: re.Match) -> str:
    name = match[1]
    return f"[`{name}`][llava_family.{name}]" if name in llava_family.__all__ else f"`{name}`"


class RuntimeDocstrings(griffe.Extension):
    """Replaces the docstrings of the source by those that the objects have once they are imported."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if not (obj.is_class or obj.is_function):
            return
        try:
            value = import_module(obj.module.path)
            for name in obj.path.removeprefix(f"{obj.module.path}.").split("."):
                value = inspect.getattr_static(value, name)
        except (AttributeError, ImportError):
            return
        if getattr(value, "__doc__", None):
            text = as_markdown(inspect.cleandoc(value.__doc__))
            # No warnings: a configuration's parameters are not in a signature.
            obj.docstring = griffe.Docstring(text, parent=obj, parser="google", parser_options={"warnings": False})
