"""transformers' own image processor tests (`tests.*` is theirs, see prepare.py) on MoE-LLaVA."""

import unittest

from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from transformers.utils import is_torchvision_available

from llava_family import MoeLlavaImageProcessor, MoeLlavaImageProcessorPil
from llava_family.auto import register


register()


class MoeLlavaImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"shortest_edge": 20})
        kwargs.setdefault("crop_size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        # The mixin looks in-tree models up by the name of their folder.
        classes = {"pil": MoeLlavaImageProcessorPil}
        return {**classes, "torchvision": MoeLlavaImageProcessor} if is_torchvision_available() else classes


class MoeLlavaImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = MoeLlavaImageProcessingTester

    @unittest.skip("Runs a process that imports transformers alone: see tests/hub for exported image processors")
    def test_pil_can_run_without_torchvision(self):
        pass

    @unittest.skipUnless(is_torchvision_available(), "torchvision is not installed; its backend is optional here")
    def test_new_models_require_torchvision_backend(self):
        super().test_new_models_require_torchvision_backend()
