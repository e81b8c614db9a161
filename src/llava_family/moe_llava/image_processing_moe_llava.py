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
"""Torchvision image processor of MoE-LLaVA: on the device of its input, within a few grey levels of the PIL one."""

from transformers.processing_utils import Unpack
from transformers.utils import auto_docstring

from ..llava_uhd.image_processing_square_llava_uhd import SquareOrSlicesImageProcessor
from .image_processing_pil_moe_llava import MoeLlavaImageProcessorKwargs


@auto_docstring(
    custom_intro="""
    Makes square views of images, or slices and an overview, by torchvision on the device of its input. Pixels are
    within a few grey levels of [`MoeLlavaImageProcessorPil`]'s.

    Source: the original code's `expand2square`, and CLIP's or SigLIP's image processor.
    """
)
class MoeLlavaImageProcessor(SquareOrSlicesImageProcessor):
    def __init__(self, **kwargs: Unpack[MoeLlavaImageProcessorKwargs]):
        super().__init__(**kwargs)


__all__ = ["MoeLlavaImageProcessor"]
