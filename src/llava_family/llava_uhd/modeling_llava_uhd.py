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
"""PyTorch LLaVA-UHD model: CLIP over views of any shape, a resampler to equally many features per view, a text model.

Design choices:
- All views of a batch are packed into one sequence, so every linear layer is one matrix product. Only attention looks
  at single views: equal shapes are stacked, or, under flash attention, all of them run at once by `cu_seq_lens`.
  Nothing is padded and nothing is masked, as in the original, which encodes one view at a time.
- RoI align with axis-parallel regions on a regular grid is separable: two small matrices per patch grid sample the
  maps of all views at once, exactly as the compiled kernel that the weights were trained with. Keys and values are
  projected before they are sampled, for both are linear and a view has at most two thirds as many patches as samples.
- The image placeholder is no entry of the vocabulary. Logits, loss and generation are those of the original text
  model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.generation import (
    CandidateGenerator,
    GenerationMixin,
    LogitsProcessorList,
    PromptLookupCandidateGenerator,
)
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import AutoModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, logging, torch_compilable_check
from transformers.utils.generic import (
    can_return_tuple,
    is_flash_attention_requested,
    maybe_autocast,
    merge_with_config_defaults,
)
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_llava_uhd import LlavaUhdConfig, LlavaUhdVisionConfig
from .loading_llava_uhd import InvalidCheckpointError, loading
from .weight_mapping_llava_uhd import original_weight_mapping, unused_original_weights


logger = logging.get_logger(__name__)


# (width, height) of the samples per region, in the original's order: the first of equally good ones wins.
POOLING_SIZES = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))


# Patches that a CPU encodes at once: about two views of the released model
MAX_CPU_PATCHES = 1152


@auto_docstring(custom_intro="Base class for LLaVA-UHD outputs, with hidden states of image and text.")
@dataclass
class LlavaUhdModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    image_hidden_states (`torch.FloatTensor` of shape `(num_features, hidden_size)`, *optional*):
        Resampled features of all images of the batch, in the order of their placeholders.
    """

    image_hidden_states: torch.FloatTensor | None = None


