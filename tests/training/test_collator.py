"""Batches of conversations. That labels are the originals' is tested with the goldens of every family."""

import pytest
import torch
from PIL import Image

from llava_family.training import ConversationCollator, ConversationDataset

from .tiny import picture, tiny_model, tiny_processor, tiny_samples


FAMILIES = ("llava_uhd", "moe_llava", "llava_mole")


def items(samples=None):
    dataset = ConversationDataset(tiny_samples() if samples is None else samples)
    return [dataset[index] for index in range(len(dataset))]


def conversation(question, *answer, image=None):
    turns = [{"from": "human", "value": question}, *({"from": "gpt", "value": text} for text in answer)]
    return {"id": "one", "image": image, "conversations": turns}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def processor(family):
    return tiny_processor(family)


def learned(processor, labels):
    return processor.tokenizer.decode([label for label in labels.tolist() if label != -100])


def test_answers_are_learned_with_their_end(processor):
    samples = tiny_samples(6)
    batch = ConversationCollator(processor)(items(samples))
    assert list(batch)[:3] == ["input_ids", "attention_mask", "labels"]
    for row, sample in enumerate(samples):
        answers = [turn["value"] for turn in sample["conversations"][1::2]]
        text = learned(processor, batch["labels"][row])
        assert text.split("</s>")[-1] == "" and [answer.strip() for answer in text.split("</s>")[:-1]] == answers
    is_learned = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_learned], batch["input_ids"][is_learned])
    assert not is_learned[batch["attention_mask"] == 0].any()
    assert not is_learned[batch["input_ids"] == processor.image_token_id].any()
    lengths = batch["attention_mask"].sum(1)
    assert torch.equal(batch["attention_mask"].bool(), torch.arange(lengths.max()) < lengths[:, None])  # on the right
    assert len(lengths.unique()) > 3


