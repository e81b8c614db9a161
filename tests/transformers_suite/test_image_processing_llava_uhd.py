"""transformers' own image processor tests (`tests.*` is theirs, see prepare.py) on LLaVA-UHD."""

import unittest

import numpy as np
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from transformers.utils import is_torchvision_available

from llava_family import LlavaUhdImageProcessor, LlavaUhdImageProcessorPil, plan_slices
from llava_family.auto import register


register()


class LlavaUhdImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("base_size", 56)
        kwargs.setdefault("max_slices", 4)
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        # The mixin looks in-tree models up by the name of their folder.
        classes = {"pil": LlavaUhdImageProcessorPil}
        return {**classes, "torchvision": LlavaUhdImageProcessor} if is_torchvision_available() else classes

    def expected_output_shape(self, images):
        sizes = [image.size if hasattr(image, "getbands") else self.array_size(image) for image in images]
        num_patches = sum(plan_slices(*size, base_size=56, max_slices=4).num_patches for size in sizes)
        return (num_patches, self.num_channels * 14**2)

    @staticmethod
    def array_size(array):
        """`(width, height)` of a channels-first tensor or a channels-last array, as the mixin makes them."""
        height, width = array.shape[:2] if isinstance(array, np.ndarray) else array.shape[-2:]
        return width, height


class LlavaUhdImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = LlavaUhdImageProcessingTester
    # On noise, as here, bicubic overshoots; PIL clamps it between its two passes and torch only at the end. On
    # photographs the backends differ by one grey level, 0.015.
    backend_equivalence_atol = 0.3

    def check_call(self, inputs, **kwargs):
        # Patches of all images form one matrix, where the mixin expects a batch of equal images.
        for image_processing_class in self.image_processing_classes.values():
            image_processor = image_processing_class(**self.image_processor_dict)
            images = self.image_processor_tester.prepare_image_inputs(**inputs)
            for batch in (images[:1], images):
                encoded = image_processor(batch, return_tensors="pt", **kwargs)
                expected = self.image_processor_tester.expected_output_shape(batch)
                self.assertEqual(tuple(encoded["pixel_values"].shape), expected)
                self.assertEqual(tuple(encoded["image_grids"].shape), (len(batch), 3, 2))

    def test_call_pil(self):
        self.check_call({"equal_resolution": False})

    def test_call_numpy(self):
        self.check_call({"equal_resolution": False, "numpify": True})

    def test_call_pytorch(self):
        self.check_call({"equal_resolution": False, "torchify": True})

    def test_call_numpy_4_channels(self):
        self.image_processor_tester.num_channels = 4
        self.check_call(
            {"equal_resolution": False, "numpify": True},
            do_convert_rgb=False,
            input_data_format="channels_last",
            image_mean=[0.0] * 4,
            image_std=[1.0] * 4,
        )

    @unittest.skip("Runs a process that imports transformers alone: see tests/hub for exported image processors")
    def test_pil_can_run_without_torchvision(self):
        pass

    @unittest.skipUnless(is_torchvision_available(), "torchvision is not installed; its backend is optional here")
    def test_new_models_require_torchvision_backend(self):
        super().test_new_models_require_torchvision_backend()
