"""A model of every family, small enough to train in seconds, its processor, and conversations to train it on."""

from pathlib import Path

import torch
from PIL import Image
from transformers import LlamaTokenizer

from llava_family import (
    LlavaMoleConfig,
    LlavaMoleForCausalLM,
    LlavaMoleImageProcessorPil,
    LlavaMoleProcessor,
    LlavaUhdConfig,
    LlavaUhdForConditionalGeneration,
    LlavaUhdImageProcessorPil,
    LlavaUhdProcessor,
    MoeLlavaConfig,
    MoeLlavaForCausalLM,
    MoeLlavaImageProcessorPil,
    MoeLlavaLlamaConfig,
    MoeLlavaProcessor,
)
from llava_family.training import (
    ConversationCollator,
    ConversationDataset,
    LlavaTrainer,
    LlavaTrainingArguments,
    freeze_for_finetuning,
    freeze_for_moe_tuning,
    freeze_for_mole_tuning,
)


FIXTURES = Path(__file__).parents[1] / "fixtures"
TOKENIZER = FIXTURES / "llava_uhd" / "original_checkpoint"
VOCABULARY = 384
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
SQUARE = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
WORDS = ["what", "is", "on", "this", "sign", "near", "the", "red", "house", "and", "how", "many", "lines", "are"]
RESAMPLER = {"num_queries": 4, "resampler_num_attention_heads": 2}


def tiny_processor(family):
    tokenizer = LlamaTokenizer.from_pretrained(TOKENIZER)
    if family == "llava_uhd":
        return LlavaUhdProcessor(LlavaUhdImageProcessorPil(base_size=56), tokenizer, num_queries=4)
    if family == "moe_llava":
        return MoeLlavaProcessor(MoeLlavaImageProcessorPil(**SQUARE), tokenizer, num_image_tokens=16)
    return LlavaMoleProcessor(LlavaMoleImageProcessorPil(**SQUARE), tokenizer, num_image_tokens=18)


def tiny_model(family, seed=0):
    """Random weights, the vision tower frozen; with dropout or sampled experts, so that training draws numbers."""
    torch.manual_seed(seed)
    if family == "llava_uhd":
        config = LlavaUhdConfig(
            text_config={"model_type": "llama", "attention_dropout": 0.1, **TEXT},
            vision_config=VISION,
            image_token_id=VOCABULARY,
            initializer_range=0.2,
            **RESAMPLER,
        )
        model, freeze = LlavaUhdForConditionalGeneration(config), freeze_for_finetuning
    elif family == "moe_llava":
        experts = {"num_experts": 4, "moe_layers": [0], "second_expert_policy": "sampling"}
        config = MoeLlavaConfig(
            text_config=MoeLlavaLlamaConfig(**TEXT, **experts),
            vision_config={"model_type": "clip_vision_model", **VISION},
            image_token_id=VOCABULARY,
        )
        model, freeze = MoeLlavaForCausalLM(config), freeze_for_moe_tuning
    else:
        config = LlavaMoleConfig(
            text_config={"model_type": "llava_mole_text", **TEXT, "r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            vision_config={"model_type": "clip_vision_model", **VISION},
            image_token_id=VOCABULARY,
        )
        model, freeze = LlavaMoleForCausalLM(config), freeze_for_mole_tuning
    freeze(model)
    return model


def without_randomness(model):
    """For trainings that draw their numbers in another order, as those of other numbers of processes do."""
    text = model.config.text_config
    text.attention_dropout = 0.0
    if hasattr(text, "second_expert_policy"):
        text.second_expert_policy = "top"
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def picture(index):
    """Of one color, every one of another shape."""
    return Image.new("RGB", (40 + 13 * (index % 5), 50 + 17 * (index % 3)), (index * 40 % 256, index * 90 % 256, 99))


def tiny_samples(num=24):
    """Conversations of one and two turns: a third with an image, a third with two, a third about text alone."""
    samples = []
    for index in range(num):
        num_images = index % 3
        question = "<image>\n" * num_images + " ".join(WORDS[index % 4 : index % 4 + 3 + index % 7])
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": " ".join(WORDS[: 2 + index % 5])}]
        if index % 2:
            turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
        images = [picture(index + number) for number in range(num_images)]
        samples.append({"id": f"s{index}", "image": images or None, "conversations": turns})
    return samples


def make_trainer(family, folder, model=None, samples=None, **arguments):
    arguments = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "group_by_modality_length": True,
        "seed": 3,
        **arguments,
    }
    return LlavaTrainer(
        model=tiny_model(family) if model is None else model,
        args=LlavaTrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=ConversationDataset(tiny_samples() if samples is None else samples),
        data_collator=ConversationCollator(tiny_processor(family), max_length=512),
    )


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