@auto_docstring(custom_intro="Base class for LLaVA-UHD causal language model outputs.")
@dataclass
class LlavaUhdCausalLMOutputWithPast(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Language modeling loss (for next-token prediction).
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, config.text_config.vocab_size)`):
        Prediction scores of the language modeling head (scores for each vocabulary token before SoftMax).
    past_key_values (`Cache`, *optional*, returned when `use_cache=True` is passed or when `config.use_cache=True`):
        Pre-computed hidden-states of the self-attention blocks, which speed up sequential decoding.
    image_hidden_states (`torch.FloatTensor` of shape `(num_features, hidden_size)`, *optional*):
        Resampled features of all images of the batch, in the order of their placeholders.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None
    image_hidden_states: torch.FloatTensor | None = None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `(batch, heads, length, head_dim)` states without a mask: a view attends to itself alone."""
    # Scaled before the product, as in the originals, which float16 would overflow at sooner.
    attention_weights = torch.matmul(query * scaling, key.transpose(-1, -2))
    attention_weights = nn.functional.softmax(attention_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attention_weights = nn.functional.dropout(attention_weights, p=dropout, training=module.training)
    attention_output = torch.matmul(attention_weights, value).transpose(1, 2).contiguous()
    return attention_output, attention_weights


def packed_attention(
    module: nn.Module,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    groups: list[tuple[int, int, int]],
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor | tuple[torch.Tensor, ...] | None]:
    """Attention within the sequences that `groups` names, in packed states.

    Args:
        module (`nn.Module`): The attention layer, with `config`, `scaling` and `is_causal`.
        queries (`torch.Tensor` of shape `(total_query_length, heads, head_dim)`): All sequences, one behind the other.
        keys, values (`torch.Tensor` of shape `(total_key_length, heads, head_dim)`): Likewise.
        groups (`list[tuple[int, int, int]]`): `(sequences, query length, key length)` of consecutive equal sequences.

    Returns:
        `torch.Tensor` of shape `(total_query_length, heads * head_dim)`, and, where the attention implementation has
        them, the weights of shape `(sequences, heads, query length, key length)`, one tensor for each group.
    """
    attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    kwargs = {"scaling": module.scaling, "dropout": dropout, "is_causal": False, **kwargs}

    if is_flash_attention_requested(module.config):
        query_lengths = [query_length for count, query_length, _ in groups for _ in range(count)]
        key_lengths = [key_length for count, _, key_length in groups for _ in range(count)]
        states = [state.transpose(0, 1).unsqueeze(0) for state in (queries, keys, values)]
        output, _ = attention_interface(
            module,
            *states,
            attention_mask=None,
            cu_seq_lens_q=_cumulative(query_lengths, queries.device),
            cu_seq_lens_k=_cumulative(key_lengths, keys.device),
            max_length_q=max(query_lengths),
            max_length_k=max(key_lengths),
            **kwargs,
        )
        return output.reshape(queries.shape[0], -1), None

    outputs, weights, query_start, key_start = [], [], 0, 0
    for count, query_length, key_length in groups:
        query_end, key_end = query_start + count * query_length, key_start + count * key_length
        query = queries[query_start:query_end].unflatten(0, (count, query_length)).transpose(1, 2)
        key = keys[key_start:key_end].unflatten(0, (count, key_length)).transpose(1, 2)
        value = values[key_start:key_end].unflatten(0, (count, key_length)).transpose(1, 2)
        output, group_weights = attention_interface(module, query, key, value, attention_mask=None, **kwargs)
        outputs.append(output.reshape(count * query_length, -1))
        weights.append(group_weights)
        query_start, key_start = query_end, key_end
    if any(group_weights is None for group_weights in weights):
        return torch.cat(outputs), None
    return torch.cat(outputs), weights[0] if len(weights) == 1 else tuple(weights)


def _cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def _consecutive(grids: list[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    """Runs of equal patch grids: `(grid, number of views)`."""
    return [(grid, len(list(run))) for grid, run in groupby(grids)]


def resize_positions(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A square `(side**2, dim)` table, bicubic, for a `(rows, columns)` grid: `(rows * columns, dim)`."""
    side = math.isqrt(len(table))
    square = table.view(1, side, side, -1).permute(0, 3, 1, 2)  # channels last: twice as fast on a CPU
    resized = nn.functional.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2)


class LlavaUhdPatchEmbedding(nn.Conv2d):
    """CLIP's patch convolution, of patches that are cut out already: one matrix product."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(patches.to(self.weight.dtype), self.weight.flatten(1))


class LlavaUhdPositionEmbedding(nn.Embedding):
    """CLIP's position table, of any patch grid."""

    def forward(self, grid: tuple[int, int]) -> torch.Tensor:  # type: ignore[override]  # looked up by grid, not by id
        """Positions of the class embedding and of a `(rows, columns)` grid, `(1 + rows * columns, hidden_size)`.

        They are resized in the table's own dtype.
        """
        side = math.isqrt(self.num_embeddings - 1)
        if grid == (side, side):
            return self.weight
        return torch.cat([self.weight[:1], resize_positions(self.weight[1:], grid)])


class LlavaUhdVisionEmbeddings(nn.Module):
    def __init__(self, config: LlavaUhdVisionConfig):
        super().__init__()
        self.config = config
        num_positions = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = LlavaUhdPatchEmbedding(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, bias=False
        )
        self.position_embedding = LlavaUhdPositionEmbedding(num_positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, view_grids: list[tuple[int, int]]) -> torch.Tensor:
        patches, embeddings, start = self.patch_embedding(pixel_values), [], 0
        for grid, count in _consecutive(view_grids):
            end = start + count * grid[0] * grid[1]
            stacked = patches[start:end].unflatten(0, (count, -1))
            class_embeddings = self.class_embedding.expand(count, 1, -1)
            stacked = torch.cat([class_embeddings, stacked], dim=1) + self.position_embedding(grid)
            embeddings.append(stacked.flatten(0, 1))
            start = end
        return torch.cat(embeddings)  # (total_length, hidden_size)


class LlavaUhdVisionAttention(nn.Module):
    def __init__(self, config: LlavaUhdVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.num_key_value_groups = 1
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        groups: list[tuple[int, int, int]],
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | tuple[torch.Tensor, ...] | None]:
        queries, keys, values = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = packed_attention(self, queries, keys, values, groups, dropout=dropout, **kwargs)
        return self.out_proj(output), weights


class LlavaUhdVisionMLP(nn.Module):
    def __init__(self, config: LlavaUhdVisionConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class LlavaUhdVisionEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LlavaUhdVisionConfig):
        super().__init__()
        self.self_attn = LlavaUhdVisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LlavaUhdVisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        groups: list[tuple[int, int, int]],
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(self.layer_norm1(hidden_states), groups, **kwargs)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class LlavaUhdVisionEncoder(nn.Module):
    def __init__(self, config: LlavaUhdVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList([LlavaUhdVisionEncoderLayer(config) for _ in range(config.num_feature_layers)])
        self.gradient_checkpointing = False


def preferred_flash_attention(dtype: torch.dtype) -> str | None:
    """
    The flash attention that runs in `dtype` on this machine's CUDA device and is installed, the most complete one
    first.
    """
    if dtype not in (torch.float16, torch.bfloat16) or not torch.cuda.is_available():
        return None
    major, _ = torch.cuda.get_device_capability()
    for version, needs in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items():
        if major >= needs.get("cuda_min_major_version", 8) and needs["general_availability_check"]():
            return f"flash_attention_{version}"
    logger.warning_once(
        "Attention runs by `sdpa`, since no flash attention is installed. `pip install flash-attn` makes images of "
        "many views, and long prompts, faster."
    )
    return None


class FlashAttentionByDefaultMixin:
    """Where nothing was asked for, flash attention if it can run, for vision, resampler and text alike."""

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, allow_all_kernels: bool = False
    ) -> str:
        if attn_implementation is None and is_init_check:
            # While `from_pretrained` builds a model, the default dtype is that of its weights.
            attn_implementation = preferred_flash_attention(torch.get_default_dtype())
            if attn_implementation is not None:
                logger.info_once(f'Attention runs by `{attn_implementation}`; `attn_implementation="sdpa"` opts out.')
                self.config._attn_implementation = attn_implementation  # and of its parts, which are built after this
        # Of `PreTrainedModel`, which stands behind this class
        check = super()._check_and_adjust_attn_implementation  # type: ignore[misc]
        return check(attn_implementation, is_init_check, allow_all_kernels)


class UntrustedCheckpointMixin:
    """Loads a checkpoint as it is meant, or raises a `ValueError` or an `OSError`, before it fills the memory."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        with loading(f"The model in {pretrained_model_name_or_path}"):
            # Of `PreTrainedModel`, which stands behind this class
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        # transformers makes tensors of these sizes first, and raises afterwards.
        if loading_info.mismatched_keys and not load_config.ignore_mismatched_sizes:
            sizes = [
                f"{name} is {tuple(found)} there, but {tuple(expected)} by its configuration"
                for name, found, expected in sorted(loading_info.mismatched_keys)[:4]
            ]
            raise InvalidCheckpointError(
                f"{len(loading_info.mismatched_keys)} tensors of {load_config.pretrained_model_name_or_path} have "
                f"other sizes than the model: {'; '.join(sizes)}. `ignore_mismatched_sizes=True` makes these anew."
            )
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)


@auto_docstring(
    custom_intro="""
    What the models of LLaVA-UHD share: initialisation, loading, and the choice of attention.

    Source: initialisation as in the original code; transformers' `PreTrainedModel`.
    """
)
class LlavaUhdPreTrainedModel(UntrustedCheckpointMixin, FlashAttentionByDefaultMixin, PreTrainedModel):
    config: LlavaUhdConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlavaUhdVisionEmbeddings", "LlavaUhdVisionEncoderLayer", "LlavaUhdResampler"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LlavaUhdVisionEmbeddings):
            init.normal_(module.class_embedding, std=module.config.hidden_size**-0.5)
        elif isinstance(module, LlavaUhdResampler):
            init.trunc_normal_(module.query, std=0.02)
            init.copy_(module.pos_embed, sincos_positions(*module.pos_embed.shape))
            init.normal_(module.output_proj.weight, std=module.output_proj.in_features**-0.5)
            for projection in (module.kv_proj, module.attention.out_proj):
                if isinstance(projection, nn.Linear):
                    init.trunc_normal_(projection.weight, std=0.02)
        elif isinstance(module, LlavaUhdResamplerAttention):
            # Xavier of the original's stacked (3 * hidden_size, hidden_size) projection
            bound = math.sqrt(6 / (4 * module.q_proj.in_features))
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.uniform_(projection.weight, -bound, bound)


@auto_docstring(
    custom_intro="""
    The CLIP vision transformer of LLaVA-UHD, for views of any shape: its position table is interpolated to each view's
    patch grid. It ends with the layer that `config.vision_feature_layer` names.

    Source: the paper's section 3.2; transformers' `CLIPVisionModel`.
    """
)
class LlavaUhdVisionModel(LlavaUhdPreTrainedModel):
    config: LlavaUhdVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {
        "hidden_states": LlavaUhdVisionEncoderLayer,
        "attentions": OutputRecorder(LlavaUhdVisionAttention, index=1),
    }

    def __init__(self, config: LlavaUhdVisionConfig):
        super().__init__(config)
        self.embeddings = LlavaUhdVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's own spelling
        self.encoder = LlavaUhdVisionEncoder(config)
        # CLIP checkpoints hold more than what the features depend on.
        self._keys_to_ignore_on_load_unexpected = list(unused_original_weights(config))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        view_grids: list[tuple[int, int]],
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(total_patches, num_channels * patch_size**2)`):
            Patches of all views, one view behind the other, each row by row.
        view_grids (`list[tuple[int, int]]`):
            `(rows, columns)` of patches of every view. Views of equal shape run fastest beside each other.

        Returns:
            `BaseModelOutputWithPooling`: With `last_hidden_state` of shape `(total_patches, hidden_size)`, without the
            class embeddings.
        """
        groups = [(count, grid[0] * grid[1] + 1, grid[0] * grid[1] + 1) for grid, count in _consecutive(view_grids)]
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values, view_grids))
        for layer in self.encoder.layers:
            hidden_states = layer(hidden_states, groups, **kwargs)
        stacked = hidden_states.split([count * length for count, length, _ in groups])
        patches = [
            states.unflatten(0, (count, length))[:, 1:].flatten(0, 1)
            for states, (count, length, _) in zip(stacked, groups, strict=True)
        ]
        return BaseModelOutputWithPooling(last_hidden_state=torch.cat(patches))


def sincos_positions(num_positions: int, dim: int) -> torch.Tensor:
    """Position table of a square, `(num_positions, dim)` in float32: sines of the column, then of the row."""
    side = math.isqrt(num_positions)
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float32)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)], dim=1)


def pooling_size(grid: tuple[int, int]) -> tuple[int, int]:
    """`(rows, columns)` of samples that every region of a `(rows, columns)` patch grid is pooled to."""
    aspect_ratio = math.log(grid[1] / grid[0])
    width, height = min(POOLING_SIZES, key=lambda size: abs(aspect_ratio - math.log(size[0] / size[1])))
    return height, width


@lru_cache(maxsize=256)
def region_sampling_weights(
    grid: tuple[int, int], regions: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoI align of `regions` x `regions` equal boxes over a patch grid, as one matrix for each axis.

    A box's samples form a grid and bilinear interpolation is a product over the axes, hence pooling a `(rows,
    columns)` map `M` is `row_weights @ M @ column_weights.T`. The numbers are those of torchvision's compiled kernel
    with `aligned=False, sampling_ratio=-1`: cell centres lie at integers, samples beyond the map count as zeros, and
    regions of less than one patch are enlarged to one. The weights were trained with all of this, and with box corners
    rounded to `dtype`.

    Args:
        grid (`tuple[int, int]`): `(rows, columns)` of patches.
        regions (`int`): Regions along each axis.
        dtype (`torch.dtype`): Of the feature maps.

    Returns:
        Two `torch.Tensor` in float32, `(regions * pooled_rows, rows)` and `(regions * pooled_columns, columns)`.
    """
    rows, columns = grid
    pooled_rows, pooled_columns = pooling_size(grid)
    box_height = math.sqrt(rows * columns / regions**2 / (columns / rows))
    box_width = box_height * (columns / rows)
    # Later calls get the same tensors, whatever the first one ran under: training cannot use what inference mode made.
    with torch.inference_mode(False), torch.device("cpu"):
        return (
            _axis_sampling_weights(box_height, regions, pooled_rows, rows, dtype),
            _axis_sampling_weights(box_width, regions, pooled_columns, columns, dtype),
        )


