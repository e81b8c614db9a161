"""The routing figures of the MoE-LLaVA paper, the experts by domain of LLaVA-MoLE's, and a map of them over an image.

All functions take a [`RoutingRecorder`] that has recorded something, return a matplotlib figure, and save it too where
a `path` is given. The figures belong to no window system and to no global state of pyplot.

Source: figures 4 to 6 of the MoE-LLaVA paper and its released code; the experts by domain follow LLaVA-MoLE's paper.
"""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..llava_uhd.slicing_llava_uhd import plan_slices
from .routing import Modality, RoutingRecorder


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which readers of any colour vision tell apart; ordered for contrast between neighbours.
EXPERT_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#5F5F5F")
# Where there are more experts than colours, the next round is hatched.
HATCHES = ("", "///", "...", "xxx")
MODALITY_COLORS: dict[Modality, str] = {"text": "#D55E00", "image": "#0072B2"}
HIGHLIGHTS: dict[Modality, tuple[str, str]] = {"text": ("#A63B00", "#F0904C"), "image": ("#00558A", "#56B4E9")}
GREY = "#C8C8C8"
# Curves of figure 6, as many as the released code draws
NUM_COMPONENTS = 12
# Panels of the figure by domain, unless layers are asked for
NUM_DOMAIN_LAYERS = 8


def plot_expert_loads(recorder: RoutingRecorder, path: str | os.PathLike | None = None) -> "Figure":
    """Load of every expert in every sparse layer, and the modalities that each expert serves (figure 4).

    In the panels of single experts text counts as often as image, however many tokens there are of each: an expert
    that takes 30 % of the text and 10 % of the image shows as 75 % text. Gaps are layers in which it gets no token.

    Args:
        recorder (`RoutingRecorder`): Which has recorded something.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if neither text nor image tokens were recorded.
    """
    modalities = [name for name in MODALITY_COLORS if recorder.num_tokens(name)]
    if not modalities:
        raise ValueError("Neither text nor image tokens were recorded.")
    num_experts, num_layers = recorder.num_experts, len(recorder.layer_indices)
    columns = min(num_experts, 4)
    rows = math.ceil(num_experts / columns)
    width = max(6.0, 1.5 + 0.45 * num_layers)
    figure = _figure((width + 2.4 * columns, max(3.8, 2.3 * rows)))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[width, 2.4 * columns])[0]
    _stack_loads(left.subplots(), recorder, None, f"All tokens ({recorder.num_tokens():,})")
    _expert_legend(left, recorder)
    shares = np.stack([recorder.loads(name).numpy() for name in modalities])  # (modalities, layers, experts)
    total = shares.sum(axis=0)
    shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    panels = right.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for expert, axes in enumerate(panels.flat):
        if expert >= num_experts:
            axes.set_visible(False)
            continue
        bottom = np.zeros(num_layers)
        for name, share in zip(modalities, shares[..., expert], strict=True):
            axes.bar(range(num_layers), share, bottom=bottom, width=0.8, color=MODALITY_COLORS[name], label=name)
            bottom += share
        _label_layers(axes, recorder)
        axes.set_title(f"Expert {expert}", fontsize=10)
        axes.set_ylim(0, 1)
        if expert % columns == 0:
            axes.set_ylabel("share")
            axes.yaxis.set_major_formatter(_percent)
        if expert // columns == rows - 1 or expert + columns >= num_experts:
            axes.set_xlabel("layer")
            axes.tick_params(labelbottom=True)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    right.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return _save(figure, path)


