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
"""Processor of LLaVA-MoLE: prompts with image placeholders to token ids, images to pixels.

Its weights were trained on Vicuna's prompt, but not on LLaVA-1.5's ids of it: there is no token that begins the
sequence, a space ends the prompt and one stands behind every answer, and the text after an image begins as a text of
its own does.
"""

import re
from typing import Literal

from transformers.processing_utils import MultiModalData
from transformers.utils import auto_docstring
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_START

from ..llava_uhd.image_processing_pil_llava_uhd import check_setting
from ..llava_uhd.processing_llava_uhd import CHAT_TEMPLATE, MAX_VIEW_TOKENS, LlavaUhdProcessor


PromptStyle = Literal["original", "v1"]

# How SentencePiece writes a space
METASPACE = "\u2581"

# What the original makes of messages: the first one loses its literal `<image>` and outer whitespace, an empty one has
# nothing behind its role. Its system message and the macro `text_of` are Vicuna's. `{% generation %}` marks what is
# learned.
ORIGINAL_CHAT_TEMPLATE = (
    CHAT_TEMPLATE[: CHAT_TEMPLATE.index("{{- text_of(system)")]
    + """\
{{- text_of(system) + ' ' -}}
{%- for message in turns -%}
{%- set text = text_of(message['content']) -%}
{%- if message['role'] == 'user' -%}
{%- set text = text.replace('<image>', '').strip() if loop.first else text -%}
{{- 'USER: ' -}}
{%- set images = namespace(text='') -%}
{%- if message['content'] is not string -%}
{%- for item in message['content'] if item['type'] == 'image' -%}
{%- set images.text = images.text + '<image>\\n' -%}
{%- endfor -%}
{%- endif -%}
{{- images.text + text + ' ' if images.text + text else '' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- if text -%}
{%- generation -%}{{- ' ' + text + '</s>' -}}{%- endgeneration -%}
{%- endif -%}
{{- ' ' if not text or not loop.last or add_generation_prompt else '' -}}
{%- else -%}
{{- raise_exception("Roles are 'user' and 'assistant', behind at most one 'system', but one is " + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT: ' -}}{%- endif -%}
"""
)

CHAT_TEMPLATES = {"original": ORIGINAL_CHAT_TEMPLATE, "v1": CHAT_TEMPLATE}


