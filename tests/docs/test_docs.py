"""The documents keep their word: snippets run, links lead somewhere, cited tests exist, tables are true.

Names in the documents are placeholders that exist in the folder where snippets run. There the releases and CLIP are
tiny golden checkpoints under their Hub names, so commands run exactly as documented. In a tiny release lies the vision
tower's folder that its config.json names, since it is of no known size and needs one; real ones are converted without.
"""

import ast
import importlib.metadata
import json
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoProcessor

from llava_family import MoleConfig, get_mole_model, plan_slices


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("model_cards/*.md")),
    *sorted(ROOT.glob("examples/**/README.md")),
]
MODEL_PAGE = ROOT / "docs" / "llava_uhd.md"
ADAPTER_CARD = ROOT / "model_cards" / "mole-adapter.md"
MODEL_CARDS = sorted(card for card in ROOT.glob("model_cards/*.md") if card != ADAPTER_CARD)

CLIP, PHOTO = "openai/clip-vit-large-patch14-336", "photo.jpg"
CLIP_FIXTURE = "llava_uhd/clip_vision_tower"
# LLaVA-MoLE has no release: a file of trained tensors, and the models that it belongs to.
MOLE_GOLDEN, MOLE_FILE = "llava_mole/original_checkpoint", "llava_mole_r16_a32_e3.pt"
VICUNA, MOLE_CONVERTED, MOLE_ADAPTER = "lmsys/vicuna-7b-v1.5", "path/to/llava-mole-7b", "path/to/mole-adapter"
RUNNABLE, SHOWN = {"python", "bash"}, {"text", "bibtex"}
# What `--output` may name beside a checkpoint's folder
FILES = {".html", ".json", ".jsonl", ".png"}


@dataclass(frozen=True)
class Release:
    """A release, the golden checkpoint that stands for it, and what its model card says."""

    name: str
    family: str
    golden: str
    tower: tuple[str, str]  # the fixture's folder, and where in the release it lies
    base_model: str
    license: str

    @property
    def card(self):
        return ROOT / "model_cards" / f"{self.name.split('/')[1].lower()}.md"

    @property
    def converted(self):
        return f"path/to/{self.card.stem}"


def moe_llava(name, variant, tower, base_model):
    golden = f"moe_llava/{variant}"
    places = (f"{golden}/{tower}", tower)
    return Release(f"LanguageBind/{name}", "moe_llava", f"{golden}/original_checkpoint", places, base_model, "other")


TINY_CLIP, TINY_SIGLIP = "openai/clip-vit-tiny-patch14-56", "google/siglip-tiny-patch14-56"
PHI, STABLELM, QWEN = "microsoft/phi-2", "stabilityai/stablelm-2-1_6b", "Qwen/Qwen-1_8B"
RELEASES = [
    Release(
        "guozonghao96/llava-uhd-144-13b",
        "llava_uhd",
        "llava_uhd/original_checkpoint",
        (CLIP_FIXTURE, "pretrained_models/clip-vit-large-patch14-336"),
        "lmsys/vicuna-13b-v1.5",
        "apache-2.0",
    ),
    moe_llava("MoE-LLaVA-Phi2-2.7B-4e", "phi_clip336", TINY_CLIP, PHI),
    # There is no golden checkpoint of Phi with SigLIP.
    moe_llava("MoE-LLaVA-Phi2-2.7B-4e-384", "phi_clip336", TINY_CLIP, PHI),
    moe_llava("MoE-LLaVA-StableLM-1.6B-4e", "stablelm_clip336", TINY_CLIP, STABLELM),
    moe_llava("MoE-LLaVA-StableLM-1.6B-4e-384", "stablelm_siglip384", TINY_SIGLIP, STABLELM),
    moe_llava("MoE-LLaVA-Qwen-1.8B-4e", "qwen_clip336", TINY_CLIP, QWEN),
]


@dataclass(frozen=True)
class Snippet:
    document: Path
    line: int
    language: str
    code: str

    @property
    def name(self):
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def snippets_of(text, document=ROOT / "README.md"):
    """All fenced blocks; ValueError where one is not closed or its language is not known here."""
    snippets, start, language = [], None, None
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start, language = number, line.strip().removeprefix("```")
            if language not in RUNNABLE | SHOWN:
                raise ValueError(f"{document}:{number} has a block of language {language!r}.")
        else:
            snippets.append(Snippet(document, start, language, "\n".join(lines[start : number - 1])))
            start = None
    if start is not None:
        raise ValueError(f"{document}:{start} has a block that is not closed.")
    return snippets


SNIPPETS = [snippet for document in DOCUMENTS for snippet in snippets_of(document.read_text("utf-8"), document)]