def plot_modality_loads(recorder: RoutingRecorder, path: str | os.PathLike | None = None) -> "Figure":
    """Load of every expert in every sparse layer, for text and for image tokens (figure 5).

    Args:
        recorder (`RoutingRecorder`): Which has recorded something.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if nothing was recorded.
    """
    figure = _figure((2 * max(4.5, 1.5 + 0.45 * len(recorder.layer_indices)), 3.8))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name in zip((left, right), MODALITY_COLORS, strict=True):
        title = f"{name.capitalize()} tokens ({recorder.num_tokens(name):,})"
        if recorder.num_tokens(name):
            _stack_loads(axes, recorder, name, title)
        else:
            _say_nothing_recorded(axes, title)
    left.set_ylabel("share of tokens")
    right.set_ylabel("")
    _expert_legend(figure, recorder)
    return _save(figure, path)


def plot_domain_routing(
    recorder: RoutingRecorder,
    path: str | os.PathLike | None = None,
    layers: Sequence[int] | None = None,
    modality: Modality | None = None,
    weights: bool = False,
) -> "Figure":
    """Load of every expert by domain of the data, for some layers: where bars of a layer differ, domains part.

    Passes without a domain are left out.

    Args:
        recorder (`RoutingRecorder`): Which has recorded passes inside of `with recorder.domain(...)`.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.
        layers (`Sequence[int]`, *optional*): Numbers of the text model's layers. At most eight by default, from the
            first to the last one.
        modality (`"image"`, `"text"` or `"padding"`, *optional*): Of all tokens but padding by default.
        weights (`bool`, *optional*, defaults to `False`): Shows the router's mean probabilities in place of the share
            of first choices: what experts contribute under dense routing.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if no domain was recorded, or a layer has no router.
    """
    domains = recorder.domains
    if not domains:
        raise ValueError("No domain was recorded: run the model inside of `with recorder.domain(...)`.")
    positions = _domain_layers(recorder, layers)
    columns = min(len(positions), 4)
    rows = math.ceil(len(positions) / columns)
    labels = [f"{name} ({recorder.num_tokens(modality, domain=name):,})" for name in domains]
    width = 0.085 * max(map(len, labels)) + 2.6 * columns
    figure = _figure((max(width, 6.0), rows * (0.42 * len(domains) + 0.55) + 0.9))
    what = "tokens" if modality is None else f"{modality} tokens"
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index >= len(positions):
            axes.set_visible(False)
            continue
        for place, name in enumerate(domains):
            if not recorder.num_tokens(modality, domain=name):
                axes.text(0.5, place, "none recorded", ha="center", va="center", color="#5F5F5F")
                continue
            read = recorder.mean_probabilities if weights else recorder.loads
            _draw_shares(axes, place, read(modality, domain=name)[positions[index]].numpy())
        axes.set_title(f"Layer {recorder.layer_indices[positions[index]]}", fontsize=10)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
        axes.set_yticks(range(len(domains)), labels, parse_math=False)
        axes.set_ylim(len(domains) - 0.5, -0.5)  # the first domain on top
        axes.spines[["top", "right"]].set_visible(False)
        if index + columns >= len(positions):
            axes.set_xlabel(f"mean weight for {what}" if weights else f"share of {what}")
            axes.tick_params(labelbottom=True)
            for label, alignment in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
                label.set_horizontalalignment(alignment)  # off the next panel's
    figure.supylabel(f"domain ({what})", fontsize=10)
    _expert_legend(figure, recorder, columns=8)
    return _save(figure, path)


def _domain_layers(recorder: RoutingRecorder, layers: Sequence[int] | None) -> list[int]:
    """Positions of the chosen layers among the recorded ones."""
    recorded = recorder.layer_indices
    if layers is None:
        count = min(len(recorded), NUM_DOMAIN_LAYERS)
        return np.linspace(0, len(recorded) - 1, count).round().astype(int).tolist()
    unknown = [layer for layer in layers if layer not in recorded]
    if unknown or not layers:
        raise ValueError(f"`layers` must be some of the layers with experts, {recorded}, but is {list(layers)}.")
    return [recorded.index(layer) for layer in layers]


