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
"""PyTorch LLaVA-MoLE model: a vision tower, a projector, and a Llama adapted by a mixture of LoRA experts.

Design choices:
- The text model is the in-tree Llama; linear layers that have adapters keep their own weights under their usual names.
- Adapters of the attention are mixtures of one expert, hence plain LoRA, and go when they are merged.
- Image features stand between two learned embeddings, which have placeholders like any feature.
- The balance loss follows from the router's logits alone, so it is computed once behind all layers.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.llama.modeling_llama import LlamaModel  # trf-ignore: TRF009
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
from .configuration_llava_mole import LlavaMoleConfig, LlavaMoleTextConfig
from .layers_llava_mole import MoleExperts, MoleLinear, MoleMLP, MoleRouter, balance_loss, check_routers_learn


@auto_docstring(custom_intro="Base class for LLaVA-MoLE outputs, with the router's logits.")
@dataclass
class LlavaMoleModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    router_logits (`tuple(torch.FloatTensor)`, *optional*, returned when `output_router_logits=True`):
        For every layer the logits of shape `(batch_size, sequence_length, num_experts)` in float32.
    image_hidden_states (`torch.FloatTensor` of shape `(num_features, hidden_size)`, *optional*):
        Projected features of all images of the batch with their start and end embeddings, in the order of their
        placeholders.
    """

    router_logits: tuple[torch.FloatTensor] | None = None
    image_hidden_states: torch.FloatTensor | None = None


@auto_docstring(custom_intro="Base class for LLaVA-MoLE causal language model outputs.")
@dataclass
class LlavaMoleCausalLMOutputWithPast(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Language modeling loss plus `router_aux_loss_coef * aux_loss`.
    aux_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Balance loss, not yet weighted; see [`LlavaMoleTextConfig`] for its two forms. None with one expert.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, config.text_config.vocab_size)`):
        Prediction scores of the language modeling head (scores for each vocabulary token before SoftMax).
    router_logits (`tuple(torch.FloatTensor)`, *optional*, returned when `output_router_logits=True`):
        For every layer the logits of shape `(batch_size, sequence_length, num_experts)` in float32.
    past_key_values (`Cache`, *optional*, returned when `use_cache=True` is passed or when `config.use_cache=True`):
        Pre-computed hidden-states of the self-attention blocks, which speed up sequential decoding.
    image_hidden_states (`torch.FloatTensor` of shape `(num_features, hidden_size)`, *optional*):
        Projected features of all images of the batch with their start and end embeddings, in the order of their
        placeholders.
    """

    loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor] | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None
    image_hidden_states: torch.FloatTensor | None = None


@torch.no_grad()
def init_mole_weights(module: nn.Module) -> None:
    """Initialises experts and routers as the original does: at first no expert adds anything."""
    if isinstance(module, MoleExperts):
        bound = module.in_features**-0.5
        init.uniform_(module.weight_A, -bound, bound)
        init.zeros_(module.weight_B)
    elif isinstance(module, MoleRouter):
        bound = module.in_features**-0.5
        init.uniform_(module.weight, -bound, bound)
        init.uniform_(module.bias, -bound, bound)


@auto_docstring(
    custom_intro="""
    A Llama whose linear layers have LoRA experts, without a language modeling head.

    Source: LLaVA-MoLE's section 3 and the original code; transformers' `LlamaModel`.
    """
)
class LlavaMoleTextModel(LlamaModel):
    config: LlavaMoleTextConfig
    _can_record_outputs = {**LlamaModel._can_record_outputs, "router_logits": OutputRecorder(MoleRouter, index=0)}

    def __init__(self, config: LlavaMoleTextConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = MoleMLP(config, layer.mlp.act_fn)
            for name in config.attention_target_modules:
                dense = getattr(layer.self_attn, name)
                adapted = MoleLinear(
                    dense.in_features,
                    dense.out_features,
                    bias=dense.bias is not None,
                    r=config.r,
                    lora_alpha=config.lora_alpha,
                    lora_dropout=config.lora_dropout,
                )
                setattr(layer.self_attn, name, adapted)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_mole_weights(module)


def build_text_model(config) -> PreTrainedModel:
    """The own text model by its class, since a remote-code repository registers none; others by AutoModel."""
    # CODEPATH: the original's checkpoint has experts; a model to be adapted by a tuner is any in-tree text model
    if config.model_type == LlavaMoleTextConfig.model_type:
        return LlavaMoleTextModel._from_config(config)
    return AutoModel.from_config(config)


class LlavaMoleImageBoundaries(nn.Module):
    """The learned embeddings before and behind the features of every image."""

    def __init__(self, config: LlavaMoleConfig):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, 1, config.text_config.hidden_size))
        self.end = nn.Parameter(torch.zeros(1, 1, config.text_config.hidden_size))

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(num_features, hidden_size)` to `(1 + num_features + 1, hidden_size)`."""
        start, end = (embedding[0].to(image_features) for embedding in (self.start, self.end))
        return torch.cat([start, image_features, end])


@auto_docstring(
    custom_intro="""
    What the models of LLaVA-MoLE share: initialisation, loading, and the choice of attention.

    Source: transformers' `PreTrainedModel`.
    """
)
class LlavaMolePreTrainedModel(UntrustedCheckpointMixin, FlashAttentionByDefaultMixin, PreTrainedModel):
    config: LlavaMoleConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers distrusts initialisation outside of its package, and would leave CLIP's missing weights at the
        # default scale. Ours goes through `transformers.initialization`, as it asks for.
        return cls.is_remote_code()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LlavaMoleImageBoundaries):
            for embedding in (module.start, module.end):
                init.normal_(embedding, std=embedding.shape[-1] ** -0.5)


@auto_docstring(
    custom_intro="""
    The LLaVA-MoLE model which consists of a vision backbone, a projector and a language model with LoRA experts,
    without a language modeling head.

    Source: LLaVA-MoLE's section 3 and the original code; transformers' `LlavaModel`.
    """
)
class LlavaMoleModel(SquareOrSlicesMixin, LlavaMolePreTrainedModel):
    def __init__(self, config: LlavaMoleConfig):
        super().__init__(config)
        self.add_vision(config)
        self.image_boundaries = LlavaMoleImageBoundaries(config)
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
            `BaseModelOutputWithPooling`: With `pooler_output`, for every image a tensor of shape `(1 + num_features +
            1, hidden_size)` with the start and end embeddings around the features.
        """
        outputs = self.encode_images(pixel_values, image_grids, **kwargs)
        outputs.pooler_output = [self.image_boundaries(features) for features in outputs.pooler_output]
        return outputs

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
    ) -> tuple | LlavaMoleModelOutputWithPast:
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
        return LlavaMoleModelOutputWithPast(**fields)


class NewTokensRepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """Penalises what was generated, and the BOS token, but nothing of the prompt.

    The original generates from embeddings, so its penalty sees no prompt; but it sees the BOS token that transformers
    4 put in the prompt's place.
    """

    def __init__(self, penalty: float, prompt_length: int, bos_token_id: int | None):
        super().__init__(penalty)
        self.prompt_length, self.bos_token_id = prompt_length, bos_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        penalised = input_ids[:, self.prompt_length :]
        if self.bos_token_id is not None:
            penalised = torch.nn.functional.pad(penalised, (1, 0), value=self.bos_token_id)
        return super().__call__(penalised, scores)


@auto_docstring(
    custom_intro="""
    The LLaVA-MoLE model (arXiv 2401.16160): a vision-language model adapted by LoRA, where a router sends every token
    to one of several LoRA experts of each feed-forward network.

    Source: LLaVA-MoLE's section 3 and the original code; transformers' `LlavaForConditionalGeneration`.
    """
)
class LlavaMoleForCausalLM(LlavaMolePreTrainedModel, PlaceholderGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LlavaMoleConfig):
        super().__init__(config)
        self.model = LlavaMoleModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """
        Gives the language modeling head.

        Returns:
            `nn.Linear`: From `hidden_size` to the text model's vocabulary.
        """
        return self.lm_head

    def _get_logits_processor(self, generation_config, input_ids_seq_length=None, *args, **kwargs):
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, *args, **kwargs)
        return LogitsProcessorList(
            NewTokensRepetitionPenalty(
                processor.penalty, input_ids_seq_length or 0, self.config.text_config.bos_token_id
            )
            if type(processor) is RepetitionPenaltyLogitsProcessor
            else processor
            for processor in processors
        )

    def _are_routers_trained(self) -> list[bool]:
        routers = [module for module in self.model.language_model.modules() if isinstance(module, MoleRouter)]
        return [router.weight.requires_grad or router.bias.requires_grad for router in routers]

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
    ) -> tuple | LlavaMoleCausalLMOutputWithPast:
        r"""
        pixel_values (`torch.FloatTensor`, *optional*):
            Of shape `(num_images, num_channels, height, width)` for `"square"`, or
            `(total_patches, num_channels * patch_size**2)` for `"slices"`.
        image_grids (`torch.LongTensor` of shape `(num_images, 3, 2)`, *optional*):
            Slices and patches of every image, for `"slices"`.

        With `labels`, the loss has the balance loss in it. Where `Trainer` passes `num_items_in_batch`, it counts by
        this call's share of them: gradient accumulation averages it.
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
        # With one expert there is nothing to balance.
        if outputs.router_logits is not None and outputs.router_logits[0].shape[-1] > 1:
            counted = counted_tokens(attention_mask, outputs.last_hidden_state.shape[1])
            aux_loss = balance_loss(outputs.router_logits, counted, self.config.text_config.balance_loss)
            if labels is not None:
                check_routers_learn(outputs.router_logits, self._are_routers_trained())
                coefficient = self.config.router_aux_loss_coef
                loss = add_balance_loss(loss, aux_loss, coefficient, labels, kwargs.get("num_items_in_batch"))
        return LlavaMoleCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            router_logits=outputs.router_logits if return_router_logits else None,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


__all__ = ["LlavaMoleForCausalLM", "LlavaMoleModel", "LlavaMolePreTrainedModel", "LlavaMoleTextModel"]
