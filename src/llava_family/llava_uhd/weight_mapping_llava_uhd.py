"""Which tensor of an original LLaVA-UHD checkpoint becomes which parameter; shared by direct loading and conversion."""

from transformers.core_model_loading import Chunk, Transpose, WeightConverter, WeightRenaming

from .configuration_llava_uhd import LlavaUhdVisionConfig


def original_weight_mapping() -> list[WeightConverter | WeightRenaming]:
    """The transforms that turn an original checkpoint into a native one. On a native checkpoint none of them matches."""
    return [
        WeightRenaming(r"^model\.embed_tokens\.", "model.language_model.embed_tokens."),
        WeightRenaming(r"^model\.layers\.", "model.language_model.layers."),
        WeightRenaming(r"^model\.norm\.", "model.language_model.norm."),
        WeightRenaming(r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
        WeightRenaming(r"^model\.mm_projector\.attn\.out_proj\.", "model.resampler.attention.out_proj."),
        WeightRenaming(r"^model\.mm_projector\.kv_proj\.", "model.resampler.kv_proj."),
        WeightRenaming(r"^model\.mm_projector\.ln_", "model.resampler.ln_"),
        WeightRenaming(r"^model\.mm_projector\.pos_embed", "model.resampler.pos_embed"),
        WeightRenaming(r"^model\.mm_projector\.query", "model.resampler.query"),
        # The original multiplies by `proj` from the right; a Linear keeps the transpose.
        WeightConverter("mm_projector.proj", "resampler.output_proj.weight", [Transpose(0, 1)]),
        *(
            WeightConverter(
                f"mm_projector.attn.in_proj_{kind}",
                [f"resampler.attention.{name}_proj.{kind}" for name in "qkv"],
                [Chunk(dim=0)],
            )
            for kind in ("weight", "bias")
        ),
    ]


def unused_original_weights(config: LlavaUhdVisionConfig) -> dict[str, str]:
    """Why a tensor of an original vision tower has no parameter, by regular expression for its name in either format."""
    unused_layers = range(config.num_feature_layers, config.num_hidden_layers)
    above = "the image features are taken below it"
    return {
        r"post_layernorm\.": above,
        **{rf"encoder\.layers\.{layer}\.": above for layer in unused_layers},
        r"embeddings\.position_ids$": "a constant that older CLIP checkpoints store",
    }


__all__ = ["original_weight_mapping", "unused_original_weights"]