def _draw_shares(axes: "Axes", place: int, shares: np.ndarray) -> None:
    """One horizontal bar of all experts' shares, with their numbers where there is room."""
    left = 0.0
    for expert, share in enumerate(shares):
        axes.barh(
            place, share, left=left, height=0.78, color=_color(expert), hatch=_hatch(expert), edgecolor="white", lw=0.6
        )
        if share >= 0.13:
            box = {"facecolor": _color(expert), "edgecolor": "none", "pad": 1} if _hatch(expert) else None
            axes.text(
                left + share / 2,
                place,
                _percent(share),
                ha="center",
                va="center",
                fontsize=8,
                color=_text_color(expert),
                bbox=box,
            )
        left += share


def plot_pathways(recorder: RoutingRecorder, path: str | os.PathLike | None = None) -> "Figure":
    """Typical ways of tokens through the experts of the layers, for text and for image tokens (figure 6).

    As in the paper, the curves are no single tokens but the principal components of all tokens' pathways, each scaled
    to the range of the experts and rounded. The two strongest are highlighted.

    Args:
        recorder (`RoutingRecorder`): Which has recorded something.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if nothing was recorded.
    """
    figure = _figure((max(7.5, 1.5 + 0.6 * len(recorder.layer_indices)), 5.6))
    for axes, name in zip(figure.subplots(2, 1), HIGHLIGHTS, strict=True):
        title = f"{name.capitalize()} tokens ({recorder.num_tokens(name):,})"
        curves = np.zeros((0, 0))
        if recorder.num_tokens(name):
            curves = principal_pathways(recorder.pathways(name), recorder.num_experts)
        if not len(curves):
            reason = "none recorded" if not recorder.num_tokens(name) else "all tokens take one and the same way"
            _say_nothing_recorded(axes, title, reason)
            continue
        _draw_curves(axes, curves, HIGHLIGHTS[name])
        axes.set_title(title)
        axes.set_ylabel("expert")
        axes.set_yticks(range(recorder.num_experts))
        axes.set_ylim(recorder.num_experts - 0.6, -0.4)
        axes.set_xlim(-0.3, len(recorder.layer_indices) - 0.7)
        _label_layers(axes, recorder, fraction=0.3)
    figure.axes[-1].set_xlabel("layer")
    return _save(figure, path)


def principal_pathways(pathways: torch.Tensor, num_experts: int, num_components: int = NUM_COMPONENTS) -> np.ndarray:
    """Principal components of pathways, as experts per layer.

    Components without variance are left out, so there are fewer where there are few layers or all tokens go one way.

    Args:
        pathways (`torch.LongTensor` of shape `(tokens, layers)`): Indices of experts, as [`RoutingRecorder.pathways`]
            gives them.
        num_experts (`int`): Experts of every layer.
        num_components (`int`, *optional*, defaults to 12): How many at most.

    Returns:
        `np.ndarray` of shape `(components, layers)`, int64: Indices of experts.
    """
    samples = pathways.T.double().numpy()  # layers are the samples, as in the released code
    left, singular, _ = np.linalg.svd(samples - samples.mean(axis=0), full_matrices=False)
    kept = min(num_components, int((singular > 1e-9 * max(singular[0], 1.0)).sum()))
    components = (left[:, :kept] * singular[:kept]).T
    # The sign of a component is arbitrary; one rule makes figures of one recording equal on all machines.
    peaks = components[np.arange(kept), np.abs(components).argmax(axis=1)]
    components = components * np.sign(peaks)[:, None]
    low, high = components.min(axis=1, keepdims=True), components.max(axis=1, keepdims=True)
    scaled = ((components - low) / (high - low)).clip(0.01, 0.99)
    return np.floor(scaled * num_experts).astype(int)


