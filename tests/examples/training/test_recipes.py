"""The recipes' hyper-parameters are those of the specifications' tables, and what is wrong with settings is said.

`recipes.json` has the specifications' numbers, each with the line it is from. The specifications themselves are not in
the repository; where they lie beside it, `recipes.json` is compared with them too, number by number.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[3]
TRAINING = ROOT / "examples" / "training"
RECIPES = json.loads((ROOT / "tests" / "fixtures" / "training" / "recipes.json").read_text("utf-8"))
# Without the specifications' folder, which only the machines have that this package was written on, there is nothing
# to compare with, and no test.
SPECIFICATIONS = ROOT.parent / "shared" / "specs"
COMPARED = sorted(RECIPES["recipes"]) if SPECIFICATIONS.is_dir() else []
SCRIPTS = sorted(path.stem for path in TRAINING.glob("*.py") if 'if __name__ == "__main__"' in path.read_text("utf-8"))


def settings_of(script):
    return yaml.safe_load((TRAINING / "configs" / f"{script}.yaml").read_text("utf-8"))


def test_every_script_has_settings():
    assert sorted(path.stem for path in (TRAINING / "configs").glob("*.yaml")) == SCRIPTS
    assert set(SCRIPTS) == {*RECIPES["recipes"], "trl_sft"}


@pytest.mark.parametrize("script", RECIPES["recipes"])
def test_settings_are_the_specification_s(script):
    settings = settings_of(script)
    for name, (value, line) in RECIPES["recipes"][script]["values"].items():
        if name == "global_batch_size":
            found = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
            assert found * RECIPES["gpus"] == value, line
        else:
            assert settings.get(name) == value, (name, line)


def test_trl_s_settings_are_those_of_the_third_stage():
    settings, stage3 = settings_of("trl_sft"), settings_of("moe_llava_stage3")
    shared = set(settings) & set(stage3)
    assert {name: settings[name] for name in shared} == {name: stage3[name] for name in shared}
    assert {"learning_rate", "per_device_train_batch_size", "warmup_steps", "lr_scheduler_type"} <= shared


@pytest.mark.parametrize("script", RECIPES["recipes"])
def test_what_is_unknown_says_so(script):
    text = (TRAINING / "configs" / f"{script}.yaml").read_text("utf-8")
    assert ("UNKNOWN" in text) == (RECIPES["recipes"][script]["status"] != "known")


def plain(text):
    return " ".join(text.split())


def table_column(text, section, column):
    """First cell of every row -> the cell of `column`, in the first table of a section; "same" is the cell before."""
    lines = text[text.index(section) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    index = rows[0].index(column)
    return {row[0]: row[index] if not row[index].startswith("same") else row[index - 1] for row in rows[2:]}


def numbers(text):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)]


@pytest.mark.parametrize("script", COMPARED)
def test_quoted_lines_are_the_specification_s(script):
    recipe = RECIPES["recipes"][script]
    text = plain((SPECIFICATIONS / recipe["source"][0]).read_text("utf-8"))
    for name, (_, line) in recipe["values"].items():
        assert plain(line) in text, name


@pytest.mark.parametrize("script", [script for script in COMPARED if RECIPES["recipes"][script]["source"][2]])
def test_numbers_are_the_table_s(script):
    recipe = RECIPES["recipes"][script]
    file, section, column = recipe["source"]
    cells = table_column((SPECIFICATIONS / file).read_text("utf-8"), section, column)
    values = {name: value for name, (value, _) in recipe["values"].items()}
    rate = next(cell for row, cell in cells.items() if row == "lr" or row.startswith("lr /"))
    assert numbers(rate)[0] == values["learning_rate"]
    batch = next(cell for row, cell in cells.items() if "batch" in row)
    assert values["global_batch_size"] in numbers(batch)
    assert not numbers(batch)[1:] or {values["per_device_train_batch_size"]} <= set(numbers(batch))
    if file == "llava_uhd.md":
        assert numbers(rate)[1:] == [values["warmup_steps"], values["weight_decay"]]
        assert (values["max_slices"] == 1) == ("only" in cells["views"])
    else:
        assert (cells["template"] == "plain") == (values["template"] == "plain")
        assert (cells["aspect"] == "square") == (values["do_pad"] is False)


@pytest.fixture
def settings(monkeypatch):
    """The scripts' module of settings, without those of other tests' folders that are called the same."""
    monkeypatch.syspath_prepend(str(TRAINING))
    before = set(sys.modules)
    import settings

    yield settings
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(TRAINING) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture
def parse(settings, tmp_path, capsys):
    """What a script's command line gives, or the line with which it ends, for a yaml's text and some words."""
    from llava_family.training import LlavaTrainingArguments

    def parse(text, *words):
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        types = [settings.ConversationArguments, LlavaTrainingArguments, settings.ModelArguments]
        parser = settings.SettingsParser(types, prog="script", allow_abbrev=False)
        try:
            with settings.input_errors(parser):
                return settings.parse(parser, {"max_steps": 8}, ["--config", str(path), "--use_cpu", *words])
        except SystemExit:
            (line,) = capsys.readouterr().err.splitlines()
            return line

    return parse


GIVEN = ("--data", "a.json", "--model", "b", "--output", "c")


def test_the_command_line_comes_before_smoke_and_that_before_the_yaml(parse):
    run, training, source = parse("learning_rate: 1e-3\nmax_steps: 3\nwarmup_steps: 0.03\nmax_length: 7", *GIVEN)
    assert (training.learning_rate, training.max_steps, training.warmup_steps) == (1e-3, 3, 0.03)
    assert (run.data, run.max_length, source.model) == ("a.json", 7, "b")
    run, training, _ = parse("learning_rate: 1e-3\nmax_steps: 3", "--smoke", "--learning-rate", "5")
    assert (training.learning_rate, training.max_steps, run.smoke) == (5, 8, True)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (
            "learnin_rate: 1",
            GIVEN,
            "settings.yaml has an unknown setting, 'learnin_rate'. Did you mean 'learning_rate'?",
        ),
        ("learning_rate: fast", GIVEN, "settings.yaml: argument --learning_rate.*invalid float value: 'fast'"),
        ("max_length: 1.5", GIVEN, "settings.yaml: argument --max_length.*invalid int value: '1.5'"),
        ("skip_bad_samples: perhaps", GIVEN, "settings.yaml: argument --skip_bad_samples"),
        ("- a", GIVEN, "must be lines `name: value`, but are a list"),
        ("a: [", GIVEN, "settings.yaml cannot be read"),
        ("max_length: 1", (*GIVEN, "--learning_rate", "fast"), "error: argument --learning_rate"),
        ("max_length: 1", (*GIVEN, "--nonsense"), "unrecognized arguments: --nonsense"),
        ("max_length: 1", (*GIVEN, "--max_len", "3"), "unrecognized arguments: --max_len 3"),
        ("max_length: 1", GIVEN[2:], "`--data` is missing"),
        ("max_length: 1", GIVEN[:4], "`--output` is missing"),
        ("max_length: 1", GIVEN[:2] + GIVEN[4:], "`--model` is missing"),
        ("max_length: 1", (*GIVEN, "--output_dir", "x"), "`--output_dir` is not used here"),
        ("remove_unused_columns: true", GIVEN, "`remove_unused_columns` must be False"),
    ],
)
def test_what_is_wrong_is_one_line(parse, text, words, message):
    line = parse(text, *words)
    assert isinstance(line, str), line
    assert re.search(message, line), line


def test_a_missing_yaml_is_named(settings, parse, capsys):
    parser = settings.SettingsParser([settings.RunArguments], prog="script")
    with pytest.raises(ValueError, match="nowhere.yaml cannot be read"):
        settings.read_settings("nowhere.yaml", parser)