def test_a_batch_is_its_rows(family, processor):
    samples = items()
    collator = ConversationCollator(processor)
    batch = collator(samples)
    pixel_values = []
    for row, sample in enumerate(samples):
        alone = collator([sample])
        length = alone["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(batch[name][row, :length], alone[name][0])
            assert (batch[name][row, length:] == {"labels": -100}.get(name, 0)).all()
        pixel_values += [alone["pixel_values"]] if sample["images"] else []
        assert ("pixel_values" in alone) == bool(sample["images"])
    assert torch.equal(batch["pixel_values"], torch.cat(pixel_values))
    assert ("image_grids" in batch) == (family == "llava_uhd")


@pytest.mark.slow
def test_the_model_takes_it(family, processor):
    batch = ConversationCollator(processor)(items())
    loss = tiny_model(family)(**batch).loss
    loss.backward()
    assert loss.isfinite()


def test_training_and_generation_see_the_same_prompt(processor):
    """What stands before an answer in training is what a processor makes of the question."""
    for samples in (tiny_samples(3), tiny_samples(3)[::-1]):
        for sample in items(samples):
            batch = ConversationCollator(processor)([sample])
            prompt = processor.apply_chat_template(sample["messages"][:-1], add_generation_prompt=True)
            inputs = processor(text=prompt, images=sample["images"] or None, return_tensors="pt")
            length = inputs["input_ids"].shape[1]
            assert torch.equal(batch["input_ids"][:, :length], inputs["input_ids"])
            assert batch["labels"][0, length - 1] == -100 and (batch["labels"][0, length:] != -100).all()


def test_plain_template(processor):
    samples = [
        conversation("Ignore me.\n<image>", "a house", image=picture(1)),
        conversation("<image>", "two\nlines and a house", image=picture(2)),
    ]
    batch = ConversationCollator(processor, "plain")(items(samples))
    bos = [processor.tokenizer.bos_token_id] if processor.tokenizer("a")["input_ids"][0] == 1 else []
    for row, caption in enumerate(["a house", "two\nlines and a house"]):
        ids = batch["input_ids"][row]
        is_image = ids == processor.image_token_id
        last = is_image.nonzero().max()
        length = batch["attention_mask"][row].sum()
        assert learned(processor, batch["labels"][row]) == caption + "\n"
        assert torch.equal(batch["labels"][row, last + 1 : length], ids[last + 1 : length])
        assert (batch["labels"][row, : last + 1] == -100).all() and (batch["labels"][row, length:] == -100).all()
        if not getattr(processor, "prompt_style", None):
            assert ids[: len(bos)].tolist() == bos


@pytest.mark.parametrize("num_images", [1, 2])
def test_separators_of_slices_are_not_learned(num_images):
    processor, image = tiny_processor("llava_uhd"), Image.new("RGB", (200, 150))
    sample = conversation("<image>" * num_images, "a house", image=[image] * num_images)
    for template in ("chat", "plain"):
        batch = ConversationCollator(processor, template)(items([sample]))
        end = "</s>" if template == "chat" else "\n"
        assert learned(processor, batch["labels"][0]) == "a house" + end
        assert processor.column_separator_id in batch["input_ids"] and batch["image_grids"][0, 0].prod() > 1


def test_images_kwargs_reach_the_image_processor():
    processor, samples = (
        tiny_processor("llava_uhd"),
        items([conversation("<image>", "a", image=Image.new("RGB", (200, 150)))]),
    )
    sliced = ConversationCollator(processor)(samples)
    overview = ConversationCollator(processor, images_kwargs={"max_slices": 1})(samples)
    assert sliced["image_grids"][0, 0].prod() > 1 and overview["image_grids"][0, 0].tolist() == [0, 0]
    assert (overview["input_ids"] == processor.image_token_id).sum() == processor.num_queries


def test_long_text_is_cut_at_its_end(processor):
    sample = items([conversation("<image>\nWhat?", "house " * 50, image=picture(1))])
    whole = ConversationCollator(processor)(sample)
    length = whole["input_ids"].shape[1] - 20
    cut = ConversationCollator(processor, max_length=length)(sample)
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(cut[name], whole[name][:, :length])
    assert torch.equal(cut["pixel_values"], whole["pixel_values"])
    exact = ConversationCollator(processor, max_length=length + 20)(sample)
    assert torch.equal(exact["input_ids"], whole["input_ids"])


def test_images_are_not_cut(processor):
    sample = items([conversation("<image>\nWhat?", "a house", image=picture(1))])
    ids = ConversationCollator(processor)(sample)["input_ids"][0]
    last = int((ids == processor.image_token_id).nonzero().max())
    with pytest.raises(
        ValueError, match=rf"Sample 'one': `max_length` \({last}\) would cut an image out of its {len(ids)}"
    ):
        ConversationCollator(processor, max_length=last)(sample)
    # The image is whole, but all of the answer is cut.
    with pytest.raises(ValueError, match=rf"Sample 'one' has nothing to learn in its first {last + 1} tokens"):
        ConversationCollator(processor, max_length=last + 1)(sample)


def test_a_bad_sample_of_a_batch_is_named(processor):
    good, bad = items([conversation("<image>", "a", image=picture(1)), conversation("Hi?", "a")])
    bad["id"] = "bad"
    with pytest.raises(ValueError, match="Sample 'bad': the template \"plain\" is for one question about an image"):
        ConversationCollator(processor, "plain")([good, bad])
    with pytest.raises(ValueError, match="Sample 'bad': .*<image>.*2 images"):
        ConversationCollator(processor)([good, {**good, "id": "bad", "images": good["images"] * 2}])
    thin = {**good, "id": "thin", "images": [Image.new("RGB", (0, 5))]}
    with pytest.raises(ValueError, match="Sample 'thin': .*pixels"):
        ConversationCollator(processor)([good, thin])


def test_arguments(processor):
    with pytest.raises(ValueError, match="`template` must be one of .*'chat', 'plain'.*but is 'v1'"):
        ConversationCollator(processor, "v1")
    with pytest.raises(ValueError, match="`max_length` must be at least 1, but is 0"):
        ConversationCollator(processor, max_length=0)


@pytest.mark.parametrize("family", ["llava_uhd", "moe_llava"])
def test_a_template_without_marked_answers_is_refused(family):
    processor = tiny_processor(family)
    processor.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="Sample 'one' has nothing to learn"):
        ConversationCollator(processor)(items([conversation("Hi?", "a")]))


def test_samples_and_messages_stay_as_they_are(processor):
    (sample,) = items([conversation("<image>\nWhat?", "a", image=picture(1))])
    before = repr(sample)
    ConversationCollator(processor)([sample])
    assert repr(sample) == before
