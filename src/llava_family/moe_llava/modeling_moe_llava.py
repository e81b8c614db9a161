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
"""PyTorch MoE-LLaVA model: a vision tower, a projector, and a text model whose chosen layers have experts.

Design choices:
- Text backbones are the in-tree models with the feed-forward network of the chosen layers replaced; experts are packed
  and follow transformers' experts interface, so all of its kernels and its expert parallelism apply.
- Routing is a pure function of the router's logits, `route_tokens`. By default nothing is dropped or random,
  hence no row of a batch sees another. The released code's sampling and capacity are options of the configuration.
- The balance loss follows from the logits alone, so it is computed once behind all layers, where padding is known.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.llama.modeling_llama import LlamaModel  # trf-ignore: TRF009
from transformers.models.mistral.modeling_mistral import MistralModel  # trf-ignore: TRF009
from transformers.models.phi.modeling_phi import PhiModel  # trf-ignore: TRF009
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model  # trf-ignore: TRF009
from transformers.models.stablelm.modeling_stablelm import StableLmDecoderLayer, StableLmModel  # trf-ignore: TRF009
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder

from ..llava_uhd.modeling_llava_uhd import (
    FlashAttentionByDefaultMixin,
    PlaceholderGenerationMixin,
    UntrustedCheckpointMixin,
)
from ..llava_uhd.shared_llava_uhd import SquareOrSlicesMixin, add_balance_loss, counted_tokens
from .configuration_moe_llava import (
    MoeLlavaConfig,
    MoeLlavaLlamaConfig,
    MoeLlavaMistralConfig,
    MoeLlavaPhiConfig,
    MoeLlavaQwen2Config,
    MoeLlavaStableLmConfig,
)
from .weight_mapping_moe_llava import original_weight_mapping


@auto_docstring(custom_intro="Base class for MoE-LLaVA outputs, with the router's logits.")
@dataclass
class MoeLlavaModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    router_logits (`tuple(torch.FloatTensor)`, *optional*, returned when `output_router_logits=True`):
        For every sparse layer the logits of shape `(batch_size * sequence_length, num_experts)` in float32.
    image_hidden_states (`torch.FloatTensor` of shape `(num_features, hidden_size)`, *optional*):
        Projected features of all images of the batch, in the order of their placeholders.
    """

    router_logits: tuple[torch.FloatTensor] | None = None
    image_hidden_states: torch.FloatTensor | None = None


