"""Times how eight images of mixed sizes are encoded and resampled: all views at once, and in the original's order.

    python benchmarks/vision.py [--rounds 3] [--threads 2] [--quick] [--json]

The original encodes a view at a time, through the vision tower's last layer too, whose output nobody reads, and then
resamples it: it samples the regions of keys and of values, and projects all samples. Its attention is unfused. Both
orders of work have the same weights, which are random, and the same output. Exits with 1 where a claim fails.
"""

import copy
import math
import sys
from functools import partial

import torch
from timing import Claim, measure, parse_arguments, report
from torch import nn
from transformers import LlamaConfig

from llava_family import LlavaUhdConfig, LlavaUhdVisionConfig, plan_slices
from llava_family.llava_uhd.image_processing_pil_llava_uhd import image_grid
from llava_family.llava_uhd.modeling_llava_uhd import (
    LlavaUhdResampler,
    LlavaUhdVisionModel,
    encode_views,
    packed_attention,
    sample_regions,
    view_grids_of,
)


# Half the widths of the released model (CLIP ViT-L/14-336, Vicuna 13B): each part keeps its share of the work
FULL_SIZE = {"vision": (512, 2048, 24, 8), "text": 2560, "heads": 20, "base_size": 336}
QUICK_SIZE = {"vision": (32, 64, 3, 2), "text": 64, "heads": 4, "base_size": 56}
# (width, height): photographs lying and upright, a banner, a receipt, small pictures, an icon
SIZES = ((480, 360), (360, 480), (600, 200), (168, 504), (336, 336), (224, 300), (300, 120), (64, 64))
ALL, ONE, ONE_FUSED = "all views at once", "the original's order", "the same, fused attention"
ATTENTION = {ONE: "eager", ONE_FUSED: "sdpa"}
CLAIMS = (Claim(ONE, ALL, 1.5, at_least=True), Claim(ONE_FUSED, ALL))


class OriginalOrder(nn.Module):
    """The original's order of work."""

    def __init__(
        self, tower: LlavaUhdVisionModel, last_layer: nn.Module, resampler: LlavaUhdResampler, attention: str
    ):
        super().__init__()
        self.tower, self.last_layer, self.resampler = map(copy.deepcopy, (tower, last_layer, resampler))
        for module in self.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = attention

    def forward(self, pixel_values: torch.Tensor, image_grids: torch.Tensor) -> list[torch.Tensor]:
        features, start = [], 0
        for grids in view_grids_of(image_grids):
            views = []
            for grid in grids:
                length = grid[0] * grid[1]
                hidden_states = self.tower(pixel_values[start : start + length], [grid]).last_hidden_state
                self.last_layer(hidden_states, [(1, length, length)])
                views.append(self.resample(hidden_states, grid))
                start += length
            features.append(torch.cat(views))
        return features

    def resample(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        resampler, attention = self.resampler, self.resampler.attention
        values = resampler.ln_kv(resampler.kv_proj(hidden_states))
        keys = values + resampler.interpolate_positions(grid)
        regions = math.isqrt(len(resampler.query))
        keys, values = (sample_regions(maps[None], grid, regions)[0] for maps in (keys, values))
        states = (
            attention.q_proj(resampler.ln_q(resampler.query) + resampler.pos_embed),
            attention.k_proj(keys).flatten(0, 1),
            attention.v_proj(values).flatten(0, 1),
        )
        heads = (state.unflatten(-1, (-1, attention.head_dim)) for state in states)
        output, _ = packed_attention(attention, *heads, [(len(resampler.query), 1, keys.shape[1])])
        return resampler.output_proj(resampler.ln_post(attention.out_proj(output)))


def build(size: dict) -> tuple[LlavaUhdVisionModel, nn.Module, LlavaUhdResampler]:
    """The vision tower up to the layer that features come from, the layer behind it, and the resampler."""
    torch.manual_seed(0)
    hidden, inner, layers, heads = size["vision"]
    vision = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "patch_size": 14}
    vision |= {"num_hidden_layers": layers, "image_size": size["base_size"]}
    config = LlavaUhdConfig(
        text_config=LlamaConfig(hidden_size=size["text"], num_attention_heads=size["heads"]),
        vision_config=LlavaUhdVisionConfig(**vision, vision_feature_layer=-1),
        num_queries=144,
        resampler_num_attention_heads=size["heads"],
    )
    config._attn_implementation = "sdpa"
    tower, resampler = LlavaUhdVisionModel._from_config(config.vision_config), LlavaUhdResampler(config)
    for parameter in resampler.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    last_layer = tower.encoder.layers[-1]
    del tower.encoder.layers[-1]
    return tower.eval(), last_layer.eval(), resampler.eval()


def random_images(base_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values and grids as the processor gives them."""
    plans = [plan_slices(*size, base_size=base_size, patch_size=14, max_slices=7) for size in SIZES]
    num_patches = sum(plan.num_patches for plan in plans)
    pixel_values = torch.randn(num_patches, 3 * 14**2, generator=torch.Generator().manual_seed(1))
    return pixel_values, torch.tensor([image_grid(plan) for plan in plans])


def build_orders(size: dict) -> dict:
    """The orders of work, by name, as functions that return every image's features."""
    tower, last_layer, resampler = build(size)
    inputs = random_images(size["base_size"])
    originals = {name: OriginalOrder(tower, last_layer, resampler, attention) for name, attention in ATTENTION.items()}
    return {
        ALL: lambda: encode_views(tower, resampler, *inputs).pooler_output,
        **{name: partial(original, *inputs) for name, original in originals.items()},
    }


@torch.no_grad()
def main() -> int:
    arguments = parse_arguments(__doc__.splitlines()[0], rounds=3, threads=2)
    size = QUICK_SIZE if arguments.quick else FULL_SIZE
    orders = build_orders(size)
    num_views = sum(map(len, view_grids_of(random_images(size["base_size"])[1])))
    title = f"8 images of {num_views} views, vision tower {size['vision'][0]} wide, text {size['text']}, float32"
    return report(measure(orders, arguments.rounds, warm_up=1), CLAIMS, title, arguments)


if __name__ == "__main__":
    sys.exit(main())