def plot_image_routing(
    image: Image.Image, recorder: RoutingRecorder, image_index: int = 0, path: str | os.PathLike | None = None
) -> "Figure":
    """First-choice expert of every image token in every sparse layer, over the image.

    With a processor in the recorder, square views are shown as the processor prepares them, otherwise as the image
    padded to a square. With `vision_encoding="slices"` the tokens of all slices make up one map, and the overview has
    a row of its own. Colours repeat behind the eighth expert.

    Args:
        image (`PIL.Image.Image`): The image that was given to the processor.
        recorder (`RoutingRecorder`): Which has recorded it.
        image_index (`int`, *optional*, defaults to 0): Which of the recorded images it is, in the order of recording.
        path (`str` or `os.PathLike`, *optional*): PNG file to write.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no such image, or tokens have no place in it: those of a perceiver resampler.
    """
    maps = image_expert_maps(recorder, image.size, image_index)
    backgrounds = {"view": None, "slices": image.convert("RGB"), "overview": image.convert("RGB")}
    if "view" in maps:
        backgrounds["view"] = square_view(image, _image_processor(recorder))
    num_layers = len(recorder.layer_indices)
    rows_per_map = math.ceil((num_layers + 1) / 6)
    columns = math.ceil((num_layers + 1) / rows_per_map)
    aspects = [backgrounds[name].height / backgrounds[name].width for name in maps]  # type: ignore[union-attr]
    height = sum(rows_per_map * (2.1 * min(max(aspect, 0.4), 2.5) + 0.35) for aspect in aspects)
    figure = _figure((2.1 * columns, height + 0.5))
    grids = figure.subfigures(len(maps), 1, squeeze=False, height_ratios=aspects)
    for grid, (name, experts) in zip(grids[:, 0], maps.items(), strict=True):
        background = backgrounds[name]
        panels = grid.subplots(rows_per_map, columns, squeeze=False)
        for panel in panels.flat:
            panel.set_axis_off()
        panels.flat[0].imshow(background)
        panels.flat[0].set_title({"view": "image"}.get(name, name), fontsize=10)
        for layer, panel in zip(range(num_layers), list(panels.flat)[1:], strict=False):
            _draw_expert_map(panel, background, experts[layer])
            panel.set_title(f"layer {recorder.layer_indices[layer]}", fontsize=10)
    _expert_legend(figure, recorder, columns=8)
    return _save(figure, path)


def image_expert_maps(
    recorder: RoutingRecorder, image_size: tuple[int, int], image_index: int = 0
) -> dict[str, np.ndarray]:
    """First-choice experts of an image's tokens in their places.

    A SigLIP tower with the strategy `"default"` has no token for the top left patch. LLaVA-MoLE's start and end of an
    image have no place.

    Args:
        recorder (`RoutingRecorder`): Which has recorded the image.
        image_size (`tuple[int, int]`): Its width and height in pixels.
        image_index (`int`, *optional*, defaults to 0): Which of the recorded images it is, in the order of recording.

    Returns:
        `dict[str, np.ndarray]`: Maps of shape `(layers, rows, columns)`, int64, -1 for no token: `"view"` for the
        square encoding; `"overview"`, and `"slices"` where the image was cut, for the slices one.

    Raises:
        ValueError: if there is no such image, or tokens have no place in it: those of a perceiver resampler.
    """
    config = recorder.config
    if not hasattr(config, "vision_encoding"):
        raise ValueError(
            "Only image tokens of this package's families have a known place, but the model is a "
            f"{config.model_type!r}."
        )
    lengths = recorder.image_lengths
    if not 0 <= image_index < len(lengths):
        raise ValueError(f"`image_index` must be one of the {len(lengths)} recorded images, but is {image_index}.")
    experts = recorder.pathways("image").T.numpy()  # (layers, image tokens)
    if sum(lengths) != experts.shape[1]:
        raise ValueError(
            f"{experts.shape[1]} image tokens were recorded, but the images of {lengths} tokens were not recorded "
            "once each. Record without beams, and prefill at once."
        )
    start = sum(lengths[:image_index])
    own = experts[:, start : start + lengths[image_index]]
    num_boundaries = recorder.boundary_tokens // 2
    own = own[:, num_boundaries : own.shape[1] - num_boundaries]
    if config.vision_encoding == "slices":
        return _sliced_maps(own, recorder, image_size)
    return {"view": _square_map(own, config)}