def runnable(language):
    """Snippets to run: each begins in a new folder, so one that is printed twice needs to run once."""
    return {snippet.code: snippet for snippet in reversed(SNIPPETS) if snippet.language == language}.values()


def name_of(part):
    return part.name if isinstance(part, Snippet) else str(part.relative_to(ROOT))


def prose_of(document):
    return re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def cells_of(row):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def rows_of(text):
    """Cells of all table rows, without those that separate the heads."""
    rows = [cells_of(line) for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not all(set(cell) <= {"-", ":"} for cell in row)]


def copy_folder(source, target):
    # File by file: the fixtures may be read-only.
    target.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)


@pytest.fixture(scope="session")
def placeholders(tmp_path_factory):
    """The placeholders, by name."""
    folder = tmp_path_factory.mktemp("placeholders")
    copy_folder(FIXTURES / CLIP_FIXTURE, folder / CLIP)
    shutil.copyfile(ROOT / "examples" / "images" / "rocket.jpg", folder / PHOTO)
    for release in RELEASES:
        fixture, place = release.tower
        copy_folder(FIXTURES / release.golden, folder / release.name)
        copy_folder(FIXTURES / fixture, folder / release.name / place)
        script = ROOT / "conversion_scripts" / f"convert_{release.family}_weights_to_hf.py"
        convert = runpy.run_path(str(script))[f"convert_{release.family}_checkpoint"]
        convert(folder / release.name, folder / release.converted)
    copy_folder(FIXTURES / MOLE_GOLDEN / "vicuna-7b-v1.5", folder / VICUNA)
    shutil.copyfile(FIXTURES / MOLE_GOLDEN / MOLE_FILE, folder / MOLE_FILE)
    script = ROOT / "conversion_scripts" / "convert_llava_mole_weights_to_hf.py"
    convert = runpy.run_path(str(script))["convert_llava_mole_checkpoint"]
    convert(folder / MOLE_FILE, folder / MOLE_CONVERTED, vicuna=folder / VICUNA, clip=folder / CLIP)
    base = AutoModelForCausalLM.from_pretrained(folder / VICUNA, dtype="auto")
    get_mole_model(base, MoleConfig()).save_pretrained(folder / MOLE_ADAPTER)
    names = [CLIP, PHOTO, VICUNA, MOLE_FILE, MOLE_CONVERTED, MOLE_ADAPTER]
    names += [name for release in RELEASES for name in (release.name, release.converted)]
    return {name: folder / name for name in names}