@lru_cache(maxsize=256)
def shares_beyond_map(grid: tuple[int, int], regions: int, dtype: torch.dtype) -> torch.Tensor | None:
    """How much of each sample lies beyond the map, `(regions**2, samples, 1)` in float32; None where nothing does."""
    with torch.inference_mode(False), torch.device("cpu"):
        inside = torch.outer(*(weights.sum(1) for weights in region_sampling_weights(grid, regions, dtype)))
        inside = inside.unflatten(0, (regions, -1)).unflatten(2, (regions, -1)).transpose(1, 2)
        return (1 - inside).reshape(regions**2, -1, 1) if inside.min() < 1 - 1e-5 else None


def _axis_sampling_weights(box: float, regions: int, bins: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    corners = torch.tensor([[i * box, i * box + box] for i in range(regions)], dtype=torch.float64)
    start, end = corners.float().to(dtype).float().unbind(1)
    extent = (end - start).clamp(min=1.0)
    bin_size = extent / bins
    samples = torch.ceil(extent / bins)  # per region: rounding of its corners can turn one sample into two
    sample = torch.arange(int(samples.max()), dtype=torch.float32)
    bin_start = start[:, None] + torch.arange(bins, dtype=torch.float32) * bin_size[:, None]
    step = (sample + 0.5) * bin_size[:, None] / samples[:, None]
    position = bin_start[:, :, None] + step[:, None, :]  # (regions, bins, samples)
    counted = (sample < samples[:, None])[:, None, :] & (position >= -1.0) & (position <= length)

    position = position.clamp(min=0.0)
    low = position.floor().clamp(max=length - 1)
    fraction = torch.where(low >= length - 1, 0.0, position - low)
    high = (low + 1).clamp(max=length - 1)
    share = counted / samples[:, None, None]
    weights = torch.zeros(regions, bins, length)
    weights.scatter_add_(2, low.long(), (1.0 - fraction) * share)
    weights.scatter_add_(2, high.long(), fraction * share)
    return weights.flatten(0, 1)


def sample_regions(maps: torch.Tensor, grid: tuple[int, int], regions: int) -> torch.Tensor:
    """RoI-aligns `(views, rows * columns, channels)` maps to `(views, regions**2, samples, channels)`.

    It computes in float32, under autocast too, as torchvision's kernel does.
    """
    row_weights, column_weights = region_sampling_weights(grid, regions, maps.dtype)
    views, _, channels = maps.shape
    with maybe_autocast(device_type=maps.device.type, enabled=False):
        sampled = torch.matmul(row_weights.to(maps.device), maps.float().view(views, grid[0], grid[1] * channels))
        sampled = sampled.view(views, -1, grid[1], channels)  # (views, regions * pooled_rows, columns, channels)
        sampled = torch.matmul(column_weights.to(maps.device), sampled).to(maps.dtype)
    sampled = sampled.unflatten(2, (regions, -1)).unflatten(1, (regions, -1))
    return sampled.transpose(2, 3).reshape(views, regions**2, -1, channels)


class LlavaUhdResamplerAttention(nn.Module):
    """Multi-head attention of the learned queries to all patches of a view, or of each to its own region's samples."""

    def __init__(self, config: LlavaUhdConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.config = config
        self.head_dim = hidden_size // config.resampler_num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.num_key_value_groups = 1
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        view_grids: list[tuple[int, int]],
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`queries` (num_queries, hidden_size); `keys`, `values` packed, of the patches of all views."""
        num_queries = queries.shape[0]
        queries = self.q_proj(queries).repeat(len(view_grids), 1)
        # CODEPATH: guozonghao96/llava-uhd-144-13b is spatial; the arXiv paper's model (no weights released) a
        # perceiver.
        if self.config.resampler_type == "spatial":
            regions = math.isqrt(num_queries)
            keys = self._project_and_sample(self.k_proj, keys, view_grids, regions)
            values = self._project_and_sample(self.v_proj, values, view_grids, regions)
            groups = [
                (count * num_queries, 1, math.prod(pooling_size(grid))) for grid, count in _consecutive(view_grids)
            ]
        else:
            keys, values = self.k_proj(keys), self.v_proj(values)
            groups = [(count, num_queries, grid[0] * grid[1]) for grid, count in _consecutive(view_grids)]
        queries, keys, values = (states.unflatten(-1, (-1, self.head_dim)) for states in (queries, keys, values))
        output, _ = packed_attention(self, queries, keys, values, groups, **kwargs)
        return self.out_proj(output)

    @staticmethod
    def _project_and_sample(
        projection: nn.Module, features: torch.Tensor, view_grids: list[tuple[int, int]], regions: int
    ) -> torch.Tensor:
        """`projection` of the regions' samples, packed `(total_samples, hidden_size)`."""
        sampled, start, projected = [], 0, projection(features)
        for grid, count in _consecutive(view_grids):
            end = start + count * grid[0] * grid[1]
            samples = sample_regions(projected[start:end].unflatten(0, (count, -1)), grid, regions)
            outside = shares_beyond_map(grid, regions, features.dtype)
            if outside is not None:
                # Samples beyond the map are zeros before they are projected: they keep the whole bias.
                samples = samples + outside.to(samples) * projection(torch.zeros_like(features[:1]))
            sampled.append(samples.flatten(0, 2))
            start = end
        return torch.cat(sampled) if len(sampled) > 1 else sampled[0]


class LlavaUhdResampler(nn.Module):
    """Compresses every view to `num_queries` features of the text model's width (paper, section 3.3).

    Released weights use the spatially constrained form: query `i` attends to the `i`-th region of the view alone.
    """

    def __init__(self, config: LlavaUhdConfig):
        super().__init__()
        hidden_size, vision_size = config.text_config.hidden_size, config.vision_config.hidden_size
        self.config = config
        self.query = nn.Parameter(torch.zeros(config.num_queries, hidden_size))
        # A buffer, since the original never trains it; saved, since releases hold it rounded to bfloat16
        positions = sincos_positions(config.num_queries, hidden_size)
        self.pos_embed = nn.Buffer(positions.to(torch.get_default_dtype()))
        has_projection = vision_size != hidden_size
        self.kv_proj = nn.Linear(vision_size, hidden_size, bias=False) if has_projection else nn.Identity()
        self.attention = LlavaUhdResamplerAttention(config)
        self.ln_q = nn.LayerNorm(hidden_size, eps=config.resampler_layer_norm_eps)
        self.ln_kv = nn.LayerNorm(hidden_size, eps=config.resampler_layer_norm_eps)
        self.ln_post = nn.LayerNorm(hidden_size, eps=config.resampler_layer_norm_eps)
        self.output_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def interpolate_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position table of a `(rows, columns)` patch grid, `(rows * columns, hidden_size)`; resized in float32."""
        return resize_positions(self.pos_embed.float(), grid).to(self.pos_embed.dtype)

    def forward(
        self, vision_features: torch.Tensor, view_grids: list[tuple[int, int]], **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """Packed `(total_patches, vision_hidden_size)` features to `(views, num_queries, hidden_size)`."""
        values = self.ln_kv(self.kv_proj(vision_features))
        positions = [
            self.interpolate_positions(grid).to(values.dtype).repeat(count, 1)
            for grid, count in _consecutive(view_grids)
        ]
        queries = self.ln_q(self.query) + self.pos_embed.to(values.dtype)
        output = self.attention(queries, values + torch.cat(positions), values, view_grids, **kwargs)
        return self.output_proj(self.ln_post(output)).unflatten(0, (-1, len(self.query)))


def view_grids_of(image_grids: torch.Tensor) -> list[list[tuple[int, int]]]:
    """`(rows, columns)` of patches of every view of every image, from the processor's `image_grids`.

    Raises:
        ValueError: if `image_grids` is not of shape `(num_images, 3, 2)` or holds an impossible grid.
    """
    if image_grids.ndim != 3 or image_grids.shape[1:] != (3, 2):
        raise ValueError(f"`image_grids` must have shape (num_images, 3, 2), but has {tuple(image_grids.shape)}.")
    view_grids = []
    for index, ((rows, columns), slice_grid, overview_grid) in enumerate(image_grids.tolist()):
        used = [*overview_grid, *(slice_grid if rows * columns else ())]
        if min(rows, columns) < 0 or min(used) < 1:
            raise ValueError(f"`image_grids[{index}]` describes no views: {image_grids[index].tolist()}.")
        view_grids.append([tuple(slice_grid)] * (rows * columns) + [tuple(overview_grid)])
    return view_grids


def normalize_grey_levels(pixel_values: torch.Tensor, config: LlavaUhdConfig) -> torch.Tensor:
    """Rescales and normalises uint8 `pixel_values` on their device, in float32; others are normalised already.

    Args:
        pixel_values (`torch.Tensor`): Of shape `(patches, channels * patch_size**2)` or `(images, channels, height,
            width)`, as image processors return them with neither `do_rescale` nor `do_normalize` if uint8.
        config (`PreTrainedConfig`): With `image_mean`, `image_std` and `vision_config`.
    """
    if pixel_values.dtype != torch.uint8:
        return pixel_values
    num_channels = config.vision_config.num_channels
    # As in image processors, one number is that of all channels.
    mean, std = (
        torch.tensor(stat, dtype=torch.float32, device=pixel_values.device).expand(num_channels)[:, None]
        for stat in (config.image_mean, config.image_std)
    )
    channels = pixel_values.flatten(1).unflatten(1, (num_channels, -1))  # (rows, channels, values per channel)
    return ((channels.float() / 255 - mean) / std).view(pixel_values.shape)


def encode_views(
    vision_tower: "LlavaUhdVisionModel",
    resampler: LlavaUhdResampler,
    pixel_values: torch.FloatTensor,
    image_grids: torch.LongTensor,
    **kwargs: Unpack[TransformersKwargs],
) -> BaseModelOutputWithPooling:
    """Encodes all views of all images and resamples them; see [`LlavaUhdModel.get_image_features`]."""
    grids_per_image = view_grids_of(image_grids)
    view_grids = [grid for grids in grids_per_image for grid in grids]
    patch_counts = [rows * columns for rows, columns in view_grids]
    if pixel_values.ndim != 2 or pixel_values.shape[0] != sum(patch_counts):
        raise ValueError(
            f"`pixel_values` must have one row for each of the {sum(patch_counts)} patches that `image_grids` "
            f"describes, but has shape {tuple(pixel_values.shape)}."
        )
    pixel_values = normalize_grey_levels(pixel_values, resampler.config)
    # Views of equal shape are brought together, whichever image they belong to.
    order = sorted(range(len(view_grids)), key=view_grids.__getitem__)
    patches = pixel_values.split(patch_counts)
    ordered_grids = [view_grids[i] for i in order]
    sorted_patches = torch.cat([patches[i] for i in order])
    vision_outputs, features = _encode_sorted_views(vision_tower, resampler, sorted_patches, ordered_grids, **kwargs)

    back = sorted(range(len(order)), key=order.__getitem__)
    vision_features = vision_outputs.last_hidden_state.split([patch_counts[i] for i in order])
    vision_outputs.last_hidden_state = torch.cat([vision_features[i] for i in back])
    vision_outputs.pooler_output = [
        image_features.flatten(0, 1)
        for image_features in features[back].split([len(grids) for grids in grids_per_image])
    ]
    return vision_outputs


def _encode_sorted_views(
    vision_tower: "LlavaUhdVisionModel",
    resampler: LlavaUhdResampler,
    patches: torch.FloatTensor,
    view_grids: list[tuple[int, int]],
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
    """Outputs of the vision tower, and resampled features of shape `(views, num_queries, hidden_size)`."""
    records_layers = any(
        kwargs.get(name) or getattr(vision_tower.config, name)
        for name in ("output_hidden_states", "output_attentions")
    )
    if patches.device.type != "cpu" or records_layers:
        outputs = vision_tower(patches, view_grids, return_dict=True, **kwargs)
        return outputs, resampler(outputs.last_hidden_state, view_grids)
    # On a CPU, larger products are no faster, and activations that outgrow its cache are slower.
    hidden_states, features, start = [], [], 0
    for grids in _runs_of_patches(view_grids, MAX_CPU_PATCHES):
        end = start + sum(rows * columns for rows, columns in grids)
        hidden_states.append(vision_tower(patches[start:end], grids, return_dict=True, **kwargs).last_hidden_state)
        features.append(resampler(hidden_states[-1], grids))
        start = end
    return BaseModelOutputWithPooling(last_hidden_state=torch.cat(hidden_states)), torch.cat(features)


def _runs_of_patches(view_grids: list[tuple[int, int]], max_patches: int) -> list[list[tuple[int, int]]]:
    """`view_grids` in runs of at most `max_patches` patches, or one view."""
    runs: list[list[tuple[int, int]]] = []
    num_patches = max_patches
    for rows, columns in view_grids:
        num_patches += rows * columns
        if num_patches > max_patches:
            runs.append([])
            num_patches = rows * columns
        runs[-1].append((rows, columns))
    return runs


class ImagePlaceholderMixin:
    """Merges image features into the embeddings of a prompt whose image placeholder is no entry of the vocabulary."""

    def merge_images(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        pixel_values: torch.FloatTensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        past_key_values: Cache | None,
        **image_inputs: torch.Tensor | None,
    ) -> tuple[torch.FloatTensor, torch.FloatTensor | None]:
        """
        Embeds a prompt, and puts image features into the places of its placeholders.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids. Either these or `inputs_embeds` are given.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings, in place of ids.
            pixel_values (`torch.FloatTensor` of any shape that `get_image_features` takes, *optional*):
                Images, as the processor returns them.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                Under `"image"` what `get_image_features` returned, in place of images.
            past_key_values (`Cache`, *optional*):
                The cache; placeholders without images are refused where it is empty.
            image_inputs (`torch.LongTensor` of any shape, *optional*):
                What else `get_image_features` takes, such as `image_grids`.

        Returns:
            `tuple[torch.FloatTensor, torch.FloatTensor | None]`: The embeddings, of shape `(batch_size,
            sequence_length, hidden_size)`, and the features of all images, of shape `(num_features, hidden_size)`, if
            there are any.

        Raises:
            ValueError: if of `input_ids` and `inputs_embeds` not just one is given, if both `pixel_values` and
                `mm_encoder_outputs` are, or if there are not as many placeholders as features.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if inputs_embeds is None:
            inputs_embeds = self._embed_tokens(input_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, **image_inputs, return_dict=True)
        if image_outputs is None:
            if input_ids is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
                self._check_no_placeholder(input_ids)
            return inputs_embeds, None
        image_features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
        image_mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
        return inputs_embeds.masked_scatter(image_mask, image_features), image_features

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        image_features: torch.FloatTensor,
    ) -> torch.BoolTensor:
        """
        Finds the placeholders of images, and checks that there are as many of them as image features.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Embeddings, by which placeholders are found where there are no ids.
            image_features (`torch.FloatTensor` of shape `(num_features, hidden_size)`):
                Features of all images.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length, 1)`: True where a placeholder is.

        Raises:
            ValueError: if the numbers differ, or there are no ids and the placeholder has no embedding.
        """
        if input_ids is not None:
            mask = input_ids == self.config.image_token_id
        # CODEPATH: a checkpoint whose vocabulary was extended by the placeholder
        elif self.config.image_token_id < self.config.text_config.vocab_size:
            token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            raise ValueError(
                "Images cannot be merged into `inputs_embeds` alone, since their placeholder has no embedding. Pass "
                "`input_ids` with the images, or `inputs_embeds` into which `get_image_features` are merged already."
            )
        num_placeholders, num_features = mask.sum(), image_features.shape[0]
        torch_compilable_check(
            num_placeholders == num_features,
            f"Image features and image tokens do not match, tokens: {num_placeholders}, features: {num_features}",
        )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def _check_no_placeholder(self, input_ids: torch.LongTensor) -> None:
        # CODEPATH: all converted releases; only a checkpoint whose vocabulary was extended embeds the placeholder
        if self.config.image_token_id >= self.config.text_config.vocab_size:
            num_placeholders = (input_ids == self.config.image_token_id).sum()
            torch_compilable_check(
                num_placeholders == 0,
                f"The prompt has {num_placeholders} image placeholders, but no images were passed: pass "
                "`pixel_values` and `image_grids` as the processor returns them.",
            )

    def _embed_tokens(self, input_ids: torch.LongTensor) -> torch.FloatTensor:
        # CODEPATH: all converted releases; only a checkpoint whose vocabulary was extended embeds the placeholder
        if self.config.image_token_id >= self.config.text_config.vocab_size:
            input_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
        return self.get_input_embeddings()(input_ids)

    @staticmethod
    def unpadded_positions(attention_mask: torch.Tensor | None, length: int) -> torch.LongTensor | None:
        """
        Positions of the last tokens, counted from the first real one: a padded row gets those that it has alone.

        Args:
            attention_mask (`torch.LongTensor` of shape `(batch_size, total_length)`, *optional*):
                0 where a token is padding. Masks of other shapes tell nothing.
            length (`int`):
                Tokens of this call, the last ones of the mask.

        Returns:
            `torch.LongTensor` of shape `(batch_size, length)`; None where nothing tells which tokens are padding.
        """
        if attention_mask is None or attention_mask.ndim != 2:
            return None
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


@auto_docstring(
    custom_intro="""
    The LLaVA-UHD model which consists of a vision backbone, a resampler and a language model, without a language
    modeling head.

    Source: the paper's section 3 and the original code; transformers' `LlavaModel`.
    """
)
class LlavaUhdModel(ImagePlaceholderMixin, LlavaUhdPreTrainedModel):
    def __init__(self, config: LlavaUhdConfig):
        super().__init__(config)
        self.vision_tower = LlavaUhdVisionModel._from_config(config.vision_config)
        self.resampler = LlavaUhdResampler(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_intro="Encodes all views of all images and resamples each to `num_queries` features.")
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        image_grids: torch.LongTensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(total_patches, num_channels * patch_size**2)`):
            Patches of all views of all images, slices row by row and then the overview of each image.
        image_grids (`torch.LongTensor` of shape `(num_images, 3, 2)`):
            `(rows, columns)` of each image's slices, of the patches of one slice, and of the patches of its overview.

        Returns:
            `BaseModelOutputWithPooling`: With `pooler_output`, for every image a tensor of shape `(views *
            num_queries, hidden_size)`, and `last_hidden_state` of shape `(total_patches, vision_hidden_size)`, the
            vision encoder's features.

        Raises:
            ValueError: if `image_grids` describes impossible views, or other ones than `pixel_values` holds.
        """
        return encode_views(self.vision_tower, self.resampler, pixel_values, image_grids, **kwargs)

    @can_return_tuple
    @auto_docstring(
        custom_intro="""
        Runs the language model over a prompt with the features of images in the places of their placeholders.

        Raises:
            ValueError: if of `pixel_values` and `image_grids` only one is given, if they describe different views, or
                if the prompt has not as many placeholders as the images have features.
        """
    )
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_grids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaUhdModelOutputWithPast:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(total_patches, num_channels * patch_size**2)`, *optional*):
            Patches of all views of all images, slices row by row and then the overview of each image.
        image_grids (`torch.LongTensor` of shape `(num_images, 3, 2)`, *optional*):
            `(rows, columns)` of each image's slices, of the patches of one slice, and of the patches of its overview.
        """
        if (pixel_values is None) != (image_grids is None):
            raise ValueError("`pixel_values` and `image_grids` belong together: pass both, as the processor returns.")
        inputs_embeds, image_features = self.merge_images(
            input_ids, inputs_embeds, pixel_values, mm_encoder_outputs, past_key_values, image_grids=image_grids
        )
        if position_ids is None:
            position_ids = self.unpadded_positions(attention_mask, inputs_embeds.shape[1])
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return LlavaUhdModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


def move_padding_left(tensor: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Rolls every row of a `(batch, length, ...)` tensor, so that what is behind its last token comes before all."""
    length = attention_mask.shape[1]
    padding = attention_mask.flip(1).long().argmax(dim=1, keepdim=True)
    order = (torch.arange(length, device=attention_mask.device) - padding) % length
    rows = torch.arange(len(tensor), device=tensor.device)[:, None]
    return tensor[rows, order.to(tensor.device)]


