"""The benchmarks' files: what is read of them, and the one clear error where they are malformed."""

import base64
import csv
import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from llava_family.evaluation.files import BENCHMARKS, read_json, read_json_lines


ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "examples" / "evaluation"


def write_lines(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
    return path


def write_table(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    return path


def encoded_image(size=(2, 3)):
    buffer = BytesIO()
    Image.new("P", size).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def textvqa_files(folder, text="What brand?\nReference OCR token: ADIDAS, 3\nAnswer using a word.", **changes):
    entry = {"image_id": "00a", "question": "what brand?", "answers": ["adidas"] * 10, **changes}
    annotations = folder / "val.json"
    annotations.write_text(json.dumps({"data": [{**entry, "question": "what size?", "answers": ["3"] * 10}, entry]}))
    item = {"question_id": "00a", "image": "00a.jpg", "text": text}
    return write_lines(folder / "questions.jsonl", item), annotations, folder


def test_textvqa_finds_the_question_among_the_prompts_lines(tmp_path):
    (question,) = BENCHMARKS["textvqa"].read(*textvqa_files(tmp_path))
    assert question.truth == ["adidas"] * 10
    assert question.text.startswith("What brand?\nReference OCR token: ADIDAS, 3\n")
    assert (question.id, question.image) == ("00a", tmp_path / "00a.jpg")
    # The order of lines is that of the file's maker.
    (question,) = BENCHMARKS["textvqa"].read(*textvqa_files(tmp_path, "Reference OCR token: A\nWhat size? \nAnswer."))
    assert question.truth == ["3"] * 10


def test_scienceqa_prompts_are_llavas():
    """Those built from the benchmark's own files are those of the file that LLaVA provides."""
    folder = SAMPLES / "scienceqa"
    questions = BENCHMARKS["scienceqa"].read(folder / "llava_test_CQM-A.json", folder, folder / "images")
    assert BENCHMARKS["scienceqa"].read(None, folder, folder / "images") == questions
    assert questions[1].text == "Context: One shape is orange.\nWhich shape is orange?\nA. cross\nB. circle\nC. square"
    assert [question.image is None for question in questions] == [False, False, True, True]
    assert [question.truth for question in questions] == [0, 1, 1, 0]


HEAD = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]


def test_mmbench_rows(tmp_path):
    image = encoded_image()
    rows = [
        ["7", 'Which "one"?', "Look\nclosely.", "red", "blue", "nan", "green", "B", "colour", image],
        ["1000007", "Which?", "None", "blue", "red", "", "", "A", "colour", "7"],
        ["8", "Which?", "nan", "red", "blue", "green", "None", "C", "colour", encoded_image((5, 1))],
    ]
    first, rotated, last = BENCHMARKS["mmbench"].read(write_table(tmp_path / "dev.tsv", HEAD, *rows))
    # Options end at the first that is missing, and a hint may have several lines.
    assert first.text == 'Look\nclosely.\nWhich "one"?\nA. red\nB. blue'
    assert rotated.text == "Which?\nA. blue\nB. red"
    assert last.options == {"A": "red", "B": "blue", "C": "green"}
    # An image may be the index of the row that has it; palettes become RGB.
    assert rotated.open_image().size == first.open_image().size == (2, 3)
    assert (last.open_image().size, last.open_image().mode) == ((5, 1), "RGB")


def test_mmbench_counts_only_questions_with_all_rotations(tmp_path):
    image = encoded_image()

    def row(index, answer):
        return [str(index), "Which?", "", "red", "blue", "", "", answer, "colour", image]

    rows = [row(1, "A"), row(2, "A"), row(1_000_001, "B")]
    questions = BENCHMARKS["mmbench"].read(write_table(tmp_path / "dev.tsv", HEAD, *rows))
    # Both of question 1 right; question 2 has one row of two, and is wrong.
    found = BENCHMARKS["mmbench"].score(questions, ["A", "B", "B"])
    assert found == {"accuracy": 1 / 2, "CircularEval": 1.0, "CircularEval, colour": 1.0}
    # One rotation wrong fails the question, though its first row is right.
    found = BENCHMARKS["mmbench"].score(questions, ["A", "A", "A"])
    assert found == {"accuracy": 1.0, "CircularEval": 0.0, "CircularEval, colour": 0.0}
    # Two rows of a question with three options are not all of its rotations.
    more = [
        [*row(index, answer)[:5], "green", *row(index, answer)[6:]] for index, answer in ((3, "A"), (1_000_003, "B"))
    ]
    incomplete = BENCHMARKS["mmbench"].read(write_table(tmp_path / "more.tsv", HEAD, *more))
    assert BENCHMARKS["mmbench"].score(incomplete, ["A", "B"]) == {"accuracy": 1.0, "accuracy, colour": 1.0}
    # Without any rotation
    found = BENCHMARKS["mmbench"].score(questions[:2], ["red", "blue"])
    assert found == {"accuracy": 1 / 2, "accuracy, colour": 1 / 2}


def test_pope_categories_are_scored_apart(tmp_path):
    """One picture has the same question in two categories, whose labels stand in two files."""
    asked = {"image": "a.jpg", "text": "Is there a dog?"}
    questions = [{**asked, "question_id": n, "category": name} for n, name in enumerate(("popular", "random"))]
    write_lines(tmp_path / "coco_pope_popular.json", {**asked, "label": "no"})
    write_lines(tmp_path / "coco_pope_random.json", {**asked, "label": "yes"})
    read = BENCHMARKS["pope"].read(write_lines(tmp_path / "q.jsonl", *questions), tmp_path, tmp_path)
    found = BENCHMARKS["pope"].score(read, ["No dog.", "Yes"])
    assert (found["accuracy, popular"], found["F1, popular"], found["F1, random"], found["F1"]) == (1, 0, 1, 0.5)


def broken_scienceqa(folder, **changes):
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None, **changes}
    (folder / "problems.json").write_text(json.dumps({"5": problem}))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["5"]}))
    return None, folder, folder


