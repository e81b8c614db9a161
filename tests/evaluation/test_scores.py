"""The published scores, compared with values worked out by hand."""

import pytest

from llava_family.evaluation import (
    binary_scores,
    circular_accuracy,
    exact_match,
    normalise_gqa_answer,
    normalise_vqa_answer,
    parse_letter,
    parse_option,
    parse_yes_no,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The Cat", "cat"),  # articles, lower case
        ("a an the", ""),
        ("theatre another", "theatre another"),  # articles within words stay
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),  # number words end at ten
        ("someone", "someone"),  # "one" within a word
        ("3.5", "3.5"),  # a decimal period stays
        ("Stop.", "stop"),
        ("St. John", "st john"),
        ("$2.50.", "$2.50"),
        ("1,000", "1000"),
        ("red, blue", "red blue"),
        ("red,blue", "redblue"),  # as published: commas vanish before words are told apart
        ("really?", "really"),
        ("well-known", "well known"),  # a hyphen between letters is a space
        ("well - known", "well known"),  # beside a space it vanishes
        ("e-mail -x", "email x"),  # as published: beside a space once, it vanishes everywhere
        ("10:30 PM", "10:30 pm"),  # colons stay
        ("(yes)", "yes"),
        ("and/or", "and or"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("its", "its"),  # a word of its own, not a contraction
        ("girl's", "girl 's"),  # both sides are split
        ("line\none", "line 1"),
        ("  ", ""),
    ],
)
def test_normalised_vqa_answers(answer, normalised):
    assert normalise_vqa_answer(answer) == normalised


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("red", ["red"] * 10, 1.0),
        # Leaving out one of four leaves three: 1. Leaving out another one leaves four: 1.
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
        # Three: without one of them 2/3, three times; without another 1, seven times. (2 + 7) / 10
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),
        # Two: 2 × 1/3 + 8 × 2/3 = 6
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6),
        # One: 1 × 0 + 9 × 1/3 = 3
        ("red", ["red"] + ["blue"] * 9, 0.3),
        ("green", ["red"] * 10, 0.0),
        # Both sides are normalised: five of ten are "2"
        ("Two.", ["2", "two", "the 2", "2.", "2"] + ["3"] * 5, 1.0),
        # A tie of annotators is right for both answers
        ("cat", ["cat"] * 5 + ["dog"] * 5, 1.0),
        ("dog", ["cat"] * 5 + ["dog"] * 5, 1.0),
        # An empty answer is what annotators write as "" or as an article
        ("", ["the"] + ["x"] * 9, 0.3),
        # Two annotators: 1/3 without each one
        ("x", ["x", "x"], 1 / 3),
    ],
)
def test_vqa_accuracy(prediction, answers, score):
    assert vqa_accuracy(prediction, answers) == pytest.approx(score)


def test_vqa_accuracy_needs_annotators():
    with pytest.raises(ValueError, match=r"must be those of at least two annotators, but are \['x'\]"):
        vqa_accuracy("x", ["x"])


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("No", "no"),
        ("no, it is not", "no"),
        ("There is not a dog.", "no"),
        ("No.", "no"),
        ("Yes, there is. No doubt.", "yes"),  # only the first sentence
        ("no,thing", "yes"),  # as published: commas vanish first, and "nothing" is another word
        ("nothing", "yes"),
        ("a snowboard", "yes"),  # "no" within a word
        ("Not really", "yes"),  # as published: "Not" is not looked for
        ("NO", "yes"),
        ("knot", "yes"),
        ("", "yes"),
        (". no", "yes"),
    ],
)
def test_yes_or_no(answer, read):
    assert parse_yes_no(answer) == read