def _square_map(experts: np.ndarray, config: Any) -> np.ndarray:
    side = config.vision_config.image_size // config.vision_config.patch_size
    has_class_embedding = config.vision_config.model_type == "clip_vision_model"
    drops_first = config.vision_feature_select_strategy == "default"
    if has_class_embedding and not drops_first:
        experts = experts[:, 1:]  # the class embedding's own token
    elif drops_first and not has_class_embedding:
        experts = np.pad(experts, ((0, 0), (1, 0)), constant_values=-1)
    return experts.reshape(-1, side, side)


def _sliced_maps(experts: np.ndarray, recorder: RoutingRecorder, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    config = recorder.config
    if config.resampler_type != "spatial":
        raise ValueError(
            "Only tokens of a spatial resampler have a place in the image, but this model's `resampler_type` is "
            f"{config.resampler_type!r}: each of its tokens sees the whole view."
        )
    processor = _image_processor(recorder)
    if processor is None:
        vision_config = config.vision_config
        plan = plan_slices(*image_size, base_size=vision_config.image_size, patch_size=vision_config.patch_size)
    else:
        plan = processor.slice_plan(*image_size)
    if plan.num_features(config.num_queries) != experts.shape[1]:
        raise ValueError(
            f"An image of {image_size[0]}x{image_size[1]} pixels has {plan.num_features(config.num_queries)} tokens, "
            f"but {experts.shape[1]} were recorded: it is another image, or was processed with other settings."
        )
    side = math.isqrt(config.num_queries)
    views = experts.reshape(len(experts), -1, side, side)  # (layers, views, side, side)
    maps = {}
    if plan.num_slices:
        slices = views[:, :-1].reshape(-1, plan.rows, plan.columns, side, side).transpose(0, 1, 3, 2, 4)
        maps["slices"] = slices.reshape(-1, plan.rows * side, plan.columns * side)
    return {**maps, "overview": views[:, -1]}


def _image_processor(recorder: RoutingRecorder) -> Any:
    return getattr(recorder.processor, "image_processor", recorder.processor)


def square_view(image: Image.Image, image_processor: Any = None, **settings: Any) -> Image.Image:
    """What the vision tower sees of an image under the vision encoding `"square"`, in colours.

    Args:
        image (`PIL.Image.Image`): The image.
        image_processor (`BaseImageProcessor`, *optional*): The model's; without it the image on a grey square.
        settings: Of the image processor, as in a call of it.

    Returns:
        `PIL.Image.Image`: RGB, of the size of the vision tower's input.
    """
    if image_processor is None:
        side = max(image.size)
        return ImageOps.pad(image.convert("RGB"), (side, side), color=(127, 127, 127))
    settings |= {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    pixels = np.asarray(image_processor(images=[image], **settings)["pixel_values"])[0]
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _draw_expert_map(axes: "Axes", background: Any, experts: np.ndarray) -> None:
    from matplotlib.colors import to_rgb

    axes.imshow(ImageOps.grayscale(background), cmap="gray", vmin=0, vmax=255)
    colors = np.array([to_rgb(_color(expert)) for expert in range(max(int(experts.max()), 0) + 1)])
    overlay = np.concatenate([colors[experts], np.where(experts < 0, 0.0, 0.62)[..., None]], axis=-1)
    axes.imshow(overlay, extent=(-0.5, background.width - 0.5, background.height - 0.5, -0.5), interpolation="nearest")


def _draw_curves(axes: "Axes", curves: np.ndarray, highlights: tuple[str, str]) -> None:
    """A bump chart: curves that share a place lie side by side, highlighted ones in front."""
    steps = np.linspace(0, 1, 24)
    ease = (1 - np.cos(np.pi * steps)) / 2
    num_curves, num_layers = curves.shape
    offsets = (np.arange(num_curves) - (num_curves - 1) / 2) * 0.5 / max(num_curves, 8)
    for index in reversed(range(num_curves)):
        color = highlights[index] if index < 2 else GREY
        order = num_curves - index
        levels = curves[index] + offsets[index]
        x = np.concatenate([layer + steps for layer in range(num_layers - 1)] or [np.zeros(1)])
        y = np.concatenate(
            [levels[layer] + ease * (levels[layer + 1] - levels[layer]) for layer in range(num_layers - 1)]
            or [levels[:1]]
        )
        axes.plot(x, y, color=color, linewidth=2.4 if index < 2 else 1.4, zorder=order, solid_capstyle="round")
        marker, size = ("D", 7) if index < 2 else ("o", 4)
        label = ("1st component", "2nd component", "others")[index] if index < 3 else None
        axes.plot(range(num_layers), levels, marker, color=color, markersize=size, zorder=order, label=label)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _stack_loads(axes: "Axes", recorder: RoutingRecorder, modality: Modality | None, title: str) -> None:
    loads = recorder.loads(modality).numpy()  # (layers, experts)
    bottom = np.zeros(len(loads))
    for expert, share in enumerate(loads.T):
        style: dict[str, Any] = {
            "color": _color(expert),
            "hatch": _hatch(expert),
            "edgecolor": "white",
            "linewidth": 0.6,
        }
        axes.bar(range(len(loads)), share, bottom=bottom, width=0.8, label=f"Expert {expert}", **style)
        bottom += share
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.set_ylabel("share of tokens")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(_percent)
    _label_layers(axes, recorder)


def _say_nothing_recorded(axes: "Axes", title: str, reason: str = "none recorded") -> None:
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color="#5F5F5F")


def _label_layers(axes: "Axes", recorder: RoutingRecorder, fraction: float = 0.55) -> None:
    """Numbers of the text model's layers on the x axis, as many as fit."""
    layers = recorder.layer_indices
    step = 1 if len(layers) <= 8 else 2 if len(layers) <= 24 else 4
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlim(-fraction, len(layers) - 1 + fraction)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(value: float, position: float = 0.0) -> str:
    return f"{value:.0%}"


def _color(expert: int) -> str:
    return EXPERT_COLORS[expert % len(EXPERT_COLORS)]


def _hatch(expert: int) -> str:
    return HATCHES[expert // len(EXPERT_COLORS) % len(HATCHES)]


def _text_color(expert: int) -> str:
    """Black or white, whichever is easier to read on the expert's colour."""
    from matplotlib.colors import to_rgb

    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(_color(expert))
    ]
    # Contrast to white and to black is equal at this luminance (WCAG 2).
    return "black" if np.dot([0.2126, 0.7152, 0.0722], linear) > 0.179 else "white"


def _expert_legend(figure: Any, recorder: RoutingRecorder, columns: int = 4) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=_color(expert), hatch=_hatch(expert), edgecolor="white", label=f"Expert {expert}")
        for expert in range(recorder.num_experts)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), columns), frameon=False)


def _figure(size: tuple[float, float]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install 'llava-family[plot]'`.") from error
    # A figure of its own, not pyplot's: it draws without a display and is freed with its last reference.
    return Figure(figsize=size, layout="constrained", dpi=120)


def _save(figure: "Figure", path: str | os.PathLike | None) -> "Figure":
    if path is not None:
        figure.savefig(path, format="png")
    return figure


__all__ = [
    "image_expert_maps",
    "plot_domain_routing",
    "plot_expert_loads",
    "plot_image_routing",
    "plot_modality_loads",
    "plot_pathways",
    "principal_pathways",
    "square_view",
]