def broken_gqa(folder, content):
    (folder / "truth.json").write_bytes(content)
    item = {"question_id": "1", "image": "a.jpg", "text": "?"}
    return write_lines(folder / "q.jsonl", {}, item), folder / "truth.json", folder


def broken_table(folder, *changed, head=HEAD):
    row = ["1", "Which?", "", "red", "blue", "", "", "A", "colour", encoded_image()]
    return (write_table(folder / "dev.tsv", head, row, [*changed, *row[len(changed) :]][: len(row)]),)


def lines_of(folder, content):
    (folder / "q.jsonl").write_bytes(content)
    return folder / "q.jsonl", SAMPLES / "textvqa" / "annotations.json", folder


GOOD = b'{"question_id": "a", "image": "elongated_0.png", "text": "What number is written?"}\n'


@pytest.mark.parametrize(
    ("benchmark", "files", "message"),
    [
        ("textvqa", lambda f: lines_of(f, GOOD + b'{"question_id": 1,\n'), r"q.jsonl:2 is no JSON: .*, column"),
        ("textvqa", lambda f: lines_of(f, GOOD + b"\n[1]\n"), r"q.jsonl:3 must be a JSON object, but is a list"),
        ("textvqa", lambda f: lines_of(f, GOOD + b"\xff\n"), r"q.jsonl:2 is no JSON in UTF-8"),
        ("textvqa", lambda f: lines_of(f, b"[" * 100_000), r"q.jsonl:1 is no JSON"),
        ("textvqa", lambda f: lines_of(f, GOOD.replace(b'"a"', b"true")), r"q.jsonl:1 must have `question_id`"),
        (
            "textvqa",
            lambda f: lines_of(f, GOOD.replace(b"text", b"txt")),
            r"q.jsonl:1 must have `text`, of the type str",
        ),
        (
            "textvqa",
            lambda f: lines_of(f, GOOD.replace(b"What", b"Which")),
            r"q.jsonl:1 has a question about elongated_0",
        ),
        ("textvqa", lambda f: textvqa_files(f, answers=["x"]), r"val.json, entry 1 of `data`, must have at least two"),
        (
            "textvqa",
            lambda f: textvqa_files(f, answers=["x", 1]),
            r"entry 1 of `data`, must have at least two `answers`",
        ),
        (
            "textvqa",
            lambda f: textvqa_files(f, image_id=1),
            r"entry 0 of `data`, must have `image_id`, of the type str",
        ),
        (
            "scienceqa",
            lambda f: broken_scienceqa(f, answer=2),
            r"problem 5, must have 1 to 5 `choices` with the `answer`",
        ),
        (
            "scienceqa",
            lambda f: broken_scienceqa(f, choices="ab"),
            r"problem 5, must have `choices`, of the type list",
        ),
        ("scienceqa", lambda f: broken_scienceqa(f, answer=True), r"problem 5, must have `answer`, of the type int"),
        ("gqa", lambda f: broken_gqa(f, b'{\n"1": {"answer": "yes"},\n}'), r"truth.json:3 is no JSON"),
        ("gqa", lambda f: broken_gqa(f, b"{}"), r"q.jsonl:1 must have `question_id`"),
        ("mmbench", lambda f: broken_table(f, "x"), r"dev.tsv:3 must have a whole number as `index`, but has 'x'"),
        ("mmbench", lambda f: broken_table(f, *["1", "?", "", "", "red"]), r"dev.tsv:3 must have one of the options"),
        ("mmbench", lambda f: broken_table(f, *["1"] * 9, "no base64!"), r"dev.tsv:3 must have one of the options"),
        ("mmbench", lambda f: broken_table(f, "2", "?", head=HEAD[:-1]), r"dev.tsv:2 must have as many fields .*, 9"),
        ("mmbench", lambda f: broken_table(f, head=["id", *HEAD[1:]]), r"dev.tsv:2 must have `index`"),
        ("pope", lambda f: (SAMPLES / "pope/questions.jsonl", f, f), r"No such file.*coco_pope_adversarial.json"),
    ],
)
def test_malformed_files(benchmark, files, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        BENCHMARKS[benchmark].read(*files(tmp_path))


def test_image_that_is_no_base64(tmp_path):
    row = ["2", "Which?", "", "red", "blue", "", "", "A", "colour", "no base64!"]
    with pytest.raises(ValueError, match=r"dev.tsv:2 must have an `image` in base64"):
        BENCHMARKS["mmbench"].read(write_table(tmp_path / "dev.tsv", HEAD, row))
    row[-1] = base64.b64encode(b"no picture").decode()
    (question,) = BENCHMARKS["mmbench"].read(write_table(tmp_path / "dev.tsv", HEAD, row))
    with pytest.raises(ValueError, match=r"The image of question 2, in the file, cannot be read"):
        question.open_image()


def test_large_fields_and_the_limit_of_csv(tmp_path):
    """An image is one field, larger than the standard library allows by itself; its limit is put back."""
    before = csv.field_size_limit()
    csv.field_size_limit(100)
    image = encoded_image()
    row = ["2", "?" * 200_000, "", "red", "blue", "", "", "A", "colour", image]
    (question,) = BENCHMARKS["mmbench"].read(write_table(tmp_path / "dev.tsv", HEAD, row))
    assert len(question.text) > 200_000
    assert csv.field_size_limit(before) == 100


def test_pope_labels(tmp_path):
    asked = {"image": "a.jpg", "text": "Is there a dog?"}
    questions = write_lines(tmp_path / "q.jsonl", {**asked, "question_id": 1, "category": "random"})
    write_lines(tmp_path / "coco_pope_random.json", {**asked, "label": "maybe"})
    with pytest.raises(
        ValueError, match=r'coco_pope_random.json:1 must have the `label` "yes" or "no", but has \'may'
    ):
        BENCHMARKS["pope"].read(questions, tmp_path, tmp_path)
    write_lines(tmp_path / "coco_pope_random.json", {**asked, "image": "b.jpg", "label": "no"})
    with pytest.raises(
        ValueError, match=r"q.jsonl:1 asks 'Is there a dog\?' about a.jpg, which coco_pope_random.json"
    ):
        BENCHMARKS["pope"].read(questions, tmp_path, tmp_path)


def test_byte_order_marks_and_empty_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\r\n\n{"a": "\xe2\x80\xa8"}')
    assert [item["a"] for _, item in read_json_lines(tmp_path / "a.jsonl")] == [1, "\u2028"]
