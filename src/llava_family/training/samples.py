"""Samples of LLaVA's data sets and of transformers' chats: reading them, and telling the bad ones.

Source: the JSON format of LLaVA's data sets, and the chat format of transformers.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


IMAGE_TOKEN = "<image>"
# In LLaVA's format, and in transformers'
LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
CHAT_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
# What LLaVA adds to the words of a conversation for an image, to group conversations of similar length
WORDS_PER_IMAGE = 128


class BadConversationError(ValueError):
    """What is wrong with one sample."""


@dataclass(frozen=True)
class Conversation:
    """A checked sample, whose images are not opened yet.

    Attributes:
        id (`str`): The sample's `id`, or its index.
        messages (`list[dict[str, Any]]`): In transformers' chat format, images in front of their message's text.
        images (`list[Path | Image.Image]`): Files or images, in the order of the messages.
    """

    id: str
    messages: list[dict[str, Any]]
    images: list[Path | Image.Image]

    @property
    def modality_length(self) -> int:
        """Words of the text, and 128 more for every image, as LLaVA counts to group conversations; negative without
        images.
        """
        words = sum(
            len(item["text"].split())
            for message in self.messages
            for item in message["content"]
            if item["type"] == "text"
        )
        return words + WORDS_PER_IMAGE * len(self.images) if self.images else -words


def read_samples(path: str | os.PathLike) -> list[Any]:
    """Reads the samples in a `.json` or `.jsonl` file.

    Args:
        path (`str` or `os.PathLike`): The file, in UTF-8.

    Returns:
        `list[Any]`: The samples, not checked.

    Raises:
        ValueError: if there is no such file, or it holds no list; with the line of a syntax error.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        raise ValueError(f"Samples must be in a .json or .jsonl file, but {str(path)!r} is none.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    if path.suffix == ".json":
        samples = _parse_json(text, str(path))
        if not isinstance(samples, list):
            raise ValueError(f"{path} must hold a list of samples, but holds a {type(samples).__name__}.")
        return samples
    # Not `splitlines`: a line separator of Unicode is legal within a JSON string.
    lines = enumerate(text.split("\n"), start=1)
    return [_parse_json(line, f"line {number} of {path}") for number, line in lines if line.strip()]


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def id_of(sample: Any, index: int) -> str:
    """Finds the `id` of a sample, which may be no dictionary at all.

    Args:
        sample (`Any`): The sample.
        index (`int`): Its place in the source.

    Returns:
        `str`: Its `id`, or its index where it has none.
    """
    given = sample.get("id") if isinstance(sample, dict) else None
    return str(index if given is None else given)


def parse_sample(sample: Any, index: int, image_folder: Path | None) -> Conversation:
    """Checks the structure of a sample, and brings both formats into one.

    Args:
        sample (`Any`): The sample.
        index (`int`): Its place in the source.
        image_folder (`Path`, *optional*): Where the files of images lie; paths that lead out of it are refused.

    Returns:
        `Conversation`: The sample in transformers' chat format.

    Raises:
        BadConversationError: with what is wrong.
    """
    if not isinstance(sample, dict):
        raise BadConversationError(f"it must be a dictionary, but is a {type(sample).__name__}.")
    formats = [name for name in ("conversations", "messages") if sample.get(name) is not None]
    if len(formats) != 1:
        raise BadConversationError(
            f"it must have either `conversations` or `messages`, but has the keys {list(sample)}."
        )
    turns = sample[formats[0]]
    if not isinstance(turns, list) or not turns:
        raise BadConversationError(f"`{formats[0]}` must be a list with messages, but is {_shortened(turns)}.")
    parse_turn = _parse_llava_turn if formats[0] == "conversations" else _parse_chat_turn
    messages = [_message(*parse_turn(turn, number), number) for number, turn in enumerate(turns)]
    _check_roles([message["role"] for message in messages])
    images = [_locate(image, image_folder) for image in _images_of(sample)]
    asked = sum(item["type"] == "image" for message in messages for item in message["content"])
    if asked != len(images):
        raise BadConversationError(f"its text has {asked} {IMAGE_TOKEN}, but it has {len(images)} images.")
    return Conversation(id_of(sample, index), messages, images)


def _parse_llava_turn(turn: Any, number: int) -> tuple[str, int, str]:
    """Role, number of images and text of a turn."""
    if not isinstance(turn, dict) or not {"from", "value"} <= set(turn):
        raise BadConversationError(
            f"turn {number} must be a dictionary with `from` and `value`, but is {_shortened(turn)}."
        )
    return _role(turn["from"], LLAVA_ROLES, number), *_split(turn["value"], number)


def _parse_chat_turn(turn: Any, number: int) -> tuple[str, int, str]:
    if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
        raise BadConversationError(
            f"turn {number} must be a dictionary with `role` and `content`, but is {_shortened(turn)}."
        )
    role, content = _role(turn["role"], CHAT_ROLES, number), turn["content"]
    if not isinstance(content, list):
        return role, *_split(content, number)
    num_images, texts = 0, list[str]()
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        # `datasets` fills the keys that only other items have with None.
        if kind == "image" and not any(item.get(key) is not None for key in ("image", "path", "url", "base64")):
            num_images += 1
        elif kind == "text":
            count, text = _split(item.get("text"), number)
            num_images, texts = num_images + count, [*texts, text]
        else:
            raise BadConversationError(
                f'turn {number} must be made of {{"type": "text", "text": ...}} and {{"type": "image"}}, with the '
                f"images in the sample's `images`, but has {_shortened(item)}."
            )
    return role, num_images, "".join(texts)


def _role(role: Any, known: dict[str, str], number: int) -> str:
    if not isinstance(role, str) or role not in known:
        raise BadConversationError(f"turn {number} must be by one of {list(known)}, but is by {_shortened(role)}.")
    return known[role]


def _split(text: Any, number: int) -> tuple[int, str]:
    """How many images a text asks for, and the text without them."""
    if not isinstance(text, str):
        raise BadConversationError(f"the text of turn {number} must be a string, but is {_shortened(text)}.")
    num_images = text.count(IMAGE_TOKEN)
    # Where there is no image, the originals leave the text's outer whitespace alone.
    return num_images, text.replace(IMAGE_TOKEN, "").strip() if num_images else text


def _message(role: str, num_images: int, text: str, number: int) -> dict[str, Any]:
    if num_images and role != "user":
        raise BadConversationError(
            f"turn {number} has {IMAGE_TOKEN}, but is by the {role}: only the user shows images."
        )
    if not text.strip() and not num_images:
        raise BadConversationError(f"turn {number} is empty.")
    # transformers drops None, and a template renders what is there.
    texts = [{"type": "text", "text": text}] if text else []
    return {"role": role, "content": [{"type": "image"}] * num_images + texts}


def _check_roles(roles: list[str]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * ((len(turns) + 1) // 2)
    if not turns or turns != expected:
        raise BadConversationError(
            "questions and answers must alternate, begin with a question and end with an answer, behind at most one "
            f"system message, but the roles are {_shortened(roles)}."
        )


def _images_of(sample: dict[str, Any]) -> list[Any]:
    given = [sample[name] for name in ("image", "images") if sample.get(name) is not None]
    if len(given) > 1:
        raise BadConversationError("it must have either `image` or `images`, but has both.")
    images = given[0] if given else []
    return images if isinstance(images, list) else [images]


def _locate(image: Any, folder: Path | None) -> Path | Image.Image:
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, os.PathLike)) or not str(image):
        raise BadConversationError(f"an image must be a path or a PIL image, but is {_shortened(image)}.")
    if folder is None:
        return Path(image)
    path = Path(os.path.normpath(image))
    # Data from elsewhere could otherwise name any file of this machine.
    if path.is_absolute() or path.parts[:1] == ("..",):
        raise BadConversationError(
            f"the image {str(image)!r} is not in the image folder: its path must be relative to it."
        )
    return folder / path


def check_image(image: Path | Image.Image) -> None:
    """Checks that an image exists and begins as an image does.

    Args:
        image (`Path` or `Image.Image`): A file, or an image, which is right.

    Raises:
        BadConversationError: if the file does not exist, or is no image.
    """
    if isinstance(image, Image.Image):
        return
    if not image.is_file():
        raise BadConversationError(f"the image {str(image)!r} does not exist.")
    try:
        Image.open(image).close()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadConversationError(f"the image {str(image)!r} cannot be opened: {error}") from error


def open_image(image: Path | Image.Image) -> Image.Image:
    """Opens an image and brings it to RGB, over white where it is transparent, as the image processors make it.

    Args:
        image (`Path` or `Image.Image`): A file, or an image.

    Returns:
        `Image.Image`: In RGB.

    Raises:
        BadConversationError: if it cannot be read.
    """
    try:
        if not isinstance(image, Image.Image):
            with Image.open(image) as opened:
                opened.load()
                image = opened
        if image.has_transparency_data:
            layers = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadConversationError(f"the image {image!s} cannot be read: {error}") from error


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


__all__ = [
    "BadConversationError",
    "Conversation",
    "check_image",
    "id_of",
    "open_image",
    "parse_sample",
    "read_samples",
]
