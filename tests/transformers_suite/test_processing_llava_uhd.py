"""transformers' own processor tests (`tests.*` is theirs, see prepare.py) on LLaVA-UHD."""

import unittest
from pathlib import Path

from tests.test_processing_common import ProcessorTesterMixin
from transformers import LlamaTokenizer

from llava_family import LlavaUhdImageProcessorPil, LlavaUhdProcessor
from llava_family.auto import register


register()

ORIGINAL = Path(__file__).parents[1] / "fixtures" / "llava_uhd" / "original_checkpoint"


class LlavaUhdProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlavaUhdProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return LlamaTokenizer.from_pretrained(ORIGINAL)

    @classmethod
    def _setup_image_processor(cls):
        return LlavaUhdImageProcessorPil()

    @staticmethod
    def prepare_processor_dict():
        return {"num_queries": 4}

    def _test_apply_chat_template(self, *args, **kwargs):
        # The mixin counts one row per image: that is `image_grids`, while `pixel_values` has one per patch.
        self.images_input_name = "image_grids"
        super()._test_apply_chat_template(*args, **kwargs)
