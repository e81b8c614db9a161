"""Pictures in words, of which the miniatures' language model learns, say what is on them; a patch is one position."""

import random

import pytest
import torch


@pytest.fixture(scope="module")
def language(miniature):
    return miniature("language")


@pytest.fixture(scope="module")
def tokenizer(language):
    return language.build_tokenizer()


LAYOUTS = [(1, 1, 64), (2, 1, 36), (1, 3, 36), (2, 2, 36)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_descriptions_show_what_is_there(language, layout):
    columns, rows, cells = layout
    overviews = set()
    for seed in range(100):
        described = language.describe(random.Random(seed), layout)
        num_slices = columns * rows
        assert len(described.views) == num_slices + (num_slices > 1) and described.columns == columns
        assert {len(view) for view in described.views} == {cells}
        shown = [[part for part in view if part != (language.NOTHING,)] for view in described.views]
        slices = [part for view in shown[:num_slices] for part in view]
        digits = [part for part in slices if part[0] in language.DIGITS]
        assert "".join(part[0] for part in digits) == described.number
        assert all(part[1:] == ((f" {described.ink}",) if described.ink else ()) for part in digits)
        assert sorted("".join(part).strip() for part in slices if part not in digits) == sorted(described.shapes)
        if num_slices > 1:
            overviews.add(len(shown[-1]) > 0)
            assert sorted(shown[-1]) in ([], sorted(slices))
            assert [part for part in shown[-1] if part in digits] in ([], digits)
    assert overviews == ({True, False} if columns * rows > 1 else set())


def test_questions_are_answered_by_the_picture(language):
    asked = set()
    for seed in range(400):
        rng = random.Random(seed)
        described = language.describe(rng, (1, 1, 36))
        question, answer = language.ask(rng, described)
        expected = {language.READ: described.number, language.COUNT: str(len(described.shapes))}
        expected[language.COLOUR_OF.format("number")] = described.ink
        for shape in described.shapes:
            colour, kind = shape.split()
            expected |= {language.COLOUR_OF.format(kind): colour, language.SHAPE_OF.format(colour): kind}
        assert answer == expected[question]
        asked.add(question.split()[0])
    assert asked == {"What", "Which", "How"}
    assert language.LIVES not in asked


def test_a_patch_is_one_position(language, tokenizer):
    prompt = [("A chat. USER:",), ("7", " red"), (language.NOTHING,), (" blue", " circle"), ("\nWhat",)]
    positions = language.encode(tokenizer, prompt)
    text = "A chat. USER:"
    before = len(tokenizer(text)["input_ids"])
    assert [len(ids) for ids in positions[:before]] == [1] * before
    pairs = [
        tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))[0] for word in ("7", " red", " blue", " circle")
    ]
    assert positions[before] == pairs[:2] and positions[before + 2] == pairs[2:]
    assert positions[before + 1] == tokenizer(language.NOTHING)["input_ids"] and len(positions[before + 1]) == 1


def test_positions_are_sums_and_answers_are_learned(language, tokenizer):
    config = language.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    config.pad_token_id = tokenizer.pad_token_id
    model = language.LlamaForCausalLM(config)
    batch = language.draw_batch(random.Random(0), tokenizer, 8)
    embedded = language.embed(model, batch)
    table = model.get_input_embeddings().weight
    doubled = 0
    for row, labels, mask, embeds in zip(*batch.values(), embedded["inputs_embeds"], strict=True):
        for ids, label, seen, embed in zip(row.tolist(), labels.tolist(), mask.tolist(), embeds, strict=True):
            words = [token for token in ids if token != tokenizer.pad_token_id]
            assert (len(words) > 0) == bool(seen)
            doubled += len(words) == 2
            torch.testing.assert_close(embed, table[words].sum(0) if words else torch.zeros(8))
            assert label in (-100, words[0] if len(words) == 1 else -100)
        learned = tokenizer.decode([label for label in labels.tolist() if label != -100])
        assert learned.endswith((language.END_OF_TURN, "\n"))
    assert doubled > 8
