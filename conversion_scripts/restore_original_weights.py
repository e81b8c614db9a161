"""Writes the weights of a converted model in the layout of its original code, so that this code can run them.

    python conversion_scripts/restore_original_weights.py --checkpoint MoE-LLaVA-Phi2-2.7B-4e-hf \\
        --original LanguageBind/MoE-LLaVA-Phi2-2.7B-4e --output MoE-LLaVA-Phi2-2.7B-4e-restored

The original gives what the conversion left out, names and dtypes, configuration and tokenizer. Without it, the output
has weights alone, and no tensor that the converted model does not depend on.
"""

import argparse

from llava_family.conversion.restoring import restore_checkpoint


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub repository of the converted model")
    parser.add_argument("--output", required=True, help="new folder; for LLaVA-MoLE a new file, .pt")
    parser.add_argument(
        "--original",
        help="folder or Hub repository that the converted model was made from; for LLaVA-MoLE the file",
    )
    options = parser.parse_args(arguments)
    try:
        restore_checkpoint(options.checkpoint, options.output, options.original)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
