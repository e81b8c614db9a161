"""Answers to conversations about images, piece by piece, and pictures of what the model did with them.

Nothing here knows the page: conversations come as messages of transformers' chat templates.

Source: no counterpart, the original codes' pages were scripts of their own; streaming is transformers'
`TextIteratorStreamer`.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from transformers import TextIteratorStreamer

from ..generating import decoding_config, images_of, prepare_inputs
from ..inspection.routing import RoutingRecorder
from ..llava_uhd.pixels_llava_uhd import decoding, open_image, upright
from .panels import ROUTING_PENDING, routing_panel, views_panel


class Update(NamedTuple):
    """What is new on the page; `None` is what stays as it is.

    Attributes:
        text (`str`): The answer as far as it goes.
        views (`str`, *optional*): HTML with the views of every image.
        routing (`str`, *optional*): HTML with the routing of the answer.
    """

    text: str
    views: str | None = None
    routing: str | None = None


class Chat:
    """A model that answers one question at a time.

    [`RoutingRecorder`] sees every pass of the model, whoever asked for it. So a lock keeps other questions waiting
    until an answer is complete and its routing is drawn. The next one forgets the recording.

    Args:
        model (`PreTrainedModel`): A model of one of the families.
        processor (`ProcessorMixin`): Its processor.
    """

    def __init__(self, model: Any, processor: Any):
        self.model = model.eval()
        self.processor = processor
        self.recorder = _find_recorder(model, processor)
        self._lock = threading.Lock()
        self._generation: _Generation | None = None

    def answer(self, messages: list[dict[str, Any]], max_new_tokens: int, temperature: float) -> Iterator[Update]:
        """Streams the answer to a conversation. A closed iterator stops the model at its next token.

        Args:
            messages (`list[dict]`): Of roles and contents, as chat templates take them; images are PIL images.
            max_new_tokens (`int`): Longest answer in tokens.
            temperature (`float`): Of sampling; 0 decodes greedily.

        Yields:
            `Update`: The answer as far as it goes, and what is new beside it.

        Raises:
            ValueError: if the messages cannot be processed.
        """
        images = images_of(messages)
        with self._lock:
            self.stop()  # one whose user has left may still be at its last token
            inputs = prepare_inputs(self.model, self.processor, messages)
            config = decoding_config(self.model, max_new_tokens, temperature)
            generation = _Generation(self.model, self.processor, self.recorder, inputs, config)
            self._generation = generation
            try:
                # Views are drawn while the model reads them; those of images that were there before are on the page.
                views = views_panel(images, self.processor) if images_of(messages[-1:]) else None
                yield Update("", views, ROUTING_PENDING if self.recorder else None)
                text = ""
                for piece in generation.pieces():
                    text += piece
                    yield Update(text.strip())
                if self.recorder is not None:
                    yield Update(text.strip(), routing=routing_panel(images, self.recorder))
            finally:
                generation.stopped.set()

    def stop(self) -> None:
        """Ends a generation that runs, at its next token, and forgets it and its recording."""
        if self._generation is not None:
            self._generation.stopped.set()
            self._generation.join()
            self._generation = None
        if self.recorder is not None:
            self.recorder.clear()


class _Generation(threading.Thread):
    """A `generate` that has begun, in a thread of its own."""

    def __init__(self, model: Any, processor: Any, recorder: RoutingRecorder | None, inputs: Any, config: Any):
        super().__init__(name="generation")
        self.stopped = threading.Event()
        self._streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._arguments = {**inputs, "generation_config": config, "streamer": self._streamer}
        self._model, self._recorder = model, recorder
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with self._recorder or nullcontext():
                self._model.generate(**self._arguments, stopping_criteria=[self._ends])
        except Exception as error:  # of any kind: who waits for the text is to raise it
            self._error = error
            self._streamer.end()

    def _ends(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)

    def pieces(self) -> Iterator[str]:
        """The new text, each time that there is some; at its end the error that ended it, if one did."""
        yield from filter(None, self._streamer)
        self.join()
        if self._error is not None:
            raise self._error


def _find_recorder(model: Any, processor: Any) -> RoutingRecorder | None:
    """None for a model without routers."""
    if any(isinstance(module, RoutingRecorder.router_classes) for module in model.modules()):
        return RoutingRecorder(model, processor)
    return None


def read_image(path: str | os.PathLike) -> Image.Image:
    """The image in an uploaded file, decoded and upright.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        `PIL.Image.Image`: Of the mode that it has in the file.

    Raises:
        ValueError: if there is no image in it, it is broken, or it has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    name = Path(path).name
    try:
        with decoding():
            return upright(open_image(Path(path)))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image, or of a kind that is not known here. Add a PNG or JPEG.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"The image {name} cannot be read: {error}") from error


__all__ = ["Chat", "Update", "read_image"]
