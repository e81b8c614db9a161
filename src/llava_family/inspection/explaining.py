"""Explains what becomes of one image: its views, what the language model reads of it, and what that costs.

`explain` of the three processors and the command `llava-family explain` give an [`ImageExplanation`]. No weights are
read, and no model is run.

Source: no counterpart, transformers' processors do not explain; the slices are those of the LLaVA-UHD paper, sections
3.2 and 3.4.
"""

import math
import os
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from html import escape
from io import StringIO
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..llava_uhd.image_processing_pil_llava_uhd import LlavaUhdImageProcessorPil
from ..llava_uhd.slicing_llava_uhd import SlicePlan
from .routing_plots import square_view
from .slicing_plots import draw_slices, draw_square


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group

# Names of models by the classes of their processors, which may be of an exported repository and so not this package's
MODEL_NAMES = {"LlavaUhdProcessor": "LLaVA-UHD", "MoeLlavaProcessor": "MoE-LLaVA", "LlavaMoleProcessor": "LLaVA-MoLE"}
TEXT_MODELS = ("7B", "13B")
# The paper's resampler is the perceiver with 64 queries, the released one is spatial with 144.
PERCEIVER_QUERIES = 64
BASELINE = "LLaVA-1.5"
COMMA, NEWLINE = ",", "↵"
NOTE = f"TFLOPs: prefill of the image alone, with dense Vicuna 1.5 text models of 7B and 13B; ratio: to {BASELINE}."


@dataclass(frozen=True)
class ModelCost:
    """What one model makes of an image, and what that costs.

    Attributes:
        model (`str`): Name of the model.
        num_views (`int`): Images that its vision tower sees.
        num_tokens (`int`): Positions that the image takes in the text model's sequence.
        flops (`dict[str, int]`): FLOPs by text model, `"7B"` and `"13B"`, as [`~inspection.flops.FlopReport.total`]
            counts them. Empty where they are not known.
        ratios (`dict[str, float]`): `flops` divided by those of LLaVA-1.5, by text model.
    """

    model: str
    num_views: int
    num_tokens: int
    flops: dict[str, int]
    ratios: dict[str, float]


