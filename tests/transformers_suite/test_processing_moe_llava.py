"""transformers' own processor tests (`tests.*` is theirs, see prepare.py) on MoE-LLaVA."""

import unittest
from pathlib import Path

from tests.test_processing_common import ProcessorTesterMixin
from transformers import LlamaTokenizer

from llava_family import MoeLlavaImageProcessorPil, MoeLlavaProcessor
from llava_family.auto import register


register()

ORIGINAL = Path(__file__).parents[1] / "fixtures" / "llava_uhd" / "original_checkpoint"


class MoeLlavaProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MoeLlavaProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return LlamaTokenizer.from_pretrained(ORIGINAL)

    @classmethod
    def _setup_image_processor(cls):
        return MoeLlavaImageProcessorPil()

    @staticmethod
    def prepare_processor_dict():
        return {"num_image_tokens": 4}
