"""Converts a LLaVA-UHD release of the original code into a folder that `from_pretrained` loads.

    python conversion_scripts/convert_llava_uhd_weights_to_hf.py \\
        --checkpoint guozonghao96/llava-uhd-144-13b --output llava-uhd-144-13b-hf

The projector comes from the release's shards: its `mm_projector.bin` is a left-over of the first training stage.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import create_repo, upload_folder
from huggingface_hub.utils import validate_repo_id
from transformers import GenerationConfig

from llava_family.conversion import (
    WEIGHT_FILES,
    CheckpointReader,
    ConversionPlan,
    TensorInfo,
    atomic_folder,
    check_output_folder,
    plan_conversion,
    resolve_checkpoint,
    write_sharded,
)
from llava_family.llava_uhd.configuration_llava_uhd import LlavaUhdConfig, is_original_config
from llava_family.llava_uhd.modeling_llava_uhd import LlavaUhdForConditionalGeneration
from llava_family.llava_uhd.processing_llava_uhd import LlavaUhdProcessor
from llava_family.llava_uhd.weight_mapping_llava_uhd import original_weight_mapping, unused_original_weights


WEIGHT_PATTERNS = ["model*.safetensors", "pytorch_model*.bin", "*.index.json"]
CHECKPOINT_PATTERNS = [*WEIGHT_PATTERNS, "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"]
VISION_TOWER_PATTERNS = [*WEIGHT_PATTERNS, "config.json"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
VISION_TOWER_PREFIX = "model.vision_tower.vision_tower."


def convert_llava_uhd_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    vision_tower: str | os.PathLike | None = None,
    dtype: str | None = None,
    push_to_hub: str | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Converts `checkpoint` into the folder `output`, which appears only when it is complete.

    Args:
        checkpoint (`str` or `os.PathLike`): Folder or Hub repository of the original release.
        output (`str` or `os.PathLike`): New or empty folder.
        vision_tower (`str` or `os.PathLike`, *optional*): Folder or Hub repository of a CLIP checkpoint, to take the
            vision tower from instead of the release's shards.
        dtype (`str`, *optional*): `"float32"`, `"float16"` or `"bfloat16"`; the release's own by default.
        push_to_hub (`str`, *optional*): Hub repository to upload the finished folder to.
        report (`Callable[[str], None]`, *optional*, defaults to `print`): Receives what was done, line by line.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: if `checkpoint` is no complete LLaVA-UHD release or `output` is not empty. Nothing is left behind.
        FileNotFoundError: if a folder is missing.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    if push_to_hub is not None:
        validate_repo_id(push_to_hub)
    output = check_output_folder(output)
    folder = resolve_checkpoint(checkpoint, CHECKPOINT_PATTERNS)
    check_original_release(folder)
    vision_folder = None if vision_tower is None else resolve_checkpoint(vision_tower, VISION_TOWER_PATTERNS)
    config = LlavaUhdConfig.from_pretrained(folder, mm_vision_tower=vision_folder)
    processor = LlavaUhdProcessor.from_pretrained(folder)
    config.image_token_id = processor.image_token_id

    with ExitStack() as readers:
        source = OriginalTensors(folder, vision_folder, readers)
        report(source.description)
        target_dtype = source.common_dtype() if dtype is None else DTYPES[dtype]
        for part in (config, config.text_config, config.vision_config):
            part.dtype = target_dtype
        plan = plan_llava_uhd(config, source.tensors)
        for reason, count in Counter(plan.ignored.values()).items():
            report(f"Left out: {count} tensors, {reason}.")
        with atomic_folder(output) as incomplete:
            num_bytes = write_sharded(incomplete, plan.steps, source.read, dtype=target_dtype)
            config.save_pretrained(incomplete)
            processor.save_pretrained(incomplete)
            if (folder / "generation_config.json").is_file():
                GenerationConfig.from_pretrained(folder).save_pretrained(incomplete)
    report(f"Wrote {num_bytes / 1e6:,.0f} MB in {str(target_dtype)[6:]}, to {output}.")
    if push_to_hub is not None:
        upload(output, push_to_hub)
        report(f"Uploaded to https://huggingface.co/{push_to_hub}.")
    return output


def plan_llava_uhd(config: LlavaUhdConfig, tensors: Mapping[str, TensorInfo]) -> ConversionPlan:
    """How `tensors` become the model of `config`; ValueError unless they are exactly its own."""
    with torch.device("meta"):
        model = LlavaUhdForConditionalGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unused = unused_original_weights(config.vision_config)
    return plan_conversion(tensors, original_weight_mapping(), expected, unused, model)


def check_original_release(folder: Path):
    """ValueError unless `folder` is a final LLaVA-UHD checkpoint of the original code."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"The checkpoint must be a LLaVA-UHD release, but {folder} has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a configuration, but is no JSON: {error}. Download it again.") from error
    if not isinstance(config, dict) or not is_original_config(config):
        kind = config if isinstance(config, dict) else {}
        found = {key: kind.get(key) for key in ("model_type", "mm_projector_type")}
        hint = " It is converted already." if kind.get("model_type") == LlavaUhdConfig.model_type else ""
        raise ValueError(
            f"The checkpoint must be a LLaVA-UHD release by the original code, with `mm_projector_type` "
            f"'adapt_spatial_resampler', but {path} has {found}.{hint}"
        )
    if (folder / "mm_projector.bin").is_file() and not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise ValueError(
            f"{folder} is the output of the first training stage: it has mm_projector.bin but no language model. "
            "Pass the final checkpoint, with model-*.safetensors."
        )


