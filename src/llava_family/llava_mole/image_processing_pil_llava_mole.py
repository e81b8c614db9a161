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
"""PIL image processor of LLaVA-MoLE, the default: its pixels are those of the original code."""

from PIL import Image
from transformers.image_utils import ChannelDimension, ImageInput
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import auto_docstring

from ..llava_uhd.image_processing_pil_square_llava_uhd import (
    SquareOrSlicesImageProcessorKwargs,
    SquareOrSlicesImageProcessorPil,
)


LlavaMoleImageProcessorKwargs = SquareOrSlicesImageProcessorKwargs


@auto_docstring(
    custom_intro="""
    Makes square views of images, or slices and an overview. The pixels of square views are those of the original code.

    Source: the original code; CLIP's image processor in transformers.
    """
)
class LlavaMoleImageProcessorPil(SquareOrSlicesImageProcessorPil):
    def __init__(self, **kwargs: Unpack[LlavaMoleImageProcessorKwargs]):
        super().__init__(**kwargs)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Unpack[ImagesKwargs],
    ) -> tuple[Image.Image, float]:
        """Brings a PIL image or an array to 8 bits, upright and, with `do_convert_rgb`, to RGB.

        As in the original, transparency is dropped: under transparent pixels lies whatever color the file has there.

        Raises:
            ValueError: if the image has no pixels, or an array holds values that are no grey levels.
        """
        image, white = super().process_image(image, False, input_data_format, **kwargs)
        return (image.convert("RGB") if do_convert_rgb else image), white


__all__ = ["LlavaMoleImageProcessorPil"]
