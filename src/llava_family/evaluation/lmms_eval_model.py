"""The chat model of lmms-eval for all three families. Only lmms-eval imports this.

Source: the interface of lmms-eval 0.7.3, `lmms_eval.api.model.lmms`, and its own chat models.
"""

import json
import re
from collections import defaultdict
from dataclasses import replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from .answering import answer_batch, load
from .settings import SETTINGS, GenerationSettings


# Tasks of lmms-eval whose questions are those of a benchmark: `textvqa_val_lite`, but not `mme_realworld`
BENCHMARK_TASKS = re.compile(
    r"(textvqa|pope|scienceqa|mmbench_en|gqa|vqav2|vizwiz_vqa|mme)(_(val|test|dev|full|img|lite|static|adv|pop|random))*"
)
BENCHMARK_NAMES = {"mmbench_en": "mmbench", "vizwiz_vqa": "vizwiz"}


def task_settings(
    family: str, task: str, generation_kwargs: dict[str, Any], decoding: Literal["task", "paper"] = "task"
) -> tuple[GenerationSettings, dict[str, Any]]:
    """
    How to decode the requests of a task.

    Args:
        family (`str`): Type of the model.
        task (`str`): lmms-eval's name of it.
        generation_kwargs (`dict[str, Any]`): What the task's file and `--gen_kwargs` say.
        decoding (`str`): `"task"` lets `generation_kwargs` win over the paper's settings, `"paper"` the paper's over
            them, where the task is of a benchmark that `SETTINGS` has.

    Returns:
        `tuple[GenerationSettings, dict[str, Any]]`: the settings, without a suffix, as tasks bring their prompts; and
        arguments of `generate` that replace theirs, for sampling.
    """
    match = BENCHMARK_TASKS.fullmatch(task)
    if match:
        settings = replace(SETTINGS[family][BENCHMARK_NAMES.get(match[1], match[1])], suffix="")
        if decoding == "paper":
            return settings, {}
    else:
        # Of a benchmark that is not known, lmms-eval's usual length and what the family always does
        known = SETTINGS[family]["textvqa"]
        settings = GenerationSettings(
            "lmms-eval", known.prefix, max_new_tokens=1024, repetition_penalty=known.repetition_penalty
        )
    names = ("num_beams", "max_new_tokens", "repetition_penalty")
    given = {name: generation_kwargs[name] for name in names if generation_kwargs.get(name) is not None}
    sampling = {}
    if generation_kwargs.get("do_sample") is not False and (generation_kwargs.get("temperature") or 0) > 0:
        sampling = {name: generation_kwargs.get(name) for name in ("temperature", "top_p", "top_k")}
        sampling = {"do_sample": True, **{name: value for name, value in sampling.items() if value is not None}}
    return replace(settings, **given), sampling


class LlavaFamilyChat(lmms):
    """
    LLaVA-UHD, MoE-LLaVA and LLaVA-MoLE for lmms-eval 0.7.3.

    Args:
        pretrained (`str`): Folder or Hub repository of a checkpoint.
        batch_size (`int` or `str`, *optional*, defaults to 1): Number of requests that are answered together.
        device (`str`, *optional*): By default the GPU where there is one; each process of several takes its own.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights.
        decoding (`"task"` or `"paper"`, *optional*, defaults to `"task"`): See `task_settings`.

    Raises:
        ValueError: if the checkpoint is of another type, or an argument has a value that it cannot have.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        decoding: Literal["task", "paper"] = "task",
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` must be a whole number of at least 1, but is {batch_size!r}.")
        if decoding not in ("task", "paper"):
            raise ValueError(f'`decoding` must be "task" or "paper", but is {decoding!r}.')
        self.batch_size, self.decoding = int(batch_size), decoding
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        self.model, self.processor = load(pretrained, dtype, device)

    @property
    def config(self) -> Any:
        """The checkpoint's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """
        Answers requests of one round, those of one task and its settings in batches.

        Args:
            requests (`list[Instance]`): With the arguments context, function from a document to messages, generation
                arguments, document's number, task and split.

        Returns:
            `list[str]`: one answer each, up to the first of the texts in `until`.

        Raises:
            ValueError: if a request has something else than text and images.
        """
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            _, _, generation_kwargs, _, task, _ = request.args
            groups[task, json.dumps(generation_kwargs, sort_keys=True, default=str)].append(index)
        answers: list[str] = [""] * len(requests)
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        for (task, _), members in groups.items():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                _, _, generation_kwargs, *_ = requests[batch[0]].args
                conversations = [self._first_messages(requests[index]) for index in batch]
                for index, answer in zip(batch, self._answer(conversations, task, generation_kwargs), strict=True):
                    answers[index] = answer
                    self.cache_hook.add_partial("generate_until", requests[index].args, answer)
                progress.update(len(batch))
        progress.close()
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """
        Answers requests of several rounds: the task gives the messages of each from the answers before it.

        Args:
            requests (`list[Instance]`): As `generate_until`'s.

        Returns:
            `list[list[str]]`: the answers of all rounds, for each request.

        Raises:
            ValueError: if a request has something else than text and images.
        """
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="Model Responding"):
            _, to_messages, generation_kwargs, document_id, task, split = request.args
            document = self.task_dict[task][split][document_id]
            messages, info, answers = to_messages(document), None, []
            while messages is not None:
                answers += self._answer([messages], task, generation_kwargs)
                given = to_messages(
                    document, round_idx=len(answers), previous_output=list(answers), previous_round_info=info
                )
                if not isinstance(given, tuple) or len(given) != 4:
                    break
                messages, is_over, _, info = given
                if is_over:
                    break
            results.append(answers)
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """
        Not supported, as by lmms-eval's own chat models.

        Args:
            requests (`list[Instance]`): Not read.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("The models of llava-family generate; choose tasks of the type `generate_until`.")

    def _first_messages(self, request: Instance) -> list[dict[str, Any]]:
        _, to_messages, _, document_id, task, split = request.args
        return to_messages(self.task_dict[task][split][document_id])

    def _answer(self, conversations: list[Any], task: str, generation_kwargs: dict[str, Any]) -> list[str]:
        settings, sampling = task_settings(self.config.model_type, task, generation_kwargs, self.decoding)
        answers = answer_batch(
            self.model,
            self.processor,
            [_prepare(messages, settings.prefix) for messages in conversations],
            settings,
            **sampling,
        )
        until = generation_kwargs.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            answers = [answer.partition(stop)[0].strip() if stop else answer for answer in answers]
        return answers


def _prepare(messages: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """Messages as `apply_chat_template` takes them, with the prefix before the last user's text."""
    prepared = ChatMessages(messages=messages).to_hf_messages()
    types = {item["type"] for message in prepared for item in message["content"]}
    if not types <= {"text", "image"}:
        raise ValueError(f"The models take text and images, but a task has {', '.join(sorted(types))}.")
    if prefix:
        texts = [item for item in prepared[-1]["content"] if item["type"] == "text"]
        texts[0]["text"] = prefix + texts[0]["text"]
    return prepared
