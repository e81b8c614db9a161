"""Records which experts a sparse model sends its tokens to, and tells image tokens from text, and domains of data.

MoE-LLaVA's released code gathers this for its paper's figures 4 to 6 from a whole evaluation without a cache, and
takes every image for 576 tokens. Here hooks read the router of every sparse layer, and the token ids and the padding
of the same forward pass, so any number of images, tokens and forward passes is right, among them those of `generate`.

Source: MoE-LLaVA's figures 4 to 6 and its released code.
"""

import inspect
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from ..llava_mole.layers_llava_mole import MoleRouter
from ..moe_llava.modeling_moe_llava import MoeLlavaRouter, route_tokens


# What a token is of
Modality = Literal["image", "text", "padding"]

# What a token is. `UNKNOWN` are those of a forward pass that saw embeddings instead of token ids.
TEXT, IMAGE, PADDING, UNKNOWN = range(4)
MODALITIES: dict[str, int] = {"text": TEXT, "image": IMAGE, "padding": PADDING}
# Of every image, by `model_type`: learned embeddings around its features, which have placeholders as features have
BOUNDARY_TOKENS = {"llava_mole": 2}


class RecordedPass(NamedTuple):
    """What one forward pass computed."""

    logits: torch.Tensor  # (layers, tokens, experts)
    kinds: torch.Tensor  # (tokens,)
    domain: str | None
    image_lengths: list[int]


