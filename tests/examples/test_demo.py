"""The demo's slices are read right, its baseline is not, and it draws what it promises."""

import json
import re
import runpy
import sys
import time
from pathlib import Path

import pytest
from PIL import Image


EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS = EXAMPLES / "images" / "miniature" / "questions.json"
SLICED, SQUARE, MOE, MOLE = "LLaVA-UHD, slices", "LLaVA-1.5, square", "MoE-LLaVA", "LLaVA-MoLE"


def rows_of(text):
    """The rows of the tables on a console, as `{head: cell}`; columns begin where their heads do."""
    heads, rows = [], []
    for line in text.splitlines():
        if re.match(r"\s*picture\s", line):
            heads = [(match[0], match.start()) for match in re.finditer(r"\S+(?: \S+)*", line)]
            ends = [start for _, start in heads[1:]] + [None]
        elif re.match(r"\s*\w+\.png\s", line) and heads:
            rows.append({head: line[start:end].strip() for (head, start), end in zip(heads, ends, strict=True)})
    return rows


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch, capsys):
    questions, start = json.loads(QUESTIONS.read_text("utf-8")), time.perf_counter()
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "demo")])
    runpy.run_path(str(EXAMPLES / "demo.py"), run_name="__main__")
    assert time.perf_counter() - start < 180
    text = capsys.readouterr().out
    rows = {row["picture"]: row for row in rows_of(text)}
    for group, model in (("uhd", SLICED), ("moe", MOE), ("mole", MOLE)):
        assert len(questions[group]) >= 4
        for item in questions[group]:
            row = rows[item["image"]]
            assert (row["question"], row["truth"], row[model]) == (item["question"], item["answer"], item["answer"]), (
                text
            )
    assert len(rows) == sum(map(len, questions.values()))
    squares = [rows[item["image"]] for item in questions["uhd"]]
    assert len(squares) == 5 and all(SQUARE in row for row in squares)
    assert sum(row[SQUARE] != row["truth"] for row in squares) >= 4, text
    for row in squares:
        width, height = map(int, row["pixels"].split("×"))
        assert max(width, height) >= 3 * min(width, height)
    drawn = sorted((tmp_path / "demo").iterdir())
    assert {file.stem for file in drawn} >= {"slices", "routing", "routing_over_image", "routing_by_domain"}
    for file in drawn:
        assert file.name in text
        with Image.open(file) as image:
            assert image.format == "PNG" and min(image.size) >= 250
        assert file.stat().st_size > 10_000


def test_rows_of_a_console():
    text = "\n  picture   LLaVA   truth  \n ──────\n  a_0.png           47     \n  b.png     2 3     4      \n"
    assert rows_of(text) == [
        {"picture": "a_0.png", "LLaVA": "", "truth": "47"},
        {"picture": "b.png", "LLaVA": "2 3", "truth": "4"},
    ]
