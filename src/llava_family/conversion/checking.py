"""Checks of what a checkpoint says about itself, before any of it is used: names, places, JSON.

Design choices:
- What nobody needs is refused, not repaired: a name that looks like another one on the screen, a file that lies
  elsewhere, a key that two parsers read differently.
- Sizes are limited before something is read, so that a claim alone costs neither memory nor time.

Source: no counterpart: transformers and the original codes trust a checkpoint's files. SECURITY.md says why.
"""

import json
import os
import stat
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any


MAX_NAME_LENGTH = 400
# Real ones: an index of 13B has 60 kB, a tokenizer.json 10 MB.
MAX_JSON_BYTES = 50_000_000
MAX_SETTINGS_BYTES = 200_000_000
# What configurations, tokenizers and processors are read from
SETTINGS_PATTERNS = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")

_FILE_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_tensor_name(name: str, place: object) -> None:
    """Checks that a tensor is called what a module of torch is called: printable ASCII without blanks and slashes.

    Args:
        name (`str`): The tensor's name.
        place (`object`): Where it was found, for the message.

    Raises:
        ValueError: if it is called otherwise.
    """
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(
            f"{place} has a tensor with a name of {len(name)} characters, {name[:40]!a}..., expected at most "
            f"{MAX_NAME_LENGTH}. Do not trust this checkpoint."
        )
    if not name or not name.isascii() or not name.isprintable() or set(name) & set(" /\\"):
        raise ValueError(
            f"{place} has a tensor called {name!a}, expected letters, digits and punctuation of ASCII without "
            "blanks and slashes: other characters can look like these. Do not trust this checkpoint."
        )


def file_kind(path: Path) -> str:
    """Says what there is instead of a file, for messages.

    Args:
        path (`Path`): Where the file should be.

    Returns:
        `str`: Such as "a folder" or "missing".
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a link to nowhere" if path.is_symlink() else "missing"
    return next((kind for matches, kind in _FILE_KINDS if matches(mode)), "a file")


def checked_path(folder: Path, file: str, named_in: Path | None = None) -> Path:
    """Finds a file inside a folder, and nowhere else.

    Args:
        folder (`Path`): The folder.
        file (`str`): Name of the file.
        named_in (`Path`, *optional*): The file that names it, for the message.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: if `file` is no plain name, no file or leads elsewhere.
    """
    shown = file if file.isascii() and file.isprintable() and len(file) < 200 else file[:200]
    source = f"{named_in} names the file {shown!a}" if named_in else f"The checkpoint {folder} has {shown!r}"
    plain = file == os.path.basename(file) and "\\" not in file and file not in ("", ".", "..")
    if not plain or not file.isascii() or not file.isprintable() or len(file) > 255:
        raise ValueError(f"{source}, expected a plain file name inside the folder. Do not trust this checkpoint.")
    path = folder / file
    if not path.is_file():
        kind = file_kind(path)
        found = "there is no such file" if kind == "missing" else f"there is no such file: it is {kind}"
        raise ValueError(f"{source}, but {found}. Download the checkpoint again, completely.")
    check_link(path, source)
    return path


def check_link(path: Path, source: str) -> None:
    """Checks that a link stays inside its folder, or inside the Hub's cache.

    Args:
        path (`Path`): A file, or a link to one.
        source (`str`): What it is, for the message.

    Raises:
        ValueError: if it leads out.
    """
    root = path.parent.resolve()
    # The Hub's cache keeps files as `blobs/<hash>` and links to them from `snapshots/<revision>`.
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{source}, but it is a link to {path.resolve()}, outside the folder. If you trust that file, move or "
            "copy it here."
        )


def settings_files(folder: Path, patterns: Iterable[str] = SETTINGS_PATTERNS) -> list[Path]:
    """The files in `folder` that settings are read from.

    Args:
        folder (`Path`): The folder.
        patterns (`Iterable[str]`, *optional*): Names of the files; those of configurations, processors and tokenizers
            by default.

    Returns:
        `list[Path]`: The files, sorted by name.

    Raises:
        ValueError: if one of them leads out of the folder, is larger than 200 MB, or is no file. What a link leads to
            would otherwise end up in the output, and with it on the Hub.
    """
    found = []
    for path in sorted(folder.iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in patterns):
            continue
        if not path.is_file():
            raise ValueError(f"{path} must be a file, but is {file_kind(path)}. Download it again.")
        check_link(path, f"The checkpoint {folder} has {path.name!r}")
        if path.stat().st_size > MAX_SETTINGS_BYTES:
            raise ValueError(
                f"{path} must be a file of settings, but has {path.stat().st_size:,} bytes, expected at most "
                f"{MAX_SETTINGS_BYTES:,}. Download it again."
            )
        found.append(path)
    return found


def parse_json(text: str | bytes) -> Any:
    """Reads a JSON text, stricter than `json.loads`.

    Args:
        text (`str` or `bytes`): The text.

    Returns:
        `Any`: Its value.

    Raises:
        ValueError: if it is no JSON, is nested too deeply or names something twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, kind: str) -> Any:
    """Reads a JSON file, stricter than `json.load`.

    Args:
        path (`Path`): The file.
        kind (`str`): What it should be, for the message.

    Returns:
        `Any`: Its value.

    Raises:
        ValueError: if it is no JSON, larger than 50 MB, or names something twice.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be {kind}, but is {file_kind(path)}.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} must be {kind}, but has {path.stat().st_size:,} bytes, expected at most {MAX_JSON_BYTES:,}. "
            "Download it again."
        )
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be {kind}, but is no JSON: {error}. Download it again.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names: set[str] = set()
        twice: set[str] = set()
        for name, _ in pairs:
            (twice if name in names else names).add(name)
        raise ValueError(f"{some_names(twice)} named more than once")
    return found


def some_names(names: set[str], limit: int = 5) -> str:
    """Says how many names there are, and the first of them, safe to print.

    Args:
        names (`set[str]`): The names.
        limit (`int`, *optional*, defaults to 5): How many of them to say.

    Returns:
        `str`: The text.
    """
    shown = ", ".join(name if name.isascii() and name.isprintable() else ascii(name) for name in sorted(names)[:limit])
    return f"{len(names)} tensors" + (f" ({shown}{', ...' if len(names) > limit else ''})" if names else "")
