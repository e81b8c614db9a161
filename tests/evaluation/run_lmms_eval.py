"""Runs lmms-eval on a task of the sample files, in a process of its own: it changes loggers, `datasets` and `ssl`.

python tests/evaluation/run_lmms_eval.py FOLDER, which receives the tasks; prints the results as JSON on the last line.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model_manifest
from lmms_eval.tasks import TaskManager

from llava_family.evaluation.lmms_eval_model import LlavaFamilyChat, task_settings


ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "examples" / "images" / "miniature"
CHECKPOINTS = ROOT / "examples" / "miniature" / "checkpoints"

TASK = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output_type}
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.{doc_to_text}
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  until:
  - "\\n"
{scores}
"""
METRIC = "metric_list:\n- metric: exact_match\n  aggregation: mean\n  higher_is_better: true"
ROUNDS = (
    "process_results: !function utils.score_rounds\n"
    "metric_list:\n- metric: rounds\n  aggregation: mean\n  higher_is_better: true"
)

UTILS = """\
from PIL import Image

PICTURES = {pictures!r}


def doc_to_visual(doc):
    return [Image.open(PICTURES + "/" + doc["image"])]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def two_rounds(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    # The second round asks again, if it is told what the first one answered.
    if round_idx is None:
        return doc["question"]
    if round_idx == 2:
        return None, None, True, previous_output, None
    question = doc["question"] if len(previous_output) == 1 else "?"
    return doc_to_visual(doc), question, False, previous_output, "round " + str(round_idx)


def score_rounds(doc, results):
    return {{"rounds": float(results[0] == [doc["answer"]] * 2)}}
"""


def main(folder: Path) -> None:
    questions = json.loads((PICTURES / "questions.json").read_text("utf-8"))
    for key in ("uhd", "moe", "mole"):
        # The last picture of each is asked with a wrong truth, so that scores are not all 1.
        items = [dict(item) for item in questions[key]]
        items[-1]["answer"] = "wrong"
        lines = [json.dumps({name: item[name] for name in ("image", "question", "answer")}) for item in items]
        (folder / f"{key}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "utils.py").write_text(UTILS.format(pictures=str(PICTURES)), "utf-8")
    runs = {
        "gqa": ("llava_uhd", "llava-uhd-miniature", "uhd", "generate_until", "doc_to_text", METRIC),
        "local_moe": ("moe_llava", "moe-llava-miniature", "moe", "generate_until_multi_round", "two_rounds", ROUNDS),
        "local_mole": ("llava_mole", "llava-mole-miniature", "mole", "generate_until", "doc_to_text", METRIC),
    }
    for task, (_, _, key, output_type, doc_to_text, scores) in runs.items():
        text = TASK.format(
            task=task, data=folder / f"{key}.jsonl", output_type=output_type, doc_to_text=doc_to_text, scores=scores
        )
        (folder / f"{task}.yaml").write_text(text, "utf-8")
    results = {}
    for task, (model, checkpoint, *_) in runs.items():
        found = run(folder, task, model, checkpoint, "task", 3)
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        results[task] = {
            "scores": {name: value for name, value in found["results"][task].items() if isinstance(value, float)},
            "answers": [sample["filtered_resps"] for sample in samples],
        }
    found = run(folder, "gqa", "llava_uhd", "llava-uhd-miniature", "paper", 2)
    results["paper"] = [
        sample["filtered_resps"] for sample in sorted(found["samples"]["gqa"], key=lambda sample: sample["doc_id"])
    ]
    results["manifest"] = {model: get_model_manifest(model).chat_class_path for model, *_ in runs.values()}
    results["refused"] = refusals()
    results["settings"] = settings()
    print(json.dumps(results))


def run(folder: Path, task: str, model: str, checkpoint: str, decoding: str, batch_size: int) -> dict[str, Any]:
    return evaluator.simple_evaluate(
        model=model,
        model_args=f"pretrained={CHECKPOINTS / checkpoint},decoding={decoding}",
        tasks=[task],
        batch_size=batch_size,
        device="cpu",
        task_manager=TaskManager(include_path=str(folder), include_defaults=False, model_name=model),
        bootstrap_iters=0,
    )


def refusals() -> list[str]:
    """What is said to arguments and requests that cannot be."""
    checkpoint = str(CHECKPOINTS / "llava-uhd-miniature")
    model = LlavaFamilyChat(checkpoint, device="cpu")
    model.task_dict = {"task": {"test": [{}]}}
    content = [{"type": name, name if name == "text" else "url": "x"} for name in ("image", "video", "text")]
    arguments = ("", lambda document: [{"role": "user", "content": content}], {}, 0, "task", "test")
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    request = Instance("generate_until", arguments, 0, metadata)
    calls = (
        lambda: LlavaFamilyChat(checkpoint, batch_size="auto"),
        lambda: LlavaFamilyChat(checkpoint, decoding="greedy"),
        lambda: model.loglikelihood([request]),
        lambda: model.generate_until([request]),
    )
    found = []
    for call in calls:
        try:
            call()
        except (NotImplementedError, ValueError) as error:
            found.append(str(error))
    return found


def settings() -> dict[str, list[Any]]:
    tasks = {
        "gqa, task": {"num_beams": 1, "max_new_tokens": 16, "temperature": 0},
        "gqa_lite, nothing": {},
        "gqa, paper": {"num_beams": 1, "max_new_tokens": 16},
        "mmbench_en_dev, nothing": {},
        "mme_realworld, paper": {},
        "mme, nothing": {},
        "chartqa, sampling": {"max_new_tokens": 7, "temperature": 0.2, "top_p": 0.9, "until": ["x"]},
    }
    found = {}
    for name, kwargs in tasks.items():
        task, _, kind = name.partition(", ")
        chosen, sampling = task_settings("llava_uhd", task, kwargs, "paper" if kind == "paper" else "task")
        numbers = [chosen.num_beams, chosen.max_new_tokens, chosen.repetition_penalty]
        found[name] = [*numbers, dict(chosen.image_settings), sampling]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
