"""Safe reading, planning and streaming writing of checkpoints. Nothing here knows a model family."""

from .combining import CheckpointTensors, vision_tower_names
from .lora import has_lora, merge_lora
from .mapping import ConversionPlan, ConversionStep, plan_conversion
from .reading import WEIGHT_FILES, CheckpointReader, resolve_checkpoint
from .shards import TensorInfo
from .writing import atomic_folder, check_output_folder, write_sharded


__all__ = [
    "WEIGHT_FILES",
    "CheckpointReader",
    "CheckpointTensors",
    "ConversionPlan",
    "ConversionStep",
    "TensorInfo",
    "atomic_folder",
    "check_output_folder",
    "has_lora",
    "merge_lora",
    "plan_conversion",
    "resolve_checkpoint",
    "vision_tower_names",
    "write_sharded",
]
