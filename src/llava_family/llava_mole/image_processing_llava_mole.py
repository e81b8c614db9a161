# Copyright 2026 The llava-family authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Torchvision image processor of LLaVA-MoLE: on the device of its input, within a few grey levels of the PIL one."""

import torch
from PIL import Image
from transformers.image_utils import ImageInput
from transformers.processing_utils import Unpack
from transformers.utils import auto_docstring

from ..llava_uhd.image_processing_square_llava_uhd import SquareOrSlicesImageProcessor
from .image_processing_pil_llava_mole import LlavaMoleImageProcessorKwargs


@auto_docstring(
    custom_intro="""
    Makes square views of images, or slices and an overview, by torchvision on the device of its input. Pixels are
    within a few grey levels of [`LlavaMoleImageProcessorPil`]'s.

    Source: the original code; CLIP's image processor in transformers.
    """
)
class LlavaMoleImageProcessor(SquareOrSlicesImageProcessor):
    def __init__(self, **kwargs: Unpack[LlavaMoleImageProcessorKwargs]):
        super().__init__(**kwargs)

    def process_image(self, image: ImageInput, do_convert_rgb: bool | None = None, **kwargs) -> torch.Tensor:
        # As in the original, transparency is dropped: transformers would put the image on white.
        if do_convert_rgb and isinstance(image, Image.Image):
            image = image.convert("RGB")
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

    def convert_to_rgb(self, image: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Makes RGB of a grey, RGB or RGBA image, `(channels, height, width)`, without its transparency."""
        return super().convert_to_rgb(image[:3] if len(image) == 4 else image, *args, **kwargs)


__all__ = ["LlavaMoleImageProcessor"]