class CandidatesOfVocabulary(CandidateGenerator):
    """Candidates from a prompt whose image placeholders, which no vocabulary has, are hidden from their generator."""

    def __init__(self, generator: CandidateGenerator, image_token_id: int):
        self.generator, self.image_token_id = generator, image_token_id

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, torch.Tensor | None]:
        hidden = input_ids.masked_fill(input_ids == self.image_token_id, 0)
        candidates, logits = self.generator.get_candidates(hidden, **kwargs)
        return torch.cat([input_ids, candidates[:, input_ids.shape[1] :]], dim=1), logits

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int):
        self.generator.update_candidate_strategy(input_ids, scores, num_matches)


class PlaceholderGenerationMixin(GenerationMixin):
    """`GenerationMixin` for images whose placeholder is in no vocabulary, and for prompts padded on either side."""

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        inputs, input_name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        begins = cache is None or cache.get_seq_length() == 0
        # What is generated goes behind the last column: padding there would stand between prompt and answer.
        if begins and mask is not None and mask.shape == inputs.shape[:2] and not mask[:, -1].all():
            inputs = move_padding_left(inputs, mask)
            for name in ("input_ids", "inputs_embeds", "position_ids", "attention_mask"):
                if name in model_kwargs and model_kwargs[name].shape[:2] == mask.shape:
                    model_kwargs[name] = move_padding_left(model_kwargs[name], mask)
        return inputs, input_name, model_kwargs

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        # transformers never tells an assistant model that it begins, and would withhold the images from it.
        cache = model_kwargs.get("past_key_values")
        begins = cache is not None and cache.get_seq_length() == 0
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration or begins)

    def _get_logits_processor(self, *args, encoder_input_ids=None, **kwargs) -> LogitsProcessorList:
        # Of the processors that look scores up by prompt token, the encoder's trust it to be in the vocabulary.
        if encoder_input_ids is not None:
            encoder_input_ids = encoder_input_ids.masked_fill(encoder_input_ids == self.config.image_token_id, 0)
        return super()._get_logits_processor(*args, encoder_input_ids=encoder_input_ids, **kwargs)

    def _get_candidate_generator(self, *args, **kwargs) -> CandidateGenerator:
        generator = super()._get_candidate_generator(*args, **kwargs)
        # It proposes what stands in the prompt, and looks its scores up.
        if isinstance(generator, PromptLookupCandidateGenerator):
            generator = CandidatesOfVocabulary(generator, self.config.image_token_id)
        return generator