@auto_docstring(
    custom_intro="""
    Makes a model's inputs of prompts and images: an image processor and a Llama tokenizer in one.

    Source: the original code's prompts and ids; transformers' `LlavaProcessor`.

    Raises a `ValueError` if `prompt_style` is unknown, a number or `image_token` is impossible, or the tokenizer
    does not encode the separators of slices as one token each.
    """
)
class LlavaMoleProcessor(LlavaUhdProcessor):
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens=578,
        num_queries=144,
        image_token="<image>",
        prompt_style: PromptStyle = "original",
        chat_template=None,
        **kwargs,
    ):
        r"""
        image_processor ([`LlavaMoleImageProcessorPil`] or [`LlavaMoleImageProcessor`], *optional*):
            Makes pixel values of images.
        tokenizer ([`LlamaTokenizer`], *optional*):
            Makes ids of prompts. It must encode a comma and a newline between placeholders as one token each.
        num_image_tokens (`int`, *optional*, defaults to 578):
            Features of an image under the vision encoding `"square"`, the learned start and end embeddings among them:
            1 + 576 + 1 for the released CLIP.
        num_queries (`int`, *optional*, defaults to 144):
            Features of every view under the vision encoding `"slices"`, as in the model's configuration. The start and
            end embeddings, around the views of an image, come on top.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Placeholder of an image in a prompt. It is added to a tokenizer that does not have it.
        prompt_style (`"original"` or `"v1"`, *optional*, defaults to `"original"`):
            `"original"` gives the ids that the original code gives: no token that begins the sequence unless
            `add_special_tokens=True` is passed, the newline behind a placeholder belongs to it, and the text behind an
            image or another special token begins with a space. `"v1"` is LLaVA-1.5's.
        chat_template (`str`, *optional*):
            Template of prompts, in Jinja. Defaults to that of `prompt_style`.
        """
        if not isinstance(prompt_style, str) or prompt_style not in CHAT_TEMPLATES:
            raise ValueError(f'`prompt_style` must be "original" or "v1", but is {prompt_style!r}.')
        check_setting("`num_image_tokens`", num_image_tokens, MAX_VIEW_TOKENS)
        self.num_image_tokens = num_image_tokens
        self.prompt_style = prompt_style
        if prompt_style == "original":
            self.text_kwargs = {"add_special_tokens": False}
        super().__init__(
            image_processor,
            tokenizer,
            num_queries=num_queries,
            image_token=image_token,
            chat_template=chat_template or CHAT_TEMPLATES[prompt_style],
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Makes what stands in the prompt for one image: a placeholder for every feature, for the start and end
        embeddings, and the separators of slices.

        Args:
            image_inputs (`dict`): What the image processor returned for all images.
            image_idx (`int`): Which of them it is.

        Returns:
            `str`: The text.
        """
        if "image_grids" in image_inputs:
            views = super().replace_image_token(image_inputs, image_idx, **kwargs)
            return self.image_token + views + self.image_token
        return self.image_token * self.num_image_tokens

    def get_text_with_replacements(self, text, images_replacements=(), *args, **kwargs):
        """
        Puts the placeholders of all features in for every image.

        Under the prompt style `"original"` the spaces that the original's tokenizer puts behind special tokens are
        replacements too, of the type `"text"`: of a character by a space and itself.

        Args:
            text (`list[str]`): Prompts.
            images_replacements (`list[str]`, *optional*): What to put in for each image, over all prompts.

        Returns:
            `tuple[list[str], list[list[dict]]]`: the new prompts, and the replacements in each with the keys `type`,
            `span`, `new_span`, `text` and `replacement`.
        """
        if self.prompt_style != "original":
            return super().get_text_with_replacements(text, images_replacements, *args, **kwargs)
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values() if not token.normalized]
        special = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
        if images_replacements:
            special = f"(?P<image>{re.escape(self.image_token)}\n?)|{special}"
        # `sanitize_control_tokens` marks what a user wrote, which is text.
        pattern = re.compile(f"(?<!{_CONTROL_TOKEN_START})(?:{special})")
        replacements = iter(images_replacements)
        expanded = [_replace(sample, self._find_replacements(sample, pattern, replacements)) for sample in text]
        return [sample for sample, _ in expanded], [offsets for _, offsets in expanded]

    def _find_replacements(self, sample: str, pattern: re.Pattern, replacements) -> list[tuple[str, int, int, str]]:
        """`(type, start, end, replacement)` of everything in `sample` that is not tokenized as it stands."""
        found = []
        # This one the tokenizer would take for the space that every text begins with.
        if self._starts_with_space and sample.startswith((" ", METASPACE)):
            found.append(("text", 0, 1, " " + sample[0]))
        for match in pattern.finditer(sample):
            end = match.end()
            needs_space = self._starts_with_space and end < len(sample) and not pattern.match(sample, end)
            if match.lastgroup == "image":
                found.append(("image", match.start(), end, next(replacements) + " " * needs_space))
            elif needs_space:
                # Together with the character behind it, or a mask of what ends here would take the space in.
                found.append(("text", end, end + 1, " " + sample[end]))
        return found

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """
        Computes the number of placeholder tokens needed for images of the given sizes.

        Args:
            image_sizes (`list[list[int]]`, *optional*):
                The input sizes formatted as (height, width) per each image.

        Returns:
            `MultiModalData`: with `num_image_tokens`, placeholders that features and the start and end embeddings
            replace, and `num_image_patches`, rows of `pixel_values`, per image.
        """
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge_kwargs(**kwargs)["images_kwargs"]
        if images_kwargs.get("vision_encoding", self.image_processor.vision_encoding) == "slices":
            counted = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
            counted.num_image_tokens = [2 + num_features for num_features in counted.num_image_tokens]
            return counted
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        processor_dict, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        # Another prompt style than the saved one comes with its own template, unless that was never a style's.
        if "prompt_style" in kwargs and processor_dict.get("chat_template") in CHAT_TEMPLATES.values():
            del processor_dict["chat_template"]
        return processor_dict, kwargs


def _replace(sample: str, found: list[tuple[str, int, int, str]]) -> tuple[str, list[dict]]:
    """The text with its replacements, which are in order, and a description of each as `ProcessorMixin` gives them."""
    expanded, offsets, last = "", [], 0
    for kind, start, end, replacement in found:
        expanded += sample[last:start]
        new_span = (len(expanded), len(expanded) + len(replacement))
        offsets.append(
            {
                "type": kind,
                "span": (start, end),
                "new_span": new_span,
                "text": sample[start:end],
                "replacement": replacement,
            }
        )
        expanded += replacement
        last = end
    return expanded + sample[last:], offsets


__all__ = ["LlavaMoleProcessor"]
