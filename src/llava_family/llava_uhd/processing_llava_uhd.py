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
"""Processor of LLaVA-UHD: prompts with image placeholders to token ids, images to patches of their views."""

import re
from importlib import import_module
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import auto_docstring

from .configuration_llava_uhd import is_original_config
from .image_processing_pil_llava_uhd import LlavaUhdImageProcessorPil, check_setting
from .loading_llava_uhd import loading


# The spatial schema (paper, section 3.4): a comma behind every slice, a newline behind the last one of a row.
COLUMN_SEPARATOR, ROW_SEPARATOR = ",", "\n"

# Vicuna v1, exactly as in training; images come first in their message. `{% generation %}` marks what is learned.
CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system, turns = messages[0]['content'], messages[1:] -%}
{%- else -%}
{%- set system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives \
helpful, detailed, and polite answers to the user's questions." -%}
{%- set turns = messages -%}
{%- endif -%}
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for item in content if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- text_of(system) + ' ' -}}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' -}}
{%- if message['content'] is not string -%}
{%- for item in message['content'] if item['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- endif -%}
{{- text_of(message['content']) + ' ' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}{{- ' ' + text_of(message['content']) + '</s>' -}}{%- endgeneration -%}
{%- else -%}
{{- raise_exception("Roles are 'user' and 'assistant', behind at most one 'system', but one is " + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


# Far more than a vision tower gives for one view. A number from a file may be such that placeholders fill the memory.
MAX_VIEW_TOKENS = 2**14


@auto_docstring(
    custom_intro="""
    Makes a model's inputs of prompts and images: an image processor and a Llama tokenizer in one.

    Source: the paper's section 3.4 and the original code's prompts; transformers' `LlavaProcessor`.

    Raises a `ValueError` if `num_queries` or `image_token` is impossible, or the tokenizer does not encode the
    separators of slices as one token each.
    """
)
class LlavaUhdProcessor(ProcessorMixin):
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_queries=144,
        image_token="<image>",
        chat_template=None,
        **kwargs,
    ):
        r"""
        image_processor ([`LlavaUhdImageProcessorPil`] or [`LlavaUhdImageProcessor`], *optional*):
            Makes patches of images.
        tokenizer ([`LlamaTokenizer`], *optional*):
            Makes ids of prompts. It must encode a comma and a newline between placeholders as one token each.
        num_queries (`int`, *optional*, defaults to 144):
            Features of every view, as in the model's configuration: 144 for the released weights.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Placeholder of an image in a prompt. It is added to a tokenizer that does not have it.
        chat_template (`str`, *optional*):
            Template of prompts, in Jinja. Defaults to Vicuna's, with images in front of their message.
        """
        check_setting("`num_queries`", num_queries, MAX_VIEW_TOKENS)
        if not isinstance(image_token, str) or not image_token:
            raise ValueError(f"`image_token` must be a text that is not empty, but is {image_token!r}.")
        if tokenizer is not None and image_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([image_token], special_tokens=True)
        self.num_queries = num_queries
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self._check_separators()

    def _check_separators(self) -> None:
        """Looks the separators' ids up and makes sure that they survive between placeholders as one token each."""
        text = self.image_token + COLUMN_SEPARATOR + self.image_token + ROW_SEPARATOR + self.image_token
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 5 or ids[::2] != [self.image_token_id] * 3:
            raise ValueError(
                f"{type(self.tokenizer).__name__} must encode {COLUMN_SEPARATOR!r} and {ROW_SEPARATOR!r} "
                f"between image tokens as one token each, but {text!r} becomes {ids}. A Llama tokenizer needs "
                "`legacy=False`."
            )
        self.column_separator_id, self.row_separator_id = ids[1], ids[3]
        # SentencePiece puts a space before the first piece of a text, and the original tokenizes the text behind an
        # image by itself.
        self._starts_with_space = self.tokenizer.tokenize(COLUMN_SEPARATOR)[0].startswith("\u2581")

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Makes what stands in the prompt for one image: a placeholder for every feature, and the separators of
        slices.

        Args:
            image_inputs (`dict`): What the image processor returned for all images.
            image_idx (`int`): Which of them it is.

        Returns:
            `str`: The text.
        """
        rows, columns = (int(number) for number in image_inputs["image_grids"][image_idx][0])
        view = self.image_token * self.num_queries
        row = COLUMN_SEPARATOR.join([view] * columns) + ROW_SEPARATOR
        return row * rows + view

    def get_text_with_replacements(self, text, images_replacements=(), *args, **kwargs):
        if self._starts_with_space and images_replacements:
            special = "|".join(map(re.escape, [self.image_token, *self.tokenizer.all_special_tokens]))
            images_replacements = list(images_replacements)
            followers = [
                sample[match.end() :] for sample in text for match in re.finditer(re.escape(self.image_token), sample)
            ]
            for index, follower in enumerate(followers[: len(images_replacements)]):
                if follower and not re.match(special, follower):
                    images_replacements[index] += " "
        return super().get_text_with_replacements(text, images_replacements, *args, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """
        Computes the number of placeholder tokens needed for images of the given sizes.

        Args:
            image_sizes (`list[list[int]]`, *optional*):
                The input sizes formatted as (height, width) per each image.

        Returns:
            `MultiModalData`: with `num_image_tokens`, placeholders that features replace (the separators between
            slices are text), and `num_image_patches`, rows of `pixel_values`, per image.
        """
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_kwargs(**kwargs)["images_kwargs"]
        plans = [self.image_processor.slice_plan(width, height, **images_kwargs) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[plan.num_features(self.num_queries) for plan in plans],
            num_image_patches=[plan.num_patches for plan in plans],
        )

    def explain(self, image, prompt: str | None = None, **kwargs: Any):
        """
        Explains what becomes of one image: its views, what the language model reads of it, and what that costs.

        Args:
            image (`PIL.Image.Image`, `str`, `os.PathLike`, `bytes`, `np.ndarray` or `torch.Tensor`):
                One image: PIL image, path, URL, bytes of a file, or grey levels of shape `(height, width)`, `(height,
                width, channels)` or `(channels, height, width)`, of dtype uint8 or of any other that processors take.
            prompt (`str`, *optional*):
                A question about the image, for the layout of the whole prompt.
            kwargs:
                Settings of the image processor, as in a call of the processor.

        Returns:
            `ImageExplanation`: of `llava_family.inspection.explaining`. `print` it, or draw it with `plot`.

        Raises:
            ValueError: if `image` is not one image that can be read, or a setting is wrong.
            ImportError: if the package llava-family is not installed, which exported code does without.
        """
        try:  # By its name, so that the code of an exported repository does not need it.
            explaining = import_module("llava_family.inspection.explaining")
        except ImportError as error:
            raise ImportError(
                "`explain` is in the package llava-family, which cannot be imported: `pip install llava-family`."
            ) from error
        return explaining.explain_with_processor(self, image, prompt, **kwargs)

    @property
    def model_input_names(self):
        """Names of what a call returns: those of the tokenizer and of the image processor."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def _merge_kwargs(self, *args, **kwargs):
        try:
            return super()._merge_kwargs(*args, **kwargs)
        except StrictDataclassError as error:  # which is no `ValueError`
            raise ValueError(
                f"An argument of the processor, or a setting of its tokenizer, is wrong: {error}"
            ) from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, mm_vision_tower=None, **kwargs):
        """As [`ProcessorMixin.from_pretrained`], also of an original release, which has a tokenizer alone.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub repository.
            mm_vision_tower (`str` or `os.PathLike`, *optional*): Ignored. The configuration of an original release
                takes it, and one set of arguments shall load all parts of a release.

        Returns:
            `LlavaUhdProcessor`: An instance of the class that this is called on.

        Raises:
            ValueError: if a file is malformed.
        """
        # `mm_vision_tower` tells the configuration of an original release where CLIP lies. A processor has no use for
        # it, but one set of arguments shall load all parts of a release.
        with loading(f"The processor in {pretrained_model_name_or_path}"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        config_dict, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not processor_dict and is_original_config(config_dict):
            # Releases have a tokenizer alone, padding on the right as in training. Generation needs it on the left.
            tokenizer = LlamaTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
            tokenizer.padding_side = "left"
            return [LlavaUhdImageProcessorPil(), tokenizer]
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)


__all__ = ["LlavaUhdProcessor"]
