"""The benchmarks' published scores, of answers that `parsing` has read. All are fractions from 0 to 1."""

from collections.abc import Hashable, Iterable, Sequence

from .parsing import normalise_gqa_answer, normalise_vqa_answer


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """
    TextVQA's score of one answer: is it what at least three of nine annotators wrote, averaged over which one of the
    ten is left out.

    Args:
        prediction (`str`): The model's answer, not yet normalised.
        answers (`Sequence[str]`): Those of the annotators, ten in TextVQA, not yet normalised.

    Returns:
        `float`: the mean of min(1, matches / 3) over all sets of annotators without one: 1 where four or more of ten
        agree with the model, 0.9 for three, 0.6 for two and 0.3 for one.

    Raises:
        ValueError: if there are fewer than two annotators.

    Source: VQA (arXiv 1505.00468, section 4.3; visualqa.org/evaluation.html), as TextVQA uses it (arXiv 1904.08920).
    """
    if len(answers) < 2:
        raise ValueError(f"`answers` must be those of at least two annotators, but are {list(answers)!r}.")
    given = normalise_vqa_answer(prediction)
    matches = [normalise_vqa_answer(answer) == given for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def exact_match(prediction: str, answer: str) -> float:
    """
    GQA's score of one answer.

    Args:
        prediction (`str`): The model's answer; its case and the period at its end do not count.
        answer (`str`): The annotation.

    Returns:
        `float`: 1 or 0.

    Source: GQA (arXiv 1902.09506) and its `eval.py`.
    """
    return float(normalise_gqa_answer(prediction) == normalise_gqa_answer(answer))


def binary_scores(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """
    POPE's scores of the answers to the questions of one category. "yes" is the positive class.

    Args:
        predictions (`Sequence[str]`): `"yes"` or `"no"` for each question, see `parse_yes_no`.
        labels (`Sequence[str]`): The truth, as many.

    Returns:
        `dict[str, float]`: `accuracy`, `precision`, `recall`, `F1` and `yes ratio`, the share of "yes" among the
        predictions. A ratio whose denominator is 0 is 0.

    Raises:
        ValueError: if there are none, not as many labels, or something else than "yes" and "no" among them.

    Source: POPE (arXiv 2305.10355, section 5).
    """
    if not predictions or len(predictions) != len(labels):
        raise ValueError(
            f"`predictions` and `labels` must be as many, and at least one, but are {len(predictions)} and "
            f"{len(labels)}."
        )
    for value in (*predictions, *labels):
        if value not in ("yes", "no"):
            raise ValueError(f'`predictions` and `labels` must be "yes" or "no", but there is {value!r}.')
    pairs = list(zip(predictions, labels, strict=True))
    true_positives, said_yes, is_yes = pairs.count(("yes", "yes")), predictions.count("yes"), labels.count("yes")
    return {
        "accuracy": sum(given == truth for given, truth in pairs) / len(pairs),
        "precision": true_positives / said_yes if said_yes else 0.0,
        "recall": true_positives / is_yes if is_yes else 0.0,
        # The harmonic mean of precision and recall, without dividing by a sum of two zeros
        "F1": 2 * true_positives / (said_yes + is_yes) if said_yes + is_yes else 0.0,
        "yes ratio": said_yes / len(pairs),
    }


def circular_accuracy(results: Iterable[tuple[Hashable, bool]]) -> float:
    """
    MMBench's CircularEval: a question counts where the answers to all rotations of its options are right.

    Args:
        results (`Iterable[tuple[Hashable, bool]]`): For each row its question, which its rotations share, and whether
            the answer is right.

    Returns:
        `float`: the share of questions without a wrong answer.

    Raises:
        ValueError: if there are no results.

    Source: MMBench (arXiv 2307.06281, section 4.3).
    """
    questions: dict[Hashable, bool] = {}
    for question, is_right in results:
        questions[question] = questions.get(question, True) and is_right
    if not questions:
        raise ValueError("`results` must have at least one row.")
    return sum(questions.values()) / len(questions)
