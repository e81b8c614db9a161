"""From what a model wrote to what a benchmark compares."""

import re
from collections.abc import Mapping


# In the answers of VQA, TextVQA and so on, after lower case
NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBER_WORDS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # neither period, colon nor apostrophe

# Beginnings of contractions by their ends, of those which VQA's evaluation puts apostrophes into. Others, as "its" or
# "lets", are words of their own.
CONTRACTIONS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you y'all",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you y'all",
    "": "'twas ma'am o'clock y'all",
}

# What may stand around an option's letter, in the order in which it is looked for
LETTER_MARKS = [("", mark) for mark in ("", ".", ",", ":", ")", ").")]
LETTER_MARKS += [("(", ")"), ("(", ").")] + [(":", mark) for mark in ("", ",", ".", ")", ").")]


def _misspellings(contraction: str) -> set[str]:
    """A contraction without its apostrophe, or without all but one where it has several."""
    parts = contraction.split("'")
    if len(parts) == 2:
        return {"".join(parts)}
    marks = range(1, len(parts))
    return {"".join(part if i not in kept else f"'{part}" for i, part in enumerate(parts)) for kept in _subsets(marks)}


def _subsets(marks: range) -> list[set[int]]:
    """All sets of some, but not all, of the numbers."""
    return [{mark for i, mark in enumerate(marks) if bits >> i & 1} for bits in range(1, 2 ** len(marks) - 1)]


APOSTROPHES = {
    wrong: start + end
    for end, starts in CONTRACTIONS.items()
    for start in starts.split()
    for wrong in _misspellings(start + end)
}


def normalise_vqa_answer(answer: str) -> str:
    """
    What TextVQA compares, of an answer or an annotation: `"The 2-door cars."` becomes `"2 door cars"`.

    Lower case; no commas or question marks; `'s` is a word of its own; a punctuation mark that stands beside a space
    vanishes, all over the answer, and any other one becomes a space; no periods but before a digit; number words up
    to ten, and "none", become digits; no articles; contractions get their apostrophe.

    Args:
        answer (`str`): One answer.

    Returns:
        `str`: words with single spaces between them.

    Source: "Answer processing" of VQA's evaluation (visualqa.org/evaluation.html), with the first three steps of
    TextVQA's `EvalAIAnswerProcessor` (facebookresearch/mmf; lmms-eval has a copy), by which the papers' scores were
    made.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    before = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in PUNCTUATION:
        beside_space = mark + " " in before or " " + mark in before
        text = text.replace(mark, "" if beside_space else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBER_WORDS.get(word, word) for word in text.split()]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def normalise_gqa_answer(answer: str) -> str:
    """
    What GQA compares: lower case, without the period at the end.

    Args:
        answer (`str`): One answer.

    Returns:
        `str`: the answer to compare with the annotation.

    Source: LLaVA's `convert_gqa_for_eval.py`; GQA's `eval.py` compares the result with the annotation as it is.
    """
    return answer.strip().rstrip(".").strip().lower()


def parse_yes_no(answer: str) -> str:
    """
    POPE's reading of an answer: `"no"` if the first sentence has the word "No", "no" or "not", else `"yes"`.

    Only whole words count, in these spellings: "nothing" and "NO" are `"yes"`, and so is an empty answer.

    Args:
        answer (`str`): What the model wrote.

    Returns:
        `str`: `"yes"` or `"no"`.

    Source: `evaluate.py` of RUCAIBox/POPE and LLaVA's `eval_pope.py`.
    """
    words = answer.partition(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_letter(answer: str, num_choices: int) -> int | None:
    """
    ScienceQA's reading of an answer, by LLaVA: `"B"`, `"B. a text"` or exactly one `"The answer is B."`.

    Args:
        answer (`str`): What the model wrote.
        num_choices (`int`): Choices of the question, at most five.

    Returns:
        `int`, *optional*: index of the choice; `None`, which counts as wrong, for any other answer and for the letter
        of a choice that the question does not have.

    Source: LLaVA's `eval_science_qa.py`, whose `get_pred_idx` gives -1 where this gives `None`.
    """
    answer = answer.strip()
    if re.fullmatch("[A-E]", answer) or re.match(r"[A-E]\. ", answer):
        letter = answer[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", answer)
        letter = found[0] if len(found) == 1 else ""
    index = "ABCDE".find(letter) if letter else -1
    return index if 0 <= index < num_choices else None


def parse_option(answer: str, options: Mapping[str, str]) -> str | None:
    """
    MMBench's reading of an answer: the one letter in it, else the one option whose text is in it.

    A letter counts where it is a word of its own, alone or with one of `LETTER_MARKS` around it. "A" among more than
    three words may be an article, so no letter counts then that stands alone. Texts are compared in lower case.

    Args:
        answer (`str`): What the model wrote.
        options (`Mapping[str, str]`): Texts of the options by letter.

    Returns:
        `str`, *optional*: a letter of `options`, or `None` if it is none or not one alone. MMBench's server asks a
        language model then; here such an answer is wrong.

    Source: MMBench (arXiv 2307.06281, section 4.3), and the first of its evaluation code's two steps, `can_infer`.
    """
    words = answer.split()
    for before, after in LETTER_MARKS:
        found = [letter for letter in options if before + letter + after in words]
        is_article = not before + after and "A" in words and len(words) > 3
        if len(found) == 1 and not is_article:
            return found[0]
    found = [letter for letter, text in options.items() if text and text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None
