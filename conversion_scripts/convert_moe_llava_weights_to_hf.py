"""Converts a MoE-LLaVA checkpoint of the original code into a folder that `from_pretrained` loads.

    python conversion_scripts/convert_moe_llava_weights_to_hf.py \\
        --checkpoint LanguageBind/MoE-LLaVA-Phi2-2.7B-4e --output MoE-LLaVA-Phi2-2.7B-4e-hf

All that the original's training writes is accepted: the releases, the dense models of the second stage, unmerged LoRA
adapters on the experts, and the first stage's projector, for which `--base` names the language model.
"""

from llava_family.conversion.scripting import conversion_parser, run_conversion
from llava_family.converters.moe_llava import convert_moe_llava_checkpoint


def main(arguments: list[str] | None = None):
    parser = conversion_parser(__doc__)
    parser.add_argument(
        "--vision-tower",
        help="folder or Hub repository of CLIP or SigLIP, such as openai/clip-vit-large-patch14-336, to take the "
        "vision tower from, as the original code does at run time; by default it comes from the checkpoint, where "
        "releases hold the same weights rounded to bfloat16",
    )
    parser.add_argument(
        "--base",
        help="folder or Hub repository of the language model, such as microsoft/phi-2, that the first stage's "
        "mm_projector.bin was trained with; only for that, which needs --vision-tower too",
    )
    parser.add_argument(
        "--lora-alpha",
        type=float,
        help="of unmerged LoRA adapters, where neither adapter_config.json nor config.json has it",
    )
    run_conversion(parser, convert_moe_llava_checkpoint, arguments)


if __name__ == "__main__":
    main()