def test_binary_scores():
    # yes-yes 2, yes-no 1, no-yes 1, no-no 1: 3 of 5 right; precision 2/3; recall 2/3; F1 2/3; 3 of 5 "yes"
    found = binary_scores(["yes", "yes", "yes", "no", "no"], ["yes", "yes", "no", "yes", "no"])
    assert found == pytest.approx(
        {"accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "yes ratio": 0.6}
    )
    # yes-yes 1, yes-no 3: precision 1/4, recall 1, F1 2 × 1/4 / (5/4) = 0.4
    found = binary_scores(["yes"] * 4, ["yes", "no", "no", "no"])
    assert found == pytest.approx({"accuracy": 0.25, "precision": 0.25, "recall": 1.0, "F1": 0.4, "yes ratio": 1.0})
    # Nothing positive on either side: no ratio has a denominator
    found = binary_scores(["no"], ["no"])
    assert found == {"accuracy": 1.0, "precision": 0.0, "recall": 0.0, "F1": 0.0, "yes ratio": 0.0}


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], "at least one, but are 0 and 0"),
        (["yes"], ["yes", "no"], "but are 1 and 2"),
        (["Yes"], ["no"], "there is 'Yes'"),
    ],
)
def test_binary_scores_refuse(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        binary_scores(predictions, labels)


@pytest.mark.parametrize(
    ("answer", "num_choices", "index"),
    [
        ("B", 3, 1),
        (" A\n", 2, 0),
        ("C. blue", 3, 2),
        ("C.blue", 3, None),  # no space
        ("C.", 3, None),
        ("C) blue", 3, None),
        ("The answer is D.", 4, 3),
        ("The answer is D", 4, None),  # a character must follow
        ("I think so. The answer is B. Because", 4, 1),
        ("The answer is A. The answer is B.", 4, None),  # not one alone
        ("D", 3, None),  # a letter without a choice
        ("The answer is F.", 5, None),
        ("b", 3, None),
        ("blue", 3, None),
        ("", 3, None),
    ],
)
def test_letters(answer, num_choices, index):
    assert parse_letter(answer, num_choices) == index


COLOURS = {"A": "red", "B": "blue", "C": "light blue", "D": "green"}


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("B", COLOURS, "B"),
        ("B.", COLOURS, "B"),
        ("(C)", COLOURS, "C"),
        ("Answer:D", COLOURS, None),  # not a word of its own, nor an option's text
        ("Answer :D", COLOURS, "D"),
        ("The answer is B because", COLOURS, "B"),
        ("A red car", COLOURS, "A"),  # three words: "A" is a letter
        ("A car that is green", COLOURS, "D"),  # five words: "A" may be an article, so the text counts
        ("A car that is old", COLOURS, None),
        ("B or D", COLOURS, None),  # two letters
        ("Red", COLOURS, "A"),
        ("blue", COLOURS, "B"),
        ("light blue", COLOURS, None),  # has the text of two options
        ("E", COLOURS, None),
        ("b", {"A": "cat", "B": "dog"}, None),
        ("", COLOURS, None),
    ],
)
def test_options(answer, options, letter):
    assert parse_option(answer, options) == letter


def test_circular_evaluation():
    # Question 1: all of four right. Question 2: one of four wrong, which fails it. Question 3: both of two. 2/3
    results = [(1, True)] * 4 + [(2, True), (2, True), (2, False), (2, True)] + [(3, True)] * 2
    assert circular_accuracy(results) == pytest.approx(2 / 3)
    # The order of rows does not count
    assert circular_accuracy(reversed(results)) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one row"):
        circular_accuracy([])


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Yes", "yes", 1),
        ("yes.", "yes", 1),
        (" Traffic light. ", "traffic light", 1),
        ("the cat", "cat", 0),  # GQA keeps articles
        ("2", "two", 0),  # and number words
        ("cats", "cat", 0),
        ("U.S.", "u.s", 1),  # a period at the end goes on both sides
        ("", "no", 0),
    ],
)
def test_gqa(prediction, answer, score):
    assert exact_match(prediction, answer) == score


def test_gqa_normalisation():
    assert normalise_gqa_answer(" The Left.. ") == "the left"
