# Copyright 2026 The llava-family authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Files of checkpoints are untrusted input: whatever they make code stumble over becomes one error that names them.

Source: no counterpart in the original code or in transformers, which trust a checkpoint's files.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError


# What values of a wrong type, size or structure do to code that expects others. An error of the machine, such as one
# of memory, is none of them.
MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    StrictDataclassError,
    TypeError,
)


class InvalidCheckpointError(ValueError, RuntimeError):
    """A `ValueError`, as of any bad input; also a `RuntimeError`, as transformers raises where weights do not fit."""


@contextmanager
def loading(name: str | os.PathLike) -> Iterator[None]:
    """
    Makes an `InvalidCheckpointError` of what malformed files raise in transformers, in tokenizers and here.

    Args:
        name (`str` or `os.PathLike`): What is loaded, for the message.

    Raises:
        InvalidCheckpointError: in place of an exception that tells of malformed content. Others pass unchanged.
    """
    try:
        yield
    except Exception as error:
        # tokenizers raises plain `Exception`s.
        if not isinstance(error, MALFORMED) and type(error) is not Exception:
            raise
        raise InvalidCheckpointError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a file that must hold one JSON object.

    Args:
        path (`str` or `os.PathLike`): The file, in UTF-8.

    Returns:
        `dict[str, Any]`: The object.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no JSON, or JSON of another kind.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}.")
    return content


__all__ = ["InvalidCheckpointError", "loading", "read_json_object"]
