"""Describe an image with a LLaVA-UHD checkpoint, in plain transformers.

python examples/describe_image.py --model path/to/llava-uhd-144-13b --image photo.jpg
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import llava_family  # noqa: F401  registers the family with the Auto classes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub repository of a checkpoint")
    parser.add_argument("--image", required=True, help="image file")
    parser.add_argument("--prompt", default="Describe the image briefly.")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args(arguments)

    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    image = Image.open(options.image)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": options.prompt}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, model.dtype)
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=options.max_new_tokens)
    answer = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer.strip())


if __name__ == "__main__":
    main()