@dataclass(frozen=True, eq=False)
class ImageExplanation:
    """What a processor makes of one image. All sizes are `(width, height)` in pixels.

    `print` it for tables, or end a notebook's cell with it; `plot` draws it.

    Attributes:
        model (`str`): Name of the model family.
        image (`PIL.Image.Image`): The image as it is shown: upright, RGB.
        plan (`SlicePlan`, *optional*): How it is cut into views; `None` under the vision encoding `"square"`.
        square_view (`PIL.Image.Image`, *optional*): What the vision tower sees under `"square"`, otherwise `None`.
        tokens_per_view (`int`): Features of a view.
        num_boundaries (`int`): Learned embeddings around an image, each a token: 2 for LLaVA-MoLE, otherwise 0.
        prompt_layout (`str`, *optional*): The whole prompt written as `layout` is, where `explain` was given one.
    """

    model: str
    image: Image.Image = field(repr=False)
    plan: SlicePlan | None
    square_view: Image.Image | None = field(repr=False)
    tokens_per_view: int
    num_boundaries: int = 0
    prompt_layout: str | None = field(default=None, repr=False)

    @property
    def image_size(self) -> tuple[int, int]:
        """`(width, height)` in pixels of the image as it is shown, before any resizing."""
        return self.image.size

    @property
    def grid(self) -> tuple[int, int]:
        """`(columns, rows)` of slices; `(0, 0)` where the image is not sliced."""
        return (self.plan.columns, self.plan.rows) if self.plan else (0, 0)

    @property
    def slice_size(self) -> tuple[int, int] | None:
        """`(width, height)` in pixels of every slice as the vision tower sees it; `None` where nothing is sliced."""
        return self.plan.slice_size if self.plan else None

    @property
    def overview_size(self) -> tuple[int, int]:
        """`(width, height)` in pixels of the view of the whole image that the vision tower sees, also a square one."""
        return self.plan.overview_size if self.plan else self.square_view.size  # type: ignore[union-attr]

    @property
    def num_views(self) -> int:
        """Images that the vision tower sees: the slices and the overview, or the square view."""
        return self.plan.num_views if self.plan else 1

    @property
    def num_separators(self) -> int:
        """Commas and newlines behind slices, each a token."""
        return self.plan.num_slices if self.plan else 0

    @property
    def num_tokens(self) -> int:
        """Positions that the image takes in the text model's sequence."""
        return self.num_views * self.tokens_per_view + self.num_separators + self.num_boundaries

    @property
    def layout(self) -> str:
        """What the language model reads of the image, such as `"[144] , [144] ↵ [144]"`.

        A number in brackets stands for as many image tokens, `,` and `↵` for the separators (paper, section 3.4).
        LLaVA-MoLE's embeddings for start and end of an image are counted with the first and the last view.
        """
        views = [self.tokens_per_view] * self.num_views
        views[0] += self.num_boundaries // 2
        views[-1] += self.num_boundaries // 2
        columns, rows = self.grid
        separators = ([COMMA] * (columns - 1) + [NEWLINE]) * rows if rows else []
        parts = [part for view, separator in zip(views, separators, strict=False) for part in (f"[{view}]", separator)]
        return " ".join([*parts, f"[{views[-1]}]"])

    @cached_property
    def costs(self) -> tuple[ModelCost, ...]:
        """This model, LLaVA-1.5 and transformers' LLaVA-NeXT on this image, in this order.

        A processor does not know its model, so all three are counted with a dense Vicuna 1.5 as text model, of 7B and
        of 13B. What experts and adapters cost is not in it. Slices are counted with the vision tower of the released
        LLaVA-UHD and its spatial resampler; 64 queries, the paper's number, and such that form no square with a
        perceiver. Square views are counted with CLIP ViT-L, or SigLIP so400m where the number of tokens says so, and
        not at all where it fits neither. [`inspection.flops`](flops.py) says what counts.

        It takes a second or two the first time.
        """
        width, height = self.image_size
        rows: list[tuple[str, dict[str, Any]]] = [
            (self._name, {size: self._count(size) for size in TEXT_MODELS}),
            (BASELINE, {size: _count_in_tree("Llava", size) for size in TEXT_MODELS}),
            ("LLaVA-NeXT", {size: _count_in_tree("LlavaNext", size, width, height) for size in TEXT_MODELS}),
        ]
        baseline = {size: report.total for size, report in rows[1][1].items()}
        costs = []
        for name, reports in rows:
            flops = {size: report.total for size, report in reports.items() if report is not None}
            ratios = {size: count / baseline[size] for size, count in flops.items()}
            report = reports[TEXT_MODELS[0]]
            views, tokens = (report.num_views, report.num_tokens) if report else (self.num_views, self.num_tokens)
            costs.append(ModelCost(name, views, tokens, flops, ratios))
        return tuple(costs)

    @property
    def _name(self) -> str:
        if self.plan is None:
            return f"{self.model} square/{self.tokens_per_view}"
        return f"{self.model} {_resampler_type(self.tokens_per_view)}/{self.tokens_per_view}"

    def _count(self, text_model: str) -> Any:
        if self.plan is not None:
            return _count_sliced(text_model, self.plan, self.tokens_per_view, self.num_boundaries)
        return _count_square(text_model, self.overview_size, self.tokens_per_view, self.num_boundaries)

    def plot(self, path: str | os.PathLike | None = None) -> "Figure":
        """Draws the views over the image: the slices in reading order with their separators, and the overview.

        Args:
            path (`str` or `os.PathLike`, *optional*): PNG file to write.

        Returns:
            `matplotlib.figure.Figure`

        Raises:
            ImportError: if matplotlib is not installed.
        """
        if self.square_view is not None:
            return draw_square(self.image, self.square_view, self.num_tokens, path)
        return draw_slices(self.image, self.plan, self.tokens_per_view, self.num_tokens, path)  # type: ignore[arg-type]

    def facts(self) -> dict[str, str]:
        """What is to be said about the image, by topic.

        Returns:
            `dict[str, str]`: Texts by topic, such as `"tokens"`, in the order in which they are printed.
        """
        sizes = {"image": _pixels(self.image_size)}
        if self.plan is None:
            sizes["view"] = f"{_pixels(self.overview_size)}, one for the whole image"
        else:
            columns, rows = self.grid
            sizes["slices"] = "none, the image is no larger than one view"
            if self.plan.num_slices:
                sizes["slices"] = f"{columns}×{rows} (columns×rows), each encoded at {_pixels(self.slice_size)}"
            sizes["overview"] = f"encoded at {_pixels(self.overview_size)}"
        tokens = f"{self.num_views} × {self.tokens_per_view}"
        if self.num_separators:
            tokens += f" + {self.num_separators} separators"
        if self.num_boundaries:
            tokens += f" + {self.num_boundaries} for start and end"
        facts = {**sizes, "tokens": f"{tokens} = {self.num_tokens}", "layout": self.layout}
        return facts if self.prompt_layout is None else {**facts, "prompt": self.prompt_layout}

    def _cost_rows(self) -> tuple[list[str], list[list[str]]]:
        """Heads and cells of the table of costs."""
        heads = ["model", "views", "tokens"]
        heads += [head for size in TEXT_MODELS for head in (f"{size} TFLOPs", "ratio")]
        rows = []
        for cost in self.costs:
            cells = [cost.model, str(cost.num_views), str(cost.num_tokens)]
            for size in TEXT_MODELS:
                known = size in cost.flops
                cells += [f"{cost.flops[size] / 1e12:.2f}", f"{cost.ratios[size]:.2f}"] if known else ["unknown", ""]
            rows.append(cells)
        return heads, rows

    def __rich__(self) -> "Group":
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        facts.add_column(style="bold", no_wrap=True)
        facts.add_column()
        for topic, fact in self.facts().items():
            facts.add_row(topic, Text(fact))
        heads, rows = self._cost_rows()
        costs = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in heads:
            costs.add_column(head, justify="left" if head == "model" else "right", no_wrap=True)
        for row in rows:
            costs.add_row(*row)
        return Group(Text(f"{self.model}: how this image becomes tokens", style="bold"), facts, costs, Text(NOTE))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=StringIO(), width=100, highlight=False, color_system=None, force_jupyter=False)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        facts = "".join(
            f'<tr><th style="text-align:left">{topic}</th><td style="text-align:left">{escape(fact)}</td></tr>'
            for topic, fact in self.facts().items()
        )
        heads, rows = self._cost_rows()
        head = "".join(f"<th>{name}</th>" for name in heads)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<table>{facts}</table><table><tr>{head}</tr>{body}</table><p>{NOTE}</p>"


