"""Evaluates checkpoints on TextVQA, POPE, ScienceQA, MMBench and GQA as the papers did: prompts, decoding, scores.

`examples/evaluate.py` runs it on local files, the plugin for lmms-eval in that program.
"""

from .parsing import normalise_gqa_answer, normalise_vqa_answer, parse_letter, parse_option, parse_yes_no
from .scoring import binary_scores, circular_accuracy, exact_match, vqa_accuracy
from .settings import SETTINGS, GenerationSettings, settings_for


__all__ = [
    "SETTINGS",
    "GenerationSettings",
    "binary_scores",
    "circular_accuracy",
    "exact_match",
    "normalise_gqa_answer",
    "normalise_vqa_answer",
    "parse_letter",
    "parse_option",
    "parse_yes_no",
    "settings_for",
    "vqa_accuracy",
]
