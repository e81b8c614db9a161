"""transformers' own processor tests (`tests.*` is theirs, see prepare.py) on LLaVA-MoLE."""

import unittest
from pathlib import Path

from tests.test_processing_common import ProcessorTesterMixin
from transformers import LlamaTokenizer

from llava_family import LlavaMoleImageProcessorPil, LlavaMoleProcessor
from llava_family.auto import register


register()

ORIGINAL = Path(__file__).parents[1] / "fixtures" / "llava_mole" / "original_checkpoint" / "vicuna-7b-v1.5"


class LlavaMoleProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlavaMoleProcessor

    @classmethod
    def _setup_tokenizer(cls):
        # Prompts of the style "original" have no such token, but the mixin expects the tokenizer's own ids.
        return LlamaTokenizer.from_pretrained(ORIGINAL, add_bos_token=False)

    @classmethod
    def _setup_image_processor(cls):
        return LlavaMoleImageProcessorPil()

    @staticmethod
    def prepare_processor_dict():
        return {"num_image_tokens": 4}