def explain_image(
    image: Any, image_processor: Any = None, num_queries: int = 144, model: str = "LLaVA-UHD"
) -> ImageExplanation:
    """What LLaVA-UHD makes of an image, by default with the released settings. No checkpoint is needed.

    Args:
        image (`PIL.Image.Image`, `str`, `os.PathLike`, `bytes`, `np.ndarray` or `torch.Tensor`): One image, as
            [`open_one_image`] takes it: arrays are of shape `(height, width)`, `(height, width, channels)` or
            `(channels, height, width)`, of dtype uint8 or of any other that processors take.
        image_processor (`LlavaUhdImageProcessorPil`, *optional*): Which slices images. By default that of the released
            LLaVA-UHD.
        num_queries (`int`, *optional*, defaults to 144): Features of every view, each a token.
        model (`str`, *optional*, defaults to `"LLaVA-UHD"`): Name of the model.

    Returns:
        `ImageExplanation`: Of the image.

    Raises:
        ValueError: if `image` is not one image that can be read, or cannot be sliced.
    """
    image_processor = image_processor or LlavaUhdImageProcessorPil()
    opened = open_one_image(image, image_processor)
    plan = image_processor.slice_plan(*opened.size)
    return ImageExplanation(model, opened, plan, None, num_queries)


def explain_with_processor(processor: Any, image: Any, prompt: str | None = None, **kwargs: Any) -> ImageExplanation:
    """What a processor of one of the three families makes of an image; its method `explain` calls this.

    Args:
        processor (`LlavaUhdProcessor`, `MoeLlavaProcessor` or `LlavaMoleProcessor`): May be of an exported repository.
        image (`PIL.Image.Image`, `str`, `os.PathLike`, `bytes`, `np.ndarray` or `torch.Tensor`): One image, as
            [`open_one_image`] takes it: arrays are of shape `(height, width)`, `(height, width, channels)` or
            `(channels, height, width)`, of dtype uint8 or of any other that processors take.
        prompt (`str`, *optional*): A question about it, for the layout of the whole prompt.
        kwargs: Settings of the image processor, as in a call of the processor.

    Returns:
        `ImageExplanation`: Of the image.

    Raises:
        ValueError: if `image` is not one image that can be read, or a setting is wrong.
    """
    image_processor = processor.image_processor
    opened = open_one_image(image, image_processor)
    images_kwargs = processor._merge_kwargs(**kwargs)["images_kwargs"]
    encoding = images_kwargs.get("vision_encoding", getattr(image_processor, "vision_encoding", "slices"))
    num_boundaries = _num_boundaries(processor)
    plan, view, tokens_per_view = None, None, processor.num_queries
    if encoding == "slices":
        plan = image_processor.slice_plan(*opened.size, **images_kwargs)
    else:
        view = square_view(opened, image_processor, **images_kwargs)
        tokens_per_view = processor.num_image_tokens - num_boundaries
    layout = None if prompt is None else _prompt_layout(processor, opened, prompt, kwargs)
    name = next(
        (MODEL_NAMES[base.__name__] for base in type(processor).__mro__ if base.__name__ in MODEL_NAMES), "LLaVA"
    )
    return ImageExplanation(name, opened, plan, view, tokens_per_view, num_boundaries, layout)


