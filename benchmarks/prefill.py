"""Times the prefill of one image of 672x1088 pixels: LLaVA-UHD with 64 queries a view, and in-tree LLaVA-NeXT.

    python benchmarks/prefill.py [--rounds 5] [--threads 2] [--quick] [--json]

Both have half the widths of CLIP ViT-L/14-336 and of Vicuna 7B's text model and an eighth of their layers, so that a
CPU needs seconds and each part keeps its share of the work. The vision tower's last layer, which only LLaVA-NeXT would
run in vain, is run by both. Weights are random, float32, and pixels noise: what a pixel shows does not change the
work. Exits with 1 where a claim fails.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from timing import Claim, measure, parse_arguments, report
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from llava_family import LlavaUhdConfig, LlavaUhdForConditionalGeneration, LlavaUhdVisionConfig, plan_slices
from llava_family.inspection.flops import count_flops
from llava_family.llava_uhd.image_processing_pil_llava_uhd import image_grid


WIDTH, HEIGHT = 672, 1088
TEXT_TOKENS = 32
IMAGE = 31999
FULL_SIZE = {
    "vision": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 3},
    "text": {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_hidden_layers": 4},
}
QUICK_SIZE = {
    "vision": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3},
    "text": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2},
}
OURS, NEXT = "LLaVA-UHD, 64 queries", "LLaVA-NeXT"
CLAIM = Claim(NEXT, OURS, 2.5, at_least=True)


def configs(size: dict[str, Any]) -> dict[str, Any]:
    """Configurations of both models."""
    vision = {**size["vision"], "image_size": 336, "patch_size": 14}
    text = {**size["text"], "num_key_value_heads": size["text"]["num_attention_heads"], "vocab_size": IMAGE + 1}
    shared = {"image_token_id": IMAGE}
    return {
        OURS: LlavaUhdConfig(
            text_config=LlamaConfig(**text),
            vision_config=LlavaUhdVisionConfig(**vision, vision_feature_layer=-1),
            resampler_type="perceiver",
            num_queries=64,
            resampler_num_attention_heads=text["num_attention_heads"],
            **shared,
        ),
        NEXT: LlavaNextConfig(
            text_config=LlamaConfig(**text),
            vision_config=CLIPVisionConfig(**vision),
            vision_feature_layer=-1,
            **shared,
        ),
    }


def image_inputs(config: Any) -> dict[str, torch.Tensor]:
    """Noise in the shape that each model's processor gives an image."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(config, LlavaUhdConfig):
        plan = plan_slices(WIDTH, HEIGHT)
        pixels = torch.randn(plan.num_patches, 3 * 14**2, generator=generator)
        return {"pixel_values": pixels, "image_grids": torch.tensor([image_grid(plan)])}
    tiles = image_size_to_num_patches((HEIGHT, WIDTH), config.image_grid_pinpoints, config.vision_config.image_size)
    pixels = torch.randn(1, tiles, 3, 336, 336, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[HEIGHT, WIDTH]])}


def num_placeholders(config: Any) -> int:
    """Positions of the image in the prompt; LLaVA-UHD's separators are text."""
    if isinstance(config, LlavaUhdConfig):
        return plan_slices(WIDTH, HEIGHT).num_views * config.num_queries
    return count_flops(config, WIDTH, HEIGHT).num_tokens


def build(size: dict[str, Any]) -> dict[str, Callable[[], torch.Tensor]]:
    """Prefills, by name, as functions that return the last position's logits."""
    classes = {OURS: LlavaUhdForConditionalGeneration, NEXT: LlavaNextForConditionalGeneration}
    prefills = {}
    for name, config in configs(size).items():
        torch.manual_seed(0)
        model = classes[name]._from_config(config, attn_implementation="sdpa").eval()
        inputs = image_inputs(config)
        features = num_placeholders(config)
        text = torch.randint(0, IMAGE, (TEXT_TOKENS,), generator=torch.Generator().manual_seed(2))
        inputs["input_ids"] = torch.cat([torch.full((features,), IMAGE), text])[None]
        prefills[name] = lambda model=model, inputs=inputs: model(**inputs, logits_to_keep=1).logits
    return prefills


@torch.no_grad()
def main() -> int:
    arguments = parse_arguments(__doc__.splitlines()[0], rounds=5, threads=2)
    size = QUICK_SIZE if arguments.quick else FULL_SIZE
    flops = {name: count_flops(config, WIDTH, HEIGHT).total for name, config in configs(size).items()}
    title = f"Prefill of a {WIDTH}x{HEIGHT} image; LLaVA-NeXT has {flops[NEXT] / flops[OURS]:.2f} times the FLOPs"
    return report(measure(build(size), arguments.rounds, warm_up=1), [CLAIM], title, arguments)


if __name__ == "__main__":
    sys.exit(main())