@auto_docstring(
    custom_intro="""
    The LLaVA-UHD model (arXiv 2403.11703): a language model that sees images of any aspect ratio and high resolution
    as adaptively cut slices and an overview.

    Source: the paper's section 3 and the original code; transformers' `LlavaForConditionalGeneration`.
    """
)
class LlavaUhdForConditionalGeneration(LlavaUhdPreTrainedModel, PlaceholderGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LlavaUhdConfig):
        super().__init__(config)
        self.model = LlavaUhdModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """
        Gives the language modeling head.

        Returns:
            `nn.Linear`: From `hidden_size` to the text model's vocabulary.
        """
        return self.lm_head

    @auto_docstring
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        image_grids: torch.LongTensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(total_patches, num_channels * patch_size**2)`):
            Patches of all views of all images, slices row by row and then the overview of each image.
        image_grids (`torch.LongTensor` of shape `(num_images, 3, 2)`):
            `(rows, columns)` of each image's slices, of the patches of one slice, and of the patches of its overview.
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
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaUhdCausalLMOutputWithPast:
        r"""
        pixel_values (`torch.FloatTensor` of shape `(total_patches, num_channels * patch_size**2)`, *optional*):
            Patches of all views of all images, slices row by row and then the overview of each image.
        image_grids (`torch.LongTensor` of shape `(num_images, 3, 2)`, *optional*):
            `(rows, columns)` of each image's slices, of the patches of one slice, and of the patches of its overview.

        Example:

        ```python
        >>> from PIL import Image
        >>> from llava_family import LlavaUhdForConditionalGeneration, LlavaUhdProcessor

        >>> model = LlavaUhdForConditionalGeneration.from_pretrained("path/to/llava-uhd-144-13b")
        >>> processor = LlavaUhdProcessor.from_pretrained("path/to/llava-uhd-144-13b")
        >>> messages = [
        ...     {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What does the sign say?"}]}
        ... ]
        >>> prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        >>> inputs = processor(images=Image.open("street.jpg"), text=prompt, return_tensors="pt")
        >>> generated = model.generate(**inputs, max_new_tokens=64)
        >>> print(processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        ```"""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grids=image_grids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LlavaUhdCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


# Classes outside of transformers inherit no conversion: https://github.com/huggingface/transformers/pull/46876
register_checkpoint_conversion_mapping(LlavaUhdConfig.model_type, original_weight_mapping(), overwrite=True)


__all__ = ["LlavaUhdForConditionalGeneration", "LlavaUhdModel", "LlavaUhdPreTrainedModel", "LlavaUhdVisionModel"]