def open_one_image(image: Any, image_processor: Any = None) -> Image.Image:
    """One image of any kind that processors take, upright and in RGB.

    Args:
        image (`PIL.Image.Image`, `str`, `os.PathLike`, `bytes`, `np.ndarray` or `torch.Tensor`): PIL image, path, URL,
            bytes of a file, or grey levels of shape `(height, width)`, `(height, width, channels)` or `(channels,
            height, width)`, of dtype uint8 or of any other that processors take.
        image_processor (`LlavaUhdImageProcessorPil`, *optional*): Whose PIL backend says what becomes of transparency.

    Returns:
        `PIL.Image.Image`: Upright, of mode RGB.

    Raises:
        ValueError: if it is no image or more than one, or cannot be read.
    """
    if isinstance(image, list | tuple | dict):
        raise ValueError(
            f"`image` must be one image, but is a {type(image).__name__} of {len(image)}. Explain each by itself."
        )
    if getattr(image, "ndim", 3) not in (2, 3):
        raise ValueError(
            f"`image` must be one image, of two or three dimensions, but is an array of shape {tuple(image.shape)}."
        )
    is_pil = isinstance(image_processor, LlavaUhdImageProcessorPil)
    opener = image_processor if is_pil else LlavaUhdImageProcessorPil()
    try:
        return opener.process_image(opener.fetch_images(image), do_convert_rgb=True)[0]
    except (OSError, TypeError, ValueError) as error:
        reason = str(error).removeprefix("Image 0 ")
        raise ValueError(f"`image` must be an image, a path, a URL or bytes, but cannot be read: {reason}") from error


