import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llava_family.cli import app


ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "llava_uhd"
IMAGES = ROOT / "examples" / "images"
ORIGINAL = ["--model", str(FIXTURES / "original_checkpoint"), "--vision-tower", str(FIXTURES / "clip_vision_tower")]


def generate(*arguments):
    return CliRunner().invoke(app, ["generate", *arguments])


@pytest.mark.slow
@pytest.mark.parametrize(
    "images", [[], ["rocket.jpg"], ["rocket.jpg", "wide_text.png"]], ids=["no image", "one image", "two images"]
)
def test_generate_streams_the_models_answer(images, capfd):
    files = [argument for image in images for argument in ("--image", str(IMAGES / image))]
    result = generate(*ORIGINAL, *files, "--prompt", "What is this?", "--max-new-tokens", "5", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    again = generate(*ORIGINAL, *files, "--prompt", "What is this?", "--max-new-tokens", "5", "--dtype", "float32")
    assert result.stdout == again.stdout  # greedy, although the release's own generation configuration samples
    assert len(result.stdout.strip()) >= 3


def test_generate_samples_on_demand():
    arguments = [*ORIGINAL, "--prompt", "What?", "--max-new-tokens", "20", "--temperature", "5"]
    assert generate(*arguments).stdout != generate(*arguments).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        ([*ORIGINAL, "--image", str(ROOT / "LICENSE")], "cannot identify image file"),
        ([*ORIGINAL, "--image", "missing.jpg"], "missing.jpg"),
        ([*ORIGINAL[:2]], "Pass `mm_vision_tower`"),
    ],
    ids=["model", "no image file", "missing image", "vision tower"],
)
def test_errors_are_one_clear_message(arguments, message):
    result = generate(*arguments, "--prompt", "What?")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "converted"
    script = runpy.run_path(str(ROOT / "conversion_scripts" / "convert_llava_uhd_weights_to_hf.py"))
    script["convert_llava_uhd_checkpoint"](ORIGINAL[1], str(folder), vision_tower=ORIGINAL[3])
    return folder


def test_describe_image(converted, monkeypatch, capsys):
    arguments = ["--model", str(converted), "--image", str(IMAGES / "rocket.jpg"), "--max-new-tokens", "5"]
    monkeypatch.setattr(sys, "argv", ["describe_image.py", *arguments])
    runpy.run_path(str(ROOT / "examples" / "describe_image.py"), run_name="__main__")
    answer = generate("--model", str(converted), *arguments[2:], "--prompt", "Describe the image briefly.").stdout
    assert capsys.readouterr().out.strip().splitlines()[-1] == answer.strip().splitlines()[-1]


MINIATURES = ROOT / "examples" / "miniature" / "checkpoints"
ELONGATED = IMAGES / "miniature" / "elongated_0.png"


def explain(*arguments, width=80):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)], env={"COLUMNS": str(width)})


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        (None, ["slices none", "overview encoded at 672×168", "tokens 1 × 144 = 144", "spatial/144"]),
        ("llava-uhd-miniature", ["slices 4×1", "tokens 5 × 36 + 4 separators = 184", "spatial/36"]),
        ("llava-mole-miniature", ["view 64×64", "tokens 1 × 64 + 2 for start and end = 66", "square/64"]),
    ],
)
@pytest.mark.parametrize("width", [80, 120])
def test_explain(model, facts, width):
    options = ["--model", MINIATURES / model] if model else []
    result = explain("--image", ELONGATED, *options, width=width)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for fact in ("image 256×64", *facts, "LLaVA-1.5 1 576 8.19 1.00 15.50 1.00", "LLaVA-NeXT 3 1164"):
        assert fact in text
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= width
    assert "…" not in result.stdout


def test_explain_of_a_release():
    result = explain("--image", ELONGATED, *ORIGINAL)
    assert "overview encoded at 672×168 pixels" in " ".join(result.stdout.split()), result.output


@pytest.mark.slow
def test_explain_draws(tmp_path):
    output = tmp_path / "overlay.png"
    result = explain("--image", ELONGATED, "--output", output)
    assert result.exit_code == 0, result.output
    assert f"Wrote {output}" in result.stdout
    first = output.read_bytes()
    assert first.startswith(b"\x89PNG")
    others = ("--image", ELONGATED, "--model", MINIATURES / "llava-uhd-miniature", "--output", output)
    again = explain(*others)
    assert again.exit_code == 1 and "exists already" in again.stderr and output.read_bytes() == first
    assert explain(*others, "--force").exit_code == 0
    assert output.read_bytes() != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.jpg"], "missing.jpg"),
        (["--image", ROOT / "LICENSE"], "cannot identify image file"),
        (["--image", ELONGATED, "--model", "no/such/folder"], "no/such/folder"),
        (["--image", ELONGATED, "--output", "no/such/folder/picture.png"], "folder"),
    ],
    ids=["missing image", "no image file", "model", "output"],
)
def test_explain_says_what_is_wrong(arguments, message):
    result = explain(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and message in result.stderr
    assert "Traceback" not in result.output


def test_explain_draws_by_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr("llava_family.cli.find_spec", lambda name: None)
    result = explain("--image", ELONGATED, "--output", tmp_path / "overlay.png")
    assert result.exit_code == 1 and "pip install 'llava-family[plot]'" in result.stderr