@auto_docstring(custom_intro="Base class for MoE-LLaVA causal language model outputs.")
@dataclass
class MoeLlavaCausalLMOutputWithPast(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Language modeling loss plus `router_aux_loss_coef * aux_loss`.
    aux_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Balance loss, summed over the sparse layers (paper, equation 6). 1 for every layer that is balanced.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, config.text_config.vocab_size)`):
        Prediction scores of the language modeling head (scores for each vocabulary token before SoftMax).
    router_logits (`tuple(torch.FloatTensor)`, *optional*, returned when `output_router_logits=True`):
        For every sparse layer the logits of shape `(batch_size * sequence_length, num_experts)` in float32.
    past_key_values (`Cache`, *optional*, returned when `use_cache=True` is passed or when `config.use_cache=True`):
        Pre-computed hidden-states of the self-attention blocks, which speed up sequential decoding.
    image_hidden_states (`torch.FloatTensor` of shape `(num_features, hidden_size)`, *optional*):
        Projected features of all images of the batch, in the order of their placeholders.
    """

    loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor] | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None
    image_hidden_states: torch.FloatTensor | None = None


def gumbel_noise(router_logits: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise: the arg max of noisy logits is a sample of their softmax."""
    return -torch.empty_like(router_logits).exponential_().log()


def route_tokens(
    router_logits: torch.Tensor,
    num_experts_per_tok: int,
    second_expert_policy: str = "top",
    capacity_factor: float | None = None,
    min_capacity: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the experts of every token and their weights (paper, equations 3-5).

    With a capacity, first choices go before second ones and earlier tokens before later ones, in the order of the
    flattened batch (with one expert per token, any). What finds no place is dropped: its weight is 0, and the weight
    of the other choice becomes 1.

    Args:
        router_logits (`torch.Tensor` of shape `(tokens, experts)`, float32).
        num_experts_per_tok (`int`): 1 or 2.
        second_expert_policy (`str`, *optional*): `"top"`, or `"sampling"` by the probabilities of the others.
        capacity_factor (`float`, *optional*): See the configuration; None drops nothing.
        min_capacity (`int`, *optional*): Least capacity of an expert.

    Returns:
        Indices of shape `(tokens, num_experts_per_tok)` and their weights in float32.
    """
    probabilities = router_logits.softmax(dim=-1)
    top_k_index = probabilities.argmax(dim=-1, keepdim=True)
    if num_experts_per_tok == 2:
        scores = router_logits + gumbel_noise(router_logits) if second_expert_policy == "sampling" else router_logits
        second = scores.scatter(1, top_k_index, -math.inf).argmax(dim=-1, keepdim=True)
        top_k_index = torch.cat([top_k_index, second], dim=1)
    top_k_weights = probabilities.gather(1, top_k_index)
    if capacity_factor is not None:
        capacity = expert_capacity(router_logits.shape, num_experts_per_tok, capacity_factor, min_capacity)
        at_random = second_expert_policy == "sampling"
        top_k_weights = top_k_weights * _finds_place(top_k_index, router_logits.shape[1], capacity, at_random)
    if num_experts_per_tok == 2:
        total = top_k_weights.sum(dim=-1, keepdim=True)
        top_k_weights = top_k_weights / total.clamp(min=torch.finfo(torch.float32).eps)
    return top_k_index, top_k_weights


def expert_capacity(shape: torch.Size, num_experts_per_tok: int, capacity_factor: float, min_capacity: int) -> int:
    """Tokens that each expert takes of `(tokens, experts)`."""
    num_tokens, num_experts = shape
    # In the original's precision: a float64 quotient times a float32 factor
    factor = torch.tensor(capacity_factor * num_experts_per_tok, dtype=torch.float32)
    return max(math.ceil((num_tokens / num_experts) * factor), min_capacity)


def _finds_place(top_k_index: torch.Tensor, num_experts: int, capacity: int, at_random: bool) -> torch.Tensor:
    """Which choices are kept, of the shape of `top_k_index`."""
    choices = nn.functional.one_hot(top_k_index, num_experts)  # (tokens, k, experts)
    if top_k_index.shape[1] == 1:
        # One choice per token: the original draws lots for the places of a full expert. Without lots, which of the
        # equal ones it keeps is left to `topk`.
        priority = choices[:, 0].float() * (torch.rand_like(choices[:, 0].float()) if at_random else 1.0)
        kept = priority.topk(min(capacity, len(priority)), dim=0).indices
        return torch.zeros_like(priority).scatter(0, kept, 1.0).gather(1, top_k_index)
    before_in_class = choices.cumsum(dim=0) - choices
    in_earlier_classes = choices.sum(dim=0).cumsum(dim=0) - choices.sum(dim=0)
    position = ((before_in_class + in_earlier_classes) * choices).sum(dim=-1)
    return position < capacity


def balance_loss(router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Balance loss, summed over layers (paper, equation 6): `experts * sum(share of tokens * probability)`.

    Args:
        router_logits (`tuple[torch.Tensor]`): For every layer `(batch_size * sequence_length, experts)`.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 where a token is
            padding and does not count.

    Returns:
        `torch.Tensor`: A float32 scalar.
    """
    total = torch.zeros((), device=router_logits[0].device)
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        first = nn.functional.one_hot(probabilities.argmax(dim=-1), logits.shape[-1]).float()
        if attention_mask is not None:
            weights = attention_mask.reshape(-1, 1).to(logits.device, torch.float32)
            # Shares, not sums: nothing grows with the number of tokens.
            weights = weights / weights.sum().clamp(min=1.0)
        else:
            weights = torch.full_like(probabilities[:, :1], 1 / len(probabilities))
        layer = ((weights * probabilities).sum(dim=0) * (weights * first).sum(dim=0)).sum() * logits.shape[-1]
        total = total + layer.to(total.device)
    return total


class MoeLlavaRouter(nn.Module):
    """Scores the experts, always in float32, under autocast too."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float())


def activation(config) -> nn.Module:
    """That of `config.hidden_act`, but `gelu_new` by one kernel: in float16 its formula overflows, in the gradient."""
    return ACT2FN["gelu_pytorch_tanh" if config.hidden_act == "gelu_new" else config.hidden_act]


def _run_experts(experts: nn.Module, hidden_states, top_k_index, top_k_weights, run_expert) -> torch.Tensor:
    """The eager implementation: one expert after the other, in the activations' dtype."""
    output = torch.zeros_like(hidden_states)
    for expert in range(experts.num_experts):
        tokens, choice = torch.where(top_k_index == expert)
        expert_output = run_expert(hidden_states[tokens], expert) * top_k_weights[tokens, choice, None]
        output = output.index_add(0, tokens, expert_output.to(output.dtype))
    return output


@use_experts_implementation
class MoeLlavaExperts(nn.Module):
    """Gated experts, packed: two linear layers without biases, the first with its gate before it."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(
            torch.zeros(config.num_experts, 2 * config.intermediate_size, config.hidden_size)
        )
        self.down_proj = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size, config.intermediate_size))
        self.act_fn = activation(config)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        def run_expert(tokens, expert):
            gate, up = nn.functional.linear(tokens, self.gate_up_proj[expert]).chunk(2, dim=-1)
            return nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])

        return _run_experts(self, hidden_states, top_k_index, top_k_weights, run_expert)


@use_experts_implementation(has_gate=False, has_bias=True)
class MoeLlavaPhiExperts(nn.Module):
    """Phi's experts, packed: two linear layers with biases around an activation."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.up_proj = nn.Parameter(torch.zeros(config.num_experts, config.intermediate_size, config.hidden_size))
        self.up_proj_bias = nn.Parameter(torch.zeros(config.num_experts, config.intermediate_size))
        self.down_proj = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size, config.intermediate_size))
        self.down_proj_bias = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.act_fn = activation(config)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        def run_expert(tokens, expert):
            inner = self.act_fn(nn.functional.linear(tokens, self.up_proj[expert], self.up_proj_bias[expert]))
            return nn.functional.linear(inner, self.down_proj[expert], self.down_proj_bias[expert])

        return _run_experts(self, hidden_states, top_k_index, top_k_weights, run_expert)


class MoeLlavaSparseMoeBlock(nn.Module):
    """Replaces the feed-forward network of a layer, which it keeps beside the experts with `use_residual`."""

    def __init__(self, config, experts_class: type[nn.Module], dense_mlp: nn.Module):
        super().__init__()
        self.config = config
        self.gate = MoeLlavaRouter(config)
        self.experts = experts_class(config)
        # CODEPATH: no release has residual experts; the original offers them
        if config.use_residual:
            self.residual_mlp = dense_mlp
            self.coefficient = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shape = hidden_states.shape
        tokens = hidden_states.reshape(-1, shape[-1])
        config = self.config
        top_k_index, top_k_weights = route_tokens(
            self.gate(tokens),
            config.num_experts_per_tok,
            config.second_expert_policy,
            config.capacity_factor if self.training else config.eval_capacity_factor,
            config.min_capacity,
        )
        output = self.experts(tokens, top_k_index, top_k_weights.to(tokens.dtype))
        # CODEPATH: no release has residual experts; the original offers them
        if config.use_residual:
            shares = self.coefficient(tokens).softmax(dim=-1, dtype=torch.float32).to(tokens.dtype)
            output = output * shares[:, :1] + self.residual_mlp(tokens) * shares[:, 1:]
        return output.reshape(shape)


class SparseTextModelMixin:
    """Puts experts into the chosen layers of an in-tree text model, before whose class it stands."""

    _experts_class: ClassVar[type[nn.Module]] = MoeLlavaExperts
    # transformers keeps this answer on the class that it asked, and a subclass inherits it: without it, a dense Llama
    # that was asked before in the same process would answer for this one.
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            if hasattr(layer.mlp, "activation_fn"):  # Phi's
                layer.mlp.activation_fn = activation(config)
        for layer in config.moe_layers:
            dense_mlp = self.layers[layer].mlp
            self.layers[layer].mlp = MoeLlavaSparseMoeBlock(config, self._experts_class, dense_mlp)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_sparse_weights(module, self.config)


def init_sparse_weights(module: nn.Module, config) -> None:
    """Initialises what the in-tree text models do not know: packed experts, and the router as the original does."""
    if isinstance(module, MoeLlavaRouter):
        bound = module.weight.shape[1] ** -0.5
        init.uniform_(module.weight, -bound, bound)
    elif isinstance(module, (MoeLlavaExperts, MoeLlavaPhiExperts)):
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, std=config.initializer_range)


@auto_docstring(
    custom_intro="""
    A Phi whose chosen layers have experts, without a language modeling head.

    Source: MoE-LLaVA's section 3.2; transformers' `PhiModel`.
    """
)
class MoeLlavaPhiModel(SparseTextModelMixin, PhiModel):
    config: MoeLlavaPhiConfig
    _experts_class = MoeLlavaPhiExperts
    _can_record_outputs = {**PhiModel._can_record_outputs, "router_logits": OutputRecorder(MoeLlavaRouter, index=0)}


class MoeLlavaStableLmDecoderLayer(StableLmDecoderLayer):
    """The in-tree layer, but with its attention given all that an attention backend passes through the model."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        normalised = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normalised, **kwargs)
        # CODEPATH: StableLM-2-1.6B, of all releases, is sequential; StableLM-2-12B is parallel
        if self.use_parallel_residual:
            return hidden_states + attended + self.dropout(self.mlp(normalised))
        hidden_states = hidden_states + attended
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


@auto_docstring(
    custom_intro="""
    A StableLM whose chosen layers have experts, without a language modeling head.

    Source: MoE-LLaVA's section 3.2; transformers' `StableLmModel`.
    """
)
class MoeLlavaStableLmModel(SparseTextModelMixin, StableLmModel):
    config: MoeLlavaStableLmConfig
    _supports_attention_backend = True
    _no_split_modules = ["MoeLlavaStableLmDecoderLayer"]
    _can_record_outputs = {
        **StableLmModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeLlavaRouter, index=0),
    }

    def __init__(self, config: MoeLlavaStableLmConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.__class__ = MoeLlavaStableLmDecoderLayer


@auto_docstring(
    custom_intro="""
    A Qwen2, as which Qwen-1 is converted, whose chosen layers have experts, without a language modeling head.

    Source: MoE-LLaVA's section 3.2; transformers' `Qwen2Model`.
    """
)
class MoeLlavaQwen2Model(SparseTextModelMixin, Qwen2Model):
    config: MoeLlavaQwen2Config
    _can_record_outputs = {**Qwen2Model._can_record_outputs, "router_logits": OutputRecorder(MoeLlavaRouter, index=0)}


@auto_docstring(
    custom_intro="""
    A Llama whose chosen layers have experts, without a language modeling head.

    Source: MoE-LLaVA's section 3.2; transformers' `LlamaModel`.
    """
)
class MoeLlavaLlamaModel(SparseTextModelMixin, LlamaModel):
    config: MoeLlavaLlamaConfig
    _can_record_outputs = {**LlamaModel._can_record_outputs, "router_logits": OutputRecorder(MoeLlavaRouter, index=0)}


@auto_docstring(
    custom_intro="""
    A Mistral whose chosen layers have experts, without a language modeling head.

    Source: MoE-LLaVA's section 3.2; transformers' `MistralModel`.
    """
)
class MoeLlavaMistralModel(SparseTextModelMixin, MistralModel):
    config: MoeLlavaMistralConfig
    _can_record_outputs = {
        **MistralModel._can_record_outputs,
        "router_logits": OutputRecorder(MoeLlavaRouter, index=0),
    }


TEXT_MODELS = {
    model.config_class.model_type: model
    for model in (
        MoeLlavaPhiModel,
        MoeLlavaStableLmModel,
        MoeLlavaQwen2Model,
        MoeLlavaLlamaModel,
        MoeLlavaMistralModel,
    )
}


def build_text_model(config) -> PreTrainedModel:
    """Own text models by their class, since a remote-code repository registers none; others by AutoModel."""
    # CODEPATH: releases have experts; a stage-2 checkpoint, before it is upcycled, has an in-tree text model
    if config.model_type in TEXT_MODELS:
        return TEXT_MODELS[config.model_type]._from_config(config)
    return AutoModel.from_config(config)


@auto_docstring(
    custom_intro="""
    What the models of MoE-LLaVA share: loading, and the choice of attention.

    Source: transformers' `PreTrainedModel`.
    """
)
class MoeLlavaPreTrainedModel(UntrustedCheckpointMixin, FlashAttentionByDefaultMixin, PreTrainedModel):
    config: MoeLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # transformers remembers here what renamed the weights that it loaded, and reverses it to save them. The originals
    # have one layout for each backbone, which only their `config.json` tells apart; `save_pretrained` writes a native
    # one, hence native weights, always.
    @property
    def _weight_conversions(self) -> list:
        return []

    @_weight_conversions.setter
    def _weight_conversions(self, value: list) -> None:
        pass

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers distrusts initialisation outside of its package, and would leave CLIP's missing weights at the
        # default scale. Ours goes through `transformers.initialization`, as it asks for.
        return cls.is_remote_code()


@auto_docstring(
    custom_intro="""
    The MoE-LLaVA model which consists of a vision backbone, a projector and a sparse language model, without a
    language modeling head.

    Source: MoE-LLaVA's section 3 and the original code; transformers' `LlavaModel`.
    """
)
class MoeLlavaModel(SquareOrSlicesMixin, MoeLlavaPreTrainedModel):
    def __init__(self, config: MoeLlavaConfig):
        super().__init__(config)
        self.add_vision(config)
        self.language_model = build_text_model(config.text_config)
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    @auto_docstring(custom_intro="Encodes images and maps their features to the text model's width.")
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        image_grids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.FloatTensor`):
            Of shape `(num_images, num_channels, height, width)` for `"square"`, or
            `(total_patches, num_channels * patch_size**2)` for `"slices"`.
        image_grids (`torch.LongTensor` of shape `(num_images, 3, 2)`, *optional*):
            Slices and patches of every image, for `"slices"`; see [`LlavaUhdModel`].

        Returns:
            `BaseModelOutputWithPooling`: With `pooler_output`, for every image a tensor of shape `(num_features,
            hidden_size)`.
        """
        return self.encode_images(pixel_values, image_grids, **kwargs)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_router_logits: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MoeLlavaModelOutputWithPast:
        r"""
        pixel_values (`torch.FloatTensor`, *optional*):
            Of shape `(num_images, num_channels, height, width)` for `"square"`, or
            `(total_patches, num_channels * patch_size**2)` for `"slices"`.
        image_grids (`torch.LongTensor` of shape `(num_images, 3, 2)`, *optional*):
            Slices and patches of every image, for `"slices"`.
        """
        fields = self.run_text_model(
            input_ids,
            pixel_values,
            image_grids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            output_router_logits,
            mm_encoder_outputs,
            **kwargs,
        )
        return MoeLlavaModelOutputWithPast(**fields)


@auto_docstring(
    custom_intro="""
    The MoE-LLaVA model (arXiv 2401.15947): a vision-language model whose language model sends every token to a few of
    many experts.

    Source: MoE-LLaVA's section 3 and the original code; transformers' `LlavaForConditionalGeneration`.
    """
)
class MoeLlavaForCausalLM(MoeLlavaPreTrainedModel, PlaceholderGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MoeLlavaConfig):
        super().__init__(config)
        self.model = MoeLlavaModel(config)
        # Without a bias also for Phi: the releases were fine-tuned without the one that Phi-2 has.
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """
        Gives the language modeling head.

        Returns:
            `nn.Linear`: From `hidden_size` to the text model's vocabulary.
        """
        return self.lm_head

    def adjust_generation_fn(self, *args, **kwargs):
        """
        Sets generation up when the model is loaded, as in transformers, with the text model's special tokens where
        there are none.
        """
        super().adjust_generation_fn(*args, **kwargs)
        # Where generation settings do not tell how an answer ends, as those of the Phi releases, the model does.
        for name in ("eos_token_id", "pad_token_id"):
            if getattr(self.generation_config, name, None) is None:
                setattr(self.generation_config, name, getattr(self.config.text_config, name, None))

    @auto_docstring
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        image_grids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.FloatTensor`):
            Of shape `(num_images, num_channels, height, width)` for `"square"`, or
            `(total_patches, num_channels * patch_size**2)` for `"slices"`.
        image_grids (`torch.LongTensor` of shape `(num_images, 3, 2)`, *optional*):
            Slices and patches of every image, for `"slices"`.
        """
        return self.model.get_image_features(pixel_values=pixel_values, image_grids=image_grids, **kwargs)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MoeLlavaCausalLMOutputWithPast:
        r"""
        pixel_values (`torch.FloatTensor`, *optional*):
            Of shape `(num_images, num_channels, height, width)` for `"square"`, or
            `(total_patches, num_channels * patch_size**2)` for `"slices"`.
        image_grids (`torch.LongTensor` of shape `(num_images, 3, 2)`, *optional*):
            Slices and patches of every image, for `"slices"`.

        With `labels`, the loss has the balance loss in it, a mean over the tokens of this call. Where `Trainer` passes
        `num_items_in_batch`, it counts by this call's share of them: gradient accumulation averages it, as it does the
        original's.
        """
        return_router_logits = (
            self.config.output_router_logits if output_router_logits is None else output_router_logits
        )
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grids=image_grids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_router_logits=return_router_logits or labels is not None,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        aux_loss = None
        if outputs.router_logits is not None:
            # CODEPATH: the released code counts padding; its releases are fine-tuned from here without
            counted = None if self.config.text_config.aux_loss_includes_padding else attention_mask
            counted = counted_tokens(counted, outputs.last_hidden_state.shape[1])
            aux_loss = balance_loss(outputs.router_logits, counted)
            if labels is not None:
                coefficient = self.config.router_aux_loss_coef
                loss = add_balance_loss(loss, aux_loss, coefficient, labels, kwargs.get("num_items_in_batch"))
        return MoeLlavaCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            router_logits=outputs.router_logits if return_router_logits else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


# Classes outside of transformers inherit no conversion: https://github.com/huggingface/transformers/pull/46876
register_checkpoint_conversion_mapping(MoeLlavaConfig.model_type, original_weight_mapping(), overwrite=True)


__all__ = [
    "MoeLlavaForCausalLM",
    "MoeLlavaLlamaModel",
    "MoeLlavaMistralModel",
    "MoeLlavaModel",
    "MoeLlavaPhiModel",
    "MoeLlavaPreTrainedModel",
    "MoeLlavaQwen2Model",
    "MoeLlavaStableLmModel",
]