class RoutingRecorder:
    """Records the routing of every forward pass inside of a `with` block.

    ```python
    with RoutingRecorder(model) as recorder:
        model.generate(**inputs)
    recorder.loads("image")  # (layers, experts)
    ```

    The experts told here are those that the router prefers: the first choice, and for `top_k` the second one. They are
    the ones that run unless the configuration asks for sampling or for a capacity. Dense routing runs all experts;
    what each one contributes is told by `mean_probabilities`.

    To compare kinds of data, say of which one the passes are; all readings can be had of one domain:

    ```python
    with RoutingRecorder(model) as recorder:
        for domain, batch in batches:
            with recorder.domain(domain):
                model(**batch)
    recorder.loads("image", domain="document")
    ```

    What counts is what the model computes. Every beam counts, and so do the tokens that `generate` feeds for a row of
    a batch that has ended before the others: they are text to the model. Tokens of a forward pass with `inputs_embeds`
    in place of `input_ids` are of no modality, and count without one only. Models that know no images, as PEFT adapts
    them too, see text alone.

    Recordings of several `with` blocks add up until `clear`. Blocks may be nested, of one recorder or of several; the
    hooks go with the outermost block, whether it ends by an exception or not. A forward pass that fails is not
    recorded, and neither is what gradient checkpointing computes again, nor a pass without the adapter that has the
    routers.

    Threads: forward passes of several threads are kept apart, and so are their domains. Entering, leaving, `clear` and
    reading are for one thread, while no other one runs the model. Replicas of `nn.DataParallel` are not recorded.

    Record before `torch.compile`: compiled code does not notice hooks that are added later.

    Args:
        model (`PreTrainedModel`): A sparse model, wrapped by PEFT or not.
        processor (`ProcessorMixin`, *optional*): The model's; [`plot_image_routing`] shows images as it prepares them.
        adapter (`str`, *optional*): Which PEFT adapter's routers to record, where several adapters have some.

    Attributes:
        config (`PreTrainedConfig`): The vision-language model's, or that of a model of text alone.
        layer_indices (`list[int]`): The text model's layer that each recorded router belongs to.
        is_dense (`bool`): Whether tokens run through all experts, weighted, and not through chosen ones.

    Raises:
        ValueError: if the model has no router, if several adapters have routers and none of them is named, or if the
            model is a part of a vision-language model, which does not know the tokens of images.
    """

    # Modules whose output is the router's logits, `(..., experts)`. A subclass may name those of another family; a
    # module of any class is recorded too if its class says `records_routing = True`.
    router_classes: ClassVar[tuple[type[nn.Module], ...]] = (MoeLlavaRouter, MoleRouter)

    def __init__(self, model: nn.Module, processor: Any = None, adapter: str | None = None):
        names = [name for name, module in model.named_modules() if self._is_router(module)]
        if not names:
            raise ValueError(
                f"Routing can be recorded of models with experts, but this {type(model).__name__} has no router. A "
                "dense model gets experts by `llava_family.training.upcycle`, or LoRA experts by "
                "`llava_family.mole.get_mole_model`."
            )
        adapter, names = _choose_adapter(model, names, adapter)
        routers = {name: _outermost(model, name) for name in names}
        self.model, config = _find_composite(model, set(routers.values()))
        self.processor = processor
        self.layer_indices = [_layer_index(name, position) for position, name in enumerate(routers)]
        self.config = config
        text_config = config.get_text_config()
        adapter_config: Any = (getattr(model, "peft_config", None) or {}).get(adapter)
        self.is_dense = "dense" in (getattr(adapter_config, "routing", None), getattr(text_config, "routing", None))
        self._routers = list(routers.values())
        # A text model that LoRA experts are added to may be sparse itself; its choices are not theirs.
        is_mole = isinstance(model.get_submodule(names[0]), MoleRouter)
        self._num_choices = 1 if is_mole else getattr(text_config, "num_experts_per_tok", 1)
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

    @contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """Says of what domain the forward passes are that this thread runs inside of the `with` block.

        Of nested blocks the innermost one counts.

        Args:
            name (`str`): Name of the domain, such as `"document"`.

        Raises:
            ValueError: if the name is no text, or empty.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"A domain's name must be a non-empty string such as 'document', but is {name!r}.")
        outer = getattr(self._current, "domain", None)
        self._current.domain = name
        try:
            yield
        finally:
            self._current.domain = outer

    def clear(self) -> None:
        """Forgets all that was recorded."""
        # One list, and one `append` for every pass: those of several threads do not get mixed up.
        self._passes: list[RecordedPass] = []

    @property
    def image_lengths(self) -> list[int]:
        """Tokens of every recorded image, in the order of recording."""
        return [length for recorded in self._passes for length in recorded.image_lengths]

    @property
    def domains(self) -> list[str]:
        """Names of the domains that passes were recorded of, in the order of recording."""
        return list(dict.fromkeys(recorded.domain for recorded in self._passes if recorded.domain is not None))

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
        if not pending:  # a PEFT model whose adapter is disabled, or another one active
            return
        kinds = self._current.kinds
        # One transfer for every pass, behind all layers: a pass on a GPU waits once and not in every layer.
        logits = torch.stack([pending[layer].float().cpu() for layer in range(len(self._routers))])
        if kinds is None:
            kinds = torch.full((logits.shape[1],), UNKNOWN)
        has_images = bool((kinds == IMAGE).any())
        image_lengths = self._current.image_lengths if has_images else []
        domain = getattr(self._current, "domain", None)
        self._passes.append(RecordedPass(logits, kinds.cpu(), domain, image_lengths))

    def _classify(self, arguments: dict[str, Any]) -> torch.Tensor | None:
        """What every token of this pass is, `(batch_size * sequence_length,)`; None without token ids."""
        input_ids = arguments.get("input_ids")
        if input_ids is None:
            return None
        image_token = getattr(self.config, "image_token_id", None)
        # No id is negative: to a model of text alone, no token is of an image.
        kinds = torch.where(input_ids == (-1 if image_token is None else image_token), IMAGE, TEXT)
        is_real = _own_mask(arguments.get("attention_mask"), arguments.get("past_key_values"), input_ids.shape[1])
        if is_real is not None:
            kinds = kinds.masked_fill(~is_real.to(kinds.device), PADDING)
        return kinds.flatten()

    def _measure_images(self, arguments: dict[str, Any]) -> list[int]:
        """Tokens of every image of this pass; `generate` encodes images before it, and then passes features alone."""
        encoded = (arguments.get("mm_encoder_outputs") or {}).get("image")
        image_grids, pixel_values = arguments.get("image_grids"), arguments.get("pixel_values")
        if not hasattr(self.config, "vision_encoding"):  # of no family of ours
            return []
        if encoded is not None:
            return [len(features) for features in encoded.pooler_output]
        if image_grids is not None:
            num_views = image_grids[:, 0].prod(dim=-1) + 1
            return (num_views * self.config.num_queries + self.boundary_tokens).tolist()
        if pixel_values is not None and arguments.get("input_ids") is not None:
            num_tokens = int((arguments["input_ids"] == self.config.image_token_id).sum())
            return [num_tokens // len(pixel_values)] * len(pixel_values)
        return []

    def _check_recorded(self) -> None:
        if not self._passes:
            raise ValueError("Nothing was recorded: run the model inside of `with recorder:`.")

    def _masks(self, modality: Modality | None, domain: str | None) -> list[tuple[RecordedPass, torch.Tensor]]:
        """Recorded passes of a domain, and which of their tokens are of a modality."""
        if modality is not None and modality not in MODALITIES:
            raise ValueError(f"`modality` must be one of {list(MODALITIES)} or None, but is {modality!r}.")
        if domain is not None and domain not in self.domains:
            recorded = f"one of the recorded {self.domains} or None" if self.domains else "None: none was recorded"
            raise ValueError(
                f"`domain` must be {recorded}, but is {domain!r}. Run the model inside of `with recorder.domain(...)`."
            )
        return [
            (recorded, recorded.kinds != PADDING if modality is None else recorded.kinds == MODALITIES[modality])
            for recorded in self._passes
            if domain is None or recorded.domain == domain
        ]

    def _select(self, modality: Modality | None, domain: str | None) -> torch.Tensor:
        """Router logits of the tokens of a modality and a domain, `(layers, tokens, experts)` in float32."""
        self._check_recorded()
        masks = self._masks(modality, domain)
        logits = torch.cat([recorded.logits[:, mask] for recorded, mask in masks], dim=1)
        if not logits.shape[1]:
            of_domain = "" if domain is None else f" in domain {domain!r}"
            raise ValueError(f"No token of modality {modality!r} was recorded{of_domain}.")
        return logits

    def num_tokens(self, modality: Modality | None = None, *, domain: str | None = None) -> int:
        """Counts recorded tokens. Each counts once, not once per layer.

        Args:
            modality (`"image"`, `"text"` or `"padding"`, *optional*): Of all tokens but padding by default.
            domain (`str`, *optional*): One of `domains`; of all passes by default, those without a domain too.

        Returns:
            `int`: The number of tokens.

        Raises:
            ValueError: if the modality or the domain is unknown.
        """
        return sum(int(mask.sum()) for _, mask in self._masks(modality, domain))

    @property
    def num_experts(self) -> int:
        """Experts of every sparse layer.

        Raises:
            ValueError: if nothing was recorded.
        """
        self._check_recorded()
        return self._passes[0].logits.shape[-1]

    @property
    def boundary_tokens(self) -> int:
        """Image tokens of every image that stand around its features, and are none."""
        return BOUNDARY_TOKENS.get(self.config.model_type, 0)

    def loads(
        self, modality: Modality | None = None, top_k: bool = False, *, domain: str | None = None
    ) -> torch.Tensor:
        """Share of the tokens that every expert gets; each layer adds up to 1.

        Args:
            modality (`"image"`, `"text"` or `"padding"`, *optional*): Of all tokens but padding by default.
            top_k (`bool`, *optional*, defaults to `False`): Counts first and second choices alike, where the model has
                second ones. The paper's figures count first choices.
            domain (`str`, *optional*): One of `domains`; of all passes by default, those without a domain too.

        Returns:
            `torch.DoubleTensor` of shape `(layers, experts)`, float64, on the CPU.

        Raises:
            ValueError: if no such token was recorded, or the domain is unknown.
        """
        logits = self._select(modality, domain)
        num_choices = self._num_choices if top_k else 1
        chosen = torch.stack([route_tokens(layer, num_choices)[0] for layer in logits])  # (layers, tokens, choices)
        counts = nn.functional.one_hot(chosen, logits.shape[-1]).sum(dim=(1, 2))
        return counts.double() / (chosen.shape[1] * num_choices)

    def mean_probabilities(self, modality: Modality | None = None, *, domain: str | None = None) -> torch.Tensor:
        """Mean of the router's probabilities; each layer adds up to 1.

        Under dense routing these are the weights of the experts' outputs. Its arguments are as in
        [`RoutingRecorder.loads`].

        Returns:
            `torch.DoubleTensor` of shape `(layers, experts)`, float64, on the CPU.

        Raises:
            ValueError: if no such token was recorded, or the domain is unknown.
        """
        return self._select(modality, domain).double().softmax(dim=-1).mean(dim=1)

    def entropies(self, modality: Modality | None = None, *, domain: str | None = None) -> torch.Tensor:
        """Mean entropy of the router's probabilities in nats.

        0 where the router is certain of every token, `log(experts)` where it has no preference. Its arguments are as
        in [`RoutingRecorder.loads`].

        Returns:
            `torch.DoubleTensor` of shape `(layers,)`, float64, on the CPU.

        Raises:
            ValueError: if no such token was recorded, or the domain is unknown.
        """
        log_probabilities = self._select(modality, domain).double().log_softmax(dim=-1)
        return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean(dim=1)

    def pathways(self, modality: Modality | None = None, *, domain: str | None = None) -> torch.Tensor:
        """The first-choice expert of every token in every layer. Its arguments are as in [`RoutingRecorder.loads`].

        Returns:
            `torch.LongTensor` of shape `(tokens, layers)`, int64, on the CPU: Indices of experts, in the order of the
            tokens.

        Raises:
            ValueError: if no such token was recorded, or the domain is unknown.
        """
        return self._select(modality, domain).softmax(dim=-1).argmax(dim=-1).T


def _choose_adapter(model: nn.Module, names: list[str], adapter: str | None) -> tuple[str | None, list[str]]:
    """One adapter, and the names of its routers; None, and the model's own routers, where no adapter has any.

    PEFT keeps what adapters have of their own in a `ModuleDict` each, by the adapters' names. A router of the model
    beside them is the one that they replace.
    """
    found: dict[str | None, list[str]] = {}
    for name in names:
        parent, _, own = name.removesuffix(".base_layer").rpartition(".")
        owner = own if isinstance(model.get_submodule(parent), nn.ModuleDict) else None
        found.setdefault(owner, []).append(name)
    adapters = [name for name in found if name is not None]
    if adapter is None and len(adapters) <= 1:
        adapter = adapters[0] if adapters else None
    elif adapter not in adapters:
        raise ValueError(
            f"`adapter` must name one of the adapters with routers, {adapters}, but is {adapter!r}. Experts of "
            "different adapters have nothing in common, so they are recorded one by one."
        )
    return adapter, found[adapter]


def _outermost(model: nn.Module, name: str) -> nn.Module:
    """The module that gives the router's logits: PEFT's, where it adapts the router itself."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return model.get_submodule(name)


def _find_composite(model: nn.Module, routers: set[nn.Module]) -> tuple[nn.Module, Any]:
    """The innermost module with all routers that sees token ids and, if one does, knows images; and its configuration.

    Hooks on it see the passes of `generate`, which a PEFT model hands to the model that it wraps, as well as those of
    the model without its head.
    """
    found: tuple[nn.Module, Any] | None = None
    knows_images = False
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is None or "input_ids" not in inspect.signature(module.forward).parameters:
            continue
        is_composite = getattr(config, "image_token_id", None) is not None
        if is_composite >= knows_images and routers <= set(module.modules()):
            found, knows_images = (module, config), is_composite
    if found is None:
        raise ValueError(
            f"Token ids tell text from images, but nothing with all routers of this {type(model).__name__} takes "
            "`input_ids`. Record the whole model."
        )
    # A configuration with this key is a part of another one.
    if not knows_images and getattr(found[1], "base_config_key", None):
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
