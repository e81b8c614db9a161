"""Records which experts a sparse model sends its tokens to, and tells image tokens from text.

The released code gathers this for the paper's figures 4 to 6 from a whole evaluation without a cache, and takes every
image for 576 tokens. Here hooks read the router of every sparse layer, and the token ids and the padding of the same
forward pass, so any number of images, tokens and forward passes is right, among them those of `generate`.
"""

import inspect
import re
import threading
from types import TracebackType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..moe_llava.modeling_moe_llava import MoeLlavaRouter, route_tokens


Modality = Literal["image", "text", "padding"]

# What a token is. `UNKNOWN` are those of a forward pass that saw embeddings instead of token ids.
TEXT, IMAGE, PADDING, UNKNOWN = range(4)
MODALITIES: dict[str, int] = {"text": TEXT, "image": IMAGE, "padding": PADDING}


class RoutingRecorder:
    """Records the routing of every forward pass inside of a `with` block.

    ```python
    with RoutingRecorder(model) as recorder:
        model.generate(**inputs)
    recorder.loads("image")  # (layers, experts)
    ```

    The experts told here are those that the router prefers: the first choice, and for `top_k` the second one. They are
    the ones that run unless the configuration asks for sampling or for a capacity.

    What counts is what the model computes. Every beam counts, and so do the tokens that `generate` feeds for a row of
    a batch that has ended before the others: they are text to the model. Tokens of a forward pass with `inputs_embeds`
    in place of `input_ids` are of no modality, and count without one only.

    Recordings of several `with` blocks add up until `clear`. Blocks may be nested, of one recorder or of several; the
    hooks go with the outermost block, whether it ends by an exception or not. A forward pass that fails is not
    recorded, and neither is what gradient checkpointing computes again.

    Threads: forward passes of several threads are kept apart. Entering, leaving, `clear` and reading are for one
    thread, while no other one runs the model. Replicas of `nn.DataParallel` are not recorded.

    Record before `torch.compile`: compiled code does not notice hooks that are added later.

    Args:
        model (`PreTrainedModel`): A sparse model, wrapped by PEFT or not.
        processor (`ProcessorMixin`, *optional*): The model's; [`plot_image_routing`] shows images as it prepares them.

    Attributes:
        config (`PreTrainedConfig`): The vision-language model's.
        layer_indices (`list[int]`): The text model's layer that each recorded router belongs to.
        image_lengths (`list[int]`): Tokens of every recorded image.

    Raises:
        ValueError: if the model has no router, or none of its configurations has an `image_token_id`.
    """

    # Modules whose output is the router's logits, `(..., experts)`. A subclass may name those of another family; a
    # module of any class is recorded too if its class says `records_routing = True`.
    router_classes: ClassVar[tuple[type[nn.Module], ...]] = (MoeLlavaRouter,)

    def __init__(self, model: nn.Module, processor: Any = None):
        routers = {name: module for name, module in model.named_modules() if self._is_router(module)}
        if not routers:
            raise ValueError(
                f"Routing can be recorded of models with experts, but this {type(model).__name__} has no router. A "
                "dense model gets experts by `llava_family.training.upcycle`."
            )
        self.model = _find_composite(model, set(routers.values()))
        self.processor = processor
        self.layer_indices = [_layer_index(name, position) for position, name in enumerate(routers)]
        self.config: Any = self.model.config
        self._routers = list(routers.values())
        self._signature = inspect.signature(self.model.forward)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._depth = 0
        self._current = threading.local()
        self.clear()

    @classmethod
    def _is_router(cls, module: nn.Module) -> bool:
        return isinstance(module, cls.router_classes) or getattr(type(module), "records_routing", False)

    def __enter__(self) -> "RoutingRecorder":
        if self._depth == 0:
            self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            for layer, router in enumerate(self._routers):
                self._handles.append(
                    router.register_forward_hook(lambda _, __, logits, layer=layer: self._record(layer, logits))
                )
            self._handles.append(self.model.register_forward_hook(self._finish, always_call=True))
        self._depth += 1
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def clear(self) -> None:
        """Forgets all that was recorded."""
        self._logits: list[torch.Tensor] = []  # of every pass: (layers, tokens, experts)
        self._kinds: list[torch.Tensor] = []  # of every pass: (tokens,)
        self.image_lengths: list[int] = []

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.get("kwargs", {})}
        self._current.kinds = self._classify(arguments)
        self._current.image_lengths = self._measure_images(arguments)
        self._current.logits = {}

    def _record(self, layer: int, logits: torch.Tensor) -> None:
        # None outside of the model's forward pass, where gradient checkpointing computes layers again.
        pending = getattr(self._current, "logits", None)
        if pending is not None:
            pending[layer] = logits.detach().flatten(0, -2)

    def _finish(self, module: nn.Module, args: tuple, output: Any) -> None:
        pending = getattr(self._current, "logits", None)
        self._current.logits = None
        if pending is None or output is None:  # the forward pass, or the hook before it, raised an exception
            return
        kinds = self._current.kinds
        # One transfer for every pass, behind all layers: a pass on a GPU waits once and not in every layer.
        logits = torch.stack([pending[layer].float().cpu() for layer in range(len(self._routers))])
        if kinds is None:
            kinds = torch.full((logits.shape[1],), UNKNOWN)
        elif (kinds == IMAGE).any():
            self.image_lengths += self._current.image_lengths
        self._logits.append(logits)
        self._kinds.append(kinds.cpu())

    def _classify(self, arguments: dict[str, Any]) -> torch.Tensor | None:
        """What every token of this pass is, `(batch_size * sequence_length,)`; None without token ids."""
        input_ids = arguments.get("input_ids")
        if input_ids is None:
            return None
        kinds = torch.where(input_ids == self.config.image_token_id, IMAGE, TEXT)
        is_real = _own_mask(arguments.get("attention_mask"), arguments.get("past_key_values"), input_ids.shape[1])
        if is_real is not None:
            kinds = kinds.masked_fill(~is_real.to(kinds.device), PADDING)
        return kinds.flatten()

    def _measure_images(self, arguments: dict[str, Any]) -> list[int]:
        """Tokens of every image of this pass; `generate` encodes images before it, and then passes features alone."""
        encoded = (arguments.get("mm_encoder_outputs") or {}).get("image")
        image_grids, pixel_values = arguments.get("image_grids"), arguments.get("pixel_values")
        if encoded is not None:
            return [len(features) for features in encoded.pooler_output]
        if image_grids is not None:
            num_views = image_grids[:, 0].prod(dim=-1) + 1
            return (num_views * self.config.num_queries).tolist()
        if pixel_values is not None and arguments.get("input_ids") is not None:
            num_tokens = int((arguments["input_ids"] == self.config.image_token_id).sum())
            return [num_tokens // len(pixel_values)] * len(pixel_values)
        return []

    def _select(self, modality: Modality | None, *, may_be_empty: bool = False) -> torch.Tensor:
        """Router logits of the tokens of a modality, `(layers, tokens, experts)` in float32."""
        if modality is not None and modality not in MODALITIES:
            raise ValueError(f"`modality` must be one of {list(MODALITIES)} or None, but is {modality!r}.")
        if not self._logits:
            raise ValueError("Nothing was recorded: run the model inside of `with recorder:`.")
        kinds = torch.cat(self._kinds)
        mask = kinds != PADDING if modality is None else kinds == MODALITIES[modality]
        if not may_be_empty and not mask.any():
            raise ValueError(f"No token of modality {modality!r} was recorded.")
        return torch.cat(self._logits, dim=1)[:, mask]

    def num_tokens(self, modality: Modality | None = None) -> int:
        """Recorded tokens of a modality; of all but padding for None. Each counts once, not once per layer."""
        return self._select(modality, may_be_empty=True).shape[1] if self._logits else 0

    @property
    def num_experts(self) -> int:
        return self._select(None, may_be_empty=True).shape[-1]

    def loads(self, modality: Modality | None = None, top_k: bool = False) -> torch.Tensor:
        """Share of the tokens that every expert gets, `(layers, experts)` in float64; each layer adds up to 1.

        Args:
            modality (`"image"`, `"text"` or `"padding"`, *optional*): Of all tokens but padding by default.
            top_k (`bool`, *optional*, defaults to `False`): Counts first and second choices alike, where the model has
                second ones. The paper's figures count first choices.

        Raises:
            ValueError: if no such token was recorded.
        """
        logits = self._select(modality)
        num_choices = getattr(self.config.get_text_config(), "num_experts_per_tok", 1) if top_k else 1
        chosen = torch.stack([route_tokens(layer, num_choices)[0] for layer in logits])  # (layers, tokens, choices)
        counts = nn.functional.one_hot(chosen, logits.shape[-1]).sum(dim=(1, 2))
        return counts.double() / (chosen.shape[1] * num_choices)

    def entropies(self, modality: Modality | None = None) -> torch.Tensor:
        """Mean entropy of the router's probabilities in nats, `(layers,)` in float64.

        0 where the router is certain of every token, `log(experts)` where it has no preference.
        """
        log_probabilities = self._select(modality).double().log_softmax(dim=-1)
        return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean(dim=1)

    def pathways(self, modality: Modality | None = None) -> torch.Tensor:
        """The first-choice expert of every token in every layer, `(tokens, layers)`, in the order of the tokens."""
        return self._select(modality).softmax(dim=-1).argmax(dim=-1).T


def _find_composite(model: nn.Module, routers: set[nn.Module]) -> nn.Module:
    """The innermost module with all routers that sees token ids and knows the image placeholder.

    Hooks on it see the passes of `generate`, which a PEFT model hands to the model that it wraps, as well as those of
    the model without its head.
    """
    found = None
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "image_token_id", None) is not None and routers <= set(module.modules()):
            found = module
    if found is None:
        raise ValueError(
            f"The model must have an `image_token_id` in its configuration, but this {type(model).__name__} has none. "
            "Record the whole vision-language model, not its text model."
        )
    return found


def _layer_index(name: str, position: int) -> int:
    """The number of the layer that a router belongs to, by its module's name."""
    match = re.search(r"\.?layers\.(\d+)\.", name)
    return int(match.group(1)) if match else position


def _own_mask(attention_mask: Any, cache: Any, length: int) -> torch.Tensor | None:
    """Which of the last `length` tokens are not padding, `(batch_size, length)`; None if nothing says it.

    A mask of four dimensions, which `generate` makes for static caches, lets every token but padding see itself.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim not in (2, 4):
        return None
    if attention_mask.ndim == 2:
        return attention_mask[:, -length:].bool()
    seen = 0 if cache is None else int(cache.get_seq_length())
    own = attention_mask[:, 0, :, seen : seen + length].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own == 0


__all__ = ["Modality", "RoutingRecorder"]
