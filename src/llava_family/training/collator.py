"""Conversations to batches, with labels on what the originals learn.

Source: LLaVA's `preprocess_v1` and `preprocess_plain`, as the original codes have them.
"""

from typing import Any, Literal

import torch


IGNORED = -100
TEMPLATES = ("chat", "plain")


class ConversationCollator:
    """Makes a padded batch with labels of the items of a [`ConversationDataset`].

    Args:
        processor ([`LlavaUhdProcessor`], [`MoeLlavaProcessor`] or [`LlavaMoleProcessor`]):
            Of the model to train. Its chat template must mark answers with `{% generation %}`.
        template (`"chat"` or `"plain"`, *optional*, defaults to `"chat"`):
            `"chat"` makes prompts with the processor's chat template, and learns all answers with the token that ends
            each. `"plain"` is LLaVA's first stage: the images, the answer as a caption and a newline, without the
            question; all text is learned.
        max_length (`int`, *optional*, defaults to 2048):
            Longest sequence, with all features of its images counted, as the originals do. Longer text is cut off at
            its end.
        images_kwargs (`dict`, *optional*):
            For the image processor, such as `{"max_slices": 1}` for LLaVA-UHD's first stage, which sees the overview
            alone.

    Raises:
        ValueError: if `template` or `max_length` is impossible.
    """

    def __init__(
        self,
        processor: Any,
        template: Literal["chat", "plain"] = "chat",
        max_length: int = 2048,
        images_kwargs: dict[str, Any] | None = None,
    ):
        if template not in TEMPLATES:
            raise ValueError(f"`template` must be one of {list(TEMPLATES)}, but is {template!r}.")
        if max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, but is {max_length}.")
        self.processor = processor
        self.template = template
        self.max_length = max_length
        self.images_kwargs = dict(images_kwargs or {})

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels`, int64 of shape `(batch_size,
            length)` and padded on the right, and the image processor's outputs for the images of all samples, if there
            are any: `pixel_values` and, for slices, `image_grids`.

        Raises:
            ValueError: that names the sample, if it cannot be processed, `max_length` would cut into its images, or
                nothing of it is learned.
        """
        encoded = [self._encode(sample) for sample in samples]
        padding = self.processor.tokenizer.pad_token_id
        batch = {
            # Any id would do, for it is masked.
            "input_ids": _pad([ids for ids, _, _ in encoded], 0 if padding is None else padding),
            "attention_mask": _pad([torch.ones_like(ids) for ids, _, _ in encoded], 0),
            "labels": _pad([labels for _, labels, _ in encoded], IGNORED),
        }
        images = [image_inputs for _, _, image_inputs in encoded if image_inputs]
        return batch | {name: torch.cat([inputs[name] for inputs in images]) for name in (images or [{}])[0]}

    def _encode(self, sample: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Ids and labels, `(length,)`, and the inputs of images."""
        encode = self._encode_chat if self.template == "chat" else self._encode_plain
        try:
            inputs, is_learned = encode(sample)
            ids = inputs.pop("input_ids")[0]
            ids, labels = self._truncate(ids, ids.masked_fill(~is_learned, IGNORED))
        except ValueError as error:
            raise ValueError(f"Sample {sample['id']!r}: {error}") from error
        # The first token has none before it that would predict it.
        if (labels[1:] == IGNORED).all():
            raise ValueError(
                f"Sample {sample['id']!r} has nothing to learn in its first {self.max_length} tokens: raise "
                "`max_length`, or leave it out. An own chat template must mark answers with `{% generation %}`."
            )
        image_names = self.processor.image_processor.model_input_names
        return ids, labels, {name: inputs[name] for name in image_names if name in inputs}

    def _truncate(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if (ids[self.max_length :] == self.processor.image_token_id).any():
            raise ValueError(
                f"`max_length` ({self.max_length}) would cut an image out of its {len(ids)} tokens. Raise it, ask for "
                "fewer slices, or leave the sample out."
            )
        return ids[: self.max_length], labels[: self.max_length]

    def _encode_chat(self, sample: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        messages = sample["messages"]
        # LLaVA-MoLE tokenizes the last answer by itself, in training as in generation, behind the space that ends its
        # prompt.
        is_apart = getattr(self.processor, "prompt_style", None) == "original"
        inputs = self.processor.apply_chat_template(
            messages[:-1] if is_apart else messages,
            add_generation_prompt=is_apart,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "images": sample["images"],
                "images_kwargs": self.images_kwargs,
                "return_tensors": "pt",
            },
        )
        is_learned = torch.as_tensor(inputs.pop("assistant_masks")).bool()[0]
        if is_apart:
            answer = "".join(item["text"] for item in messages[-1]["content"]) + self.processor.tokenizer.eos_token
            answer_ids = self.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], answer_ids], dim=1)
            is_learned = torch.cat([is_learned, torch.ones_like(answer_ids[0], dtype=torch.bool)])
        return inputs, is_learned

    def _encode_plain(self, sample: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        messages, images = sample["messages"], sample["images"]
        if [message["role"] for message in messages] != ["user", "assistant"] or not images:
            raise ValueError(
                'the template "plain" is for one question about an image and one answer, but this conversation has '
                f"{len(messages)} messages and {len(images)} images."
            )
        caption = "".join(item["text"] for item in messages[1]["content"])
        inputs = self.processor(
            images=images,
            text=self.processor.image_token * len(images) + caption + "\n",
            images_kwargs=self.images_kwargs,
            return_tensors="pt",
        )
        # Before the caption are images, what separates their slices, and the token that begins a sequence.
        last = (inputs["input_ids"][0] == self.processor.image_token_id).nonzero().max()
        return inputs, torch.arange(inputs["input_ids"].shape[1]) > last


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


__all__ = ["ConversationCollator"]