class OriginalTensors:
    """The tensors of a release under their original names, with the vision tower of a CLIP checkpoint if one is given.

    Attributes:
        tensors (`dict[str, TensorInfo]`): Every tensor's shape and dtype.
        description (`str`): Where the vision tower is from.
    """

    def __init__(self, folder: Path, vision_folder: Path | None, readers: ExitStack):
        release = readers.enter_context(CheckpointReader(folder))
        self.tensors: dict[str, TensorInfo] = dict(release.tensors)
        self._places = {name: (release, name) for name in release.tensors}
        self.description = f"Vision tower: from the release's own shards, {folder}."
        if vision_folder is not None:
            clip = readers.enter_context(CheckpointReader(vision_folder))
            self._replace_vision_tower(clip)
            self.description = f"Vision tower: from {vision_folder}, not from the release's shards."
        self._release = release

    def read(self, name: str) -> torch.Tensor:
        reader, original_name = self._places[name]
        return reader.read(original_name)

    def _replace_vision_tower(self, clip: CheckpointReader):
        names = {name: name for name in clip.tensors if name.startswith("vision_model.")}
        # A CLIPVisionModel that transformers 5 saved has no prefix.
        names = names or {name: f"vision_model.{name}" for name in clip.tensors}
        for name in [name for name in self.tensors if name.startswith(VISION_TOWER_PREFIX)]:
            del self.tensors[name], self._places[name]
        for name, full_name in names.items():
            self.tensors[VISION_TOWER_PREFIX + full_name] = clip.tensors[name]
            self._places[VISION_TOWER_PREFIX + full_name] = (clip, name)

    def common_dtype(self) -> torch.dtype:
        """Of the release's own floating point tensors; ValueError if there are several."""
        dtypes = {info.dtype for info in self._release.tensors.values() if info.dtype.is_floating_point}
        if len(dtypes) != 1:
            raise ValueError(
                f"The checkpoint {self._release.folder} has floating point tensors of {len(dtypes)} dtypes "
                f"({', '.join(sorted(map(str, dtypes)))}), expected one. Choose the output's by `dtype` (`--dtype`)."
            )
        return dtypes.pop()


def upload(folder: Path, repo_id: str):
    """Uploads `folder`; ValueError if the Hub refuses it."""
    try:
        create_repo(repo_id, exist_ok=True)
        upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload converted LLaVA-UHD checkpoint")
    except (OSError, ValueError) as error:  # all of the Hub's errors are one or the other
        raise ValueError(
            f"The conversion is complete in {folder}, but could not be uploaded to {repo_id!r}: "
            f"{' '.join(str(error).split())} Log in with `hf auth login`, or upload it with `hf upload`."
        ) from error


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub repository of the original release")
    parser.add_argument("--output", required=True, help="new folder for the converted checkpoint")
    parser.add_argument(
        "--vision-tower",
        help="folder or Hub repository of CLIP, such as openai/clip-vit-large-patch14-336, to take the vision "
        "tower from, as the original code does at run time; by default it comes from the release's shards, which hold "
        "the same weights rounded to bfloat16",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the converted weights; the release's own by default")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the finished folder to this Hub repository")
    options = parser.parse_args(arguments)
    try:
        convert_llava_uhd_checkpoint(**vars(options))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
