"""Converts a LLaVA-UHD release of the original code into a folder that `from_pretrained` loads.

    python conversion_scripts/convert_llava_uhd_weights_to_hf.py \\
        --checkpoint guozonghao96/llava-uhd-144-13b --output llava-uhd-144-13b-hf

The projector comes from the release's shards: its `mm_projector.bin` is a left-over of the first training stage.
"""

from llava_family.conversion.scripting import conversion_parser, run_conversion
from llava_family.converters.llava_uhd import convert_llava_uhd_checkpoint


def main(arguments: list[str] | None = None):
    parser = conversion_parser(__doc__)
    parser.add_argument(
        "--vision-tower",
        help="folder or Hub repository of CLIP, such as openai/clip-vit-large-patch14-336, to take the vision "
        "tower from, as the original code does at run time; by default it comes from the release's shards, which hold "
        "the same weights rounded to bfloat16",
    )
    run_conversion(parser, convert_llava_uhd_checkpoint, arguments)


if __name__ == "__main__":
    main()