@pytest.fixture
def workspace(placeholders, tmp_path, monkeypatch):
    """An empty working directory in which the placeholders and the repository's scripts exist."""
    for name, target in placeholders.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    for name in ("conversion_scripts", "examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands_of(code):
    """The words of every command, without comments; ValueError for what only a shell could run."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if any(re.search(r"[|&;<>$`*?]", word) and " " not in word for word in words):
            raise ValueError(f"The command {line!r} needs a shell; the tests run plain ones.")
        if words:
            commands.append(words)
    return commands


def check_make(arguments):
    targets = [argument for argument in arguments if "=" not in argument]
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), f"The Makefile has no {target!r}."


def check_pip(arguments):
    """Nothing is installed, but what would be is compared with constraints.txt and the package's extras."""
    assert arguments[0] == "install"
    requirements = [word for word in arguments[1:] if not word.startswith(("-", "https://"))]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    extras = set(importlib.metadata.metadata("llava-family").get_all("Provides-Extra"))
    assert requirements
    for requirement in requirements:
        local = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", requirement)
        if local:
            assert set((local[1] or "").split(",")) - {""} <= extras
        else:
            assert requirement in pins


def run_script(script, monkeypatch):
    """As `python script` would: with modules beside it, of which those of other scripts may have the same names."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(script.parent))
        before = set(sys.modules)
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            folder = script.resolve().parent
            for name in set(sys.modules) - before:
                if Path(getattr(sys.modules[name], "__file__", None) or "/").resolve().parent == folder:
                    del sys.modules[name]


def run_program(program, arguments, workspace, monkeypatch):
    output = workspace / arguments[arguments.index("--output") + 1] if "--output" in arguments else None
    if output is not None and output.is_symlink():
        output.unlink()
    monkeypatch.setattr(sys, "argv", [str(program), *arguments])
    exit_code = 0
    try:
        if isinstance(program, Path):
            run_script(program, monkeypatch)
        else:
            program()
    except SystemExit as exit_request:
        exit_code = exit_request.code
    assert exit_code in (0, None)
    if output is not None:
        assert (output if output.suffix in FILES else output / "config.json").is_file()


def check_benchmark(script, arguments):
    """It would take minutes. Its options are looked up; other tests run it with tiny sizes."""
    text = script.read_text() + (ROOT / "benchmarks" / "timing.py").read_text()
    for option in arguments:
        assert not option.startswith("--") or f'"{option}"' in text, f"{script} has no {option!r}."


def check_accelerate(arguments, monkeypatch, capsys):
    """Without GPUs and the papers' data, the script has to take all its settings, and then to miss the data."""
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    launched = launch_command_parser().parse_args(arguments[1:])
    assert Path(launched.config_file).is_file()
    options = launched.training_script_args
    data = options[options.index("--data") + 1]
    monkeypatch.setattr(sys, "argv", [launched.training_script, *options, "--use-cpu", "--tf32", "false"])
    with pytest.raises(SystemExit):
        run_script(Path(launched.training_script), monkeypatch)
    assert data in capsys.readouterr().err


def check_demo(words):
    """The page answers, and Ctrl-C ends it."""
    runpy.run_path(str(ROOT / "tests" / "demo" / "serving.py"))["check_demo"](words)


def run_command(words, workspace, monkeypatch, capsys):
    program, arguments = words[0], words[1:]
    if words[:3] == ["python", "-m", "pip"]:
        program, arguments = "pip", words[3:]
    if program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "accelerate":
        check_accelerate(arguments, monkeypatch, capsys)
    elif words[:2] == ["llava-family", "demo"]:
        check_demo(arguments)
    elif program == "python" and arguments[0].startswith("benchmarks/"):
        check_benchmark(Path(arguments[0]), arguments[1:])
    elif program == "python" and arguments[0].endswith(".py"):
        run_program(Path(arguments[0]), arguments[1:], workspace, monkeypatch)
    else:
        (entry_point,) = importlib.metadata.entry_points(group="console_scripts", name=program)
        assert entry_point.dist.name == "llava-family"
        run_program(entry_point.load(), arguments, workspace, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("snippet", runnable("python"), ids=name_of)
def test_python(snippet, workspace):
    # Line numbers of a traceback are those of the document.
    code = compile("\n" * snippet.line + snippet.code, snippet.name, "exec")
    exec(code, {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("snippet", runnable("bash"), ids=name_of)
def test_bash(snippet, workspace, monkeypatch, capsys):
    commands = commands_of(snippet.code)
    assert commands
    for words in commands:
        run_command(words, workspace, monkeypatch, capsys)


def test_nothing_is_skipped(workspace, monkeypatch, capsys):
    """Of every runnable block a test is made, and what the tests do not know is an error."""
    texts = "\n".join(document.read_text("utf-8") for document in DOCUMENTS)
    blocks = len(re.findall(r"^\s*```(?:python|bash)", texts, flags=re.MULTILINE))
    assert blocks == sum(snippet.language in RUNNABLE for snippet in SNIPPETS) >= 8
    codes = {snippet.code for snippet in SNIPPETS if snippet.language in RUNNABLE}
    assert codes == {snippet.code for language in RUNNABLE for snippet in runnable(language)}
    for text in ("```\nls\n```", "```sh\nls\n```", "```python\n1"):
        with pytest.raises(ValueError, match="has a block"):
            snippets_of(text)
    with pytest.raises(ValueError, match="needs a shell"):
        commands_of("make demo && make test")
    for command in (
        "ls",
        "llava-uhd generate",
        "make nothing",
        "pip install unknown==1.0",
        "python -m this",
        "python benchmarks/flops.py --nothing",
        "accelerate launch --config_file examples/training/accelerate/ddp.yaml examples/training/trl_sft.py --dota d",
    ):
        with pytest.raises((AssertionError, ValueError)):
            run_command(command.split(), workspace, monkeypatch, capsys)


def anchors_of(document):
    headings = re.findall(r"^#+ (.+)$", prose_of(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(document)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


CITATION = re.compile(r"`((?:[\w/]+/)?test_\w+\.py)(?:::(\w+))?`")


def assert_cited_test_exists(file, function):
    family = next((name for name in ("moe_llava", "llava_mole") if file.endswith(f"_{name}.py")), "llava_uhd")
    path = ROOT / file if "/" in file else ROOT / "tests" / family / file
    assert path.is_file(), file
    functions = {
        node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)
    }
    assert not function or function in functions, f"{file}::{function}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_cited_tests_exist(document):
    text = document.read_text("utf-8")
    citations = CITATION.findall(text)
    of_functions = [function for _, function in citations if function]
    assert len(of_functions) == text.count(".py::"), "a citation is not written as `file.py::test`"
    for file, function in citations:
        assert_cited_test_exists(file, function)


def test_every_difference_cites_a_test():
    rows = rows_of((ROOT / "docs" / "fidelity.md").read_text("utf-8"))
    differences = [row for row in rows if len(row) == 6 and row[0] != "topic"]
    assert len(differences) >= 40
    for row in differences:
        assert all(row), row
        assert CITATION.search(row[-1]) or row[-1].startswith("none: "), row


def size_of(cell):
    return None if cell == "–" else tuple(int(side) for side in cell.split("×"))


def test_first_result_is_right(workspace, capsys):
    """The README's first snippet reads the picture."""
    snippet = next(each for each in SNIPPETS if each.language == "python")
    (picture,) = re.findall(r"examples/images/miniature/([\w.]+)", snippet.code)
    questions = json.loads((ROOT / "examples" / "images" / "miniature" / "questions.json").read_text("utf-8"))
    (truth,) = (each["answer"] for each in questions["uhd"] if each["image"] == picture)
    test_python(snippet, workspace)
    assert capsys.readouterr().out.split() == [truth]


def test_example_sizes_are_those_of_the_plan():
    rows = [row for row in rows_of(MODEL_PAGE.read_text("utf-8")) if re.fullmatch(r"\d+×\d+", row[0])]
    assert len(rows) >= 6
    for image, grid, slice_size, overview, views, tokens in rows:
        plan = plan_slices(*size_of(image))
        assert size_of(grid) == ((plan.columns, plan.rows) if plan.num_slices else None), image
        assert size_of(slice_size) == plan.slice_size, image
        assert size_of(overview) == plan.overview_size, image
        assert (int(views), int(tokens)) == (plan.num_views, plan.num_tokens(144)), image


def test_compute_is_that_of_the_benchmark():
    measured = (ROOT / "benchmarks" / "README.md").read_text("utf-8").split("text model of 13B")[1]
    lines = [re.split(r"\s{2,}", line.strip()) for line in measured.splitlines()]
    rows = [row for row in rows_of(MODEL_PAGE.read_text("utf-8")) if re.fullmatch(r"\d+\.\d{3}", row[-1])]
    assert len(rows) >= 4
    for model, image, tokens, total, ratio in rows:
        # model, image, views, tokens, vision, projector, text, lm_head, total, / 1.5
        found = [line for line in lines if line[:2] == [model, image.replace("×", "x")]]
        assert [(line[3], line[8], line[9]) for line in found] == [(tokens, total, ratio)], model


def test_every_release_has_a_card():
    assert sorted(release.card for release in RELEASES) == MODEL_CARDS


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.card.stem)
def test_model_card_metadata(release):
    card = ModelCard.load(release.card)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["license"] == release.license
    assert data.get("license_name") == ("see-below" if release.license == "other" else None)
    assert "\n## Licence\n" in card.text
    assert data["base_model"] == release.base_model
    assert data["language"] == ["en"]
    assert data["datasets"] == ["liuhaotian/LLaVA-Pretrain", "liuhaotian/LLaVA-Instruct-150K"]
    assert release.family.replace("_", "-") in data["tags"]
    # No score was measured with these weights, so the card must not give the Hub one.
    assert card.data.eval_results is None
    assert "model-index" not in data
    assert card.text.lstrip().startswith("# ")


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.card.stem)
def test_model_card_is_about_its_release(release):
    """Cards of one family are much alike: what is copied must not name another release."""
    other_names = {name for other in RELEASES if other != release for name in (other.name, other.converted)}
    text = release.card.read_text("utf-8")
    assert release.name in text and release.converted in text
    for name in other_names:
        assert not re.search(rf"{re.escape(name)}(?![\w-])", text), name


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.card.stem)
def test_model_card_prompt(release, placeholders):
    (prompt,) = (
        snippet.code for snippet in SNIPPETS if (snippet.document, snippet.language) == (release.card, "text")
    )
    content = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
    processor = AutoProcessor.from_pretrained(placeholders[release.converted])
    assert prompt == processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_adapter_card_is_a_template():
    card = ModelCard.load(ADAPTER_CARD)
    data = card.data.to_dict()
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == ("peft", VICUNA, "adapter")
    assert card.data.eval_results is None
    # What is to be filled in stands in brackets, and no link does.
    assert len(re.findall(r"\[[^\]]+\](?!\()", prose_of(ADAPTER_CARD))) >= 15


def test_python_snippet_with_an_error_fails(workspace):
    (broken,) = snippets_of("```python\nfrom llava_family import no_such_name\n```")
    with pytest.raises(ImportError):
        test_python(broken, workspace)