def _num_boundaries(processor: Any) -> int:
    unsliced = processor.replace_image_token({"image_grids": np.array([[[0, 0], [0, 0], [1, 1]]])}, 0)
    return unsliced.count(processor.image_token) - processor.num_queries


def _prompt_layout(processor: Any, image: Image.Image, question: str, kwargs: dict[str, Any]) -> str:
    """The ids of a question about an image, with numbers for runs of image tokens."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor(images=[image], text=[prompt], **kwargs)["input_ids"][0]
    parts = []
    for is_image, run in groupby(ids, key=lambda token: int(token) == processor.image_token_id):
        tokens = list(run)
        text = f"[{len(tokens)}]" if is_image else processor.tokenizer.decode(tokens).replace("\n", NEWLINE).strip()
        parts.append(text)
    return " ".join(part for part in parts if part)


def _pixels(size: tuple[int, int] | None) -> str:
    return f"{size[0]}×{size[1]} pixels" if size else ""


def _resampler_type(num_queries: int) -> str:
    is_square = math.isqrt(num_queries) ** 2 == num_queries
    return "spatial" if is_square and num_queries != PERCEIVER_QUERIES else "perceiver"


# FLOPs lie in modules that import models: they are imported when costs are asked for.


@lru_cache(maxsize=256)
def _count_sliced(text_model: str, plan: SlicePlan, num_queries: int, num_boundaries: int) -> Any:
    from ..llava_uhd.configuration_llava_uhd import LlavaUhdConfig
    from .flops import VICUNA, count_layerwise, sliced_inputs

    config = LlavaUhdConfig(
        text_config=VICUNA[text_model],
        vision_config={"patch_size": plan.patch_size},
        resampler_type=_resampler_type(num_queries),
        num_queries=num_queries,
    )
    inputs = sliced_inputs(config, plan)
    return count_layerwise(config, inputs._replace(num_separators=inputs.num_separators + num_boundaries))


@lru_cache(maxsize=256)
def _count_square(text_model: str, view_size: tuple[int, int], num_features: int, num_boundaries: int) -> Any:
    """None where the vision tower cannot be told."""
    from transformers import LlavaConfig

    from ..moe_llava.configuration_moe_llava import SIGLIP_SO400M_384
    from .flops import VICUNA, count_layerwise, image_inputs

    width, side = view_size[0], math.isqrt(num_features)
    if side**2 == num_features and width >= side:
        tower = {**LlavaConfig().vision_config.to_dict(), "image_size": width, "patch_size": width // side}
    elif (width // SIGLIP_SO400M_384["patch_size"]) ** 2 - 1 == num_features:
        # The strategy "default" drops the first hidden state, which is a patch of SigLIP.
        tower = {"model_type": "siglip_vision_model", **SIGLIP_SO400M_384, "image_size": width}
    else:
        return None
    if view_size != (width, width) or (width // tower["patch_size"]) ** 2 - num_features not in (0, 1):
        return None
    config = LlavaConfig(text_config=VICUNA[text_model], vision_config=tower)
    return count_layerwise(config, image_inputs(config, *view_size)._replace(num_separators=num_boundaries))


@lru_cache(maxsize=256)
def _count_in_tree(family: str, text_model: str, width: int = 336, height: int = 336) -> Any:
    import transformers

    from .flops import VICUNA, count_layerwise, image_inputs

    config = getattr(transformers, f"{family}Config")(text_config=VICUNA[text_model])
    return count_layerwise(config, image_inputs(config, width, height))


__all__ = ["ImageExplanation", "ModelCost", "explain_image", "explain_with_processor", "open_one_image"]
