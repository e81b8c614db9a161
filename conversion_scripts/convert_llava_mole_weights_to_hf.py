"""Converts a LLaVA-MoLE checkpoint of the original code into a folder that `from_pretrained` loads.

    python conversion_scripts/convert_llava_mole_weights_to_hf.py --checkpoint llava_mole_r16_a32_e3.pt \\
        --vicuna lmsys/vicuna-7b-v1.5 --clip openai/clip-vit-large-patch14-336 --output llava-mole-7b-hf

The file may hold the trained tensors alone or the whole model: like in the original, whatever it holds is taken from
it, and the rest from the language model and the vision tower that the training began with.
"""

from llava_family.conversion.scripting import conversion_parser, run_conversion
from llava_family.converters.llava_mole import ROUTINGS, convert_llava_mole_checkpoint


def main(arguments: list[str] | None = None):
    parser = conversion_parser(
        __doc__,
        checkpoint="file of the original's training, such as llava_mole_r16_a32_e3.pt",
        default_dtype="bfloat16, in which the original runs,",
    )
    parser.add_argument(
        "--vicuna",
        required=True,
        help="folder or Hub repository of the language model that the training began with, lmsys/vicuna-7b-v1.5",
    )
    parser.add_argument(
        "--clip",
        required=True,
        help="folder or Hub repository of the CLIP that the training began with, openai/clip-vit-large-patch14-336",
    )
    parser.add_argument("--lora-alpha", type=float, help="of the training, where the file's name does not have it")
    parser.add_argument(
        "--routing",
        choices=ROUTINGS,
        default="dense",
        help="what the experts were trained with: dense (the default) as in the original's released inference, top1 "
        "as in the paper",
    )
    parser.add_argument(
        "--merge-attention-lora",
        action="store_true",
        help="add the attention's adapters to the weights that they belong to: faster, but no longer to be trained",
    )
    run_conversion(parser, convert_llava_mole_checkpoint, arguments)


if __name__ == "__main__":
    main()
