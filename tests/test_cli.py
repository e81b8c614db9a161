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
