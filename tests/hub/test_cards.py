"""The README of an exported repository: which card it is, and that it is about this repository."""

import re
import shutil

import pytest
from huggingface_hub import ModelCard

from llava_family import LlavaUhdConfig, MoeLlavaConfig
from llava_family.hub import cards, export_model

from .conftest import CASES, ROOT, run_without_package


RELEASES = sorted(cards.ARCHITECTURES)
PHI_CARD = "moe-llava-phi2-2.7b-4e"


def cells(text):
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, flags=re.MULTILINE))


@pytest.fixture
def tiny_release(monkeypatch, checkpoints):
    """Makes the golden checkpoint of a case that of a release, for its card."""

    def make(name, release):
        config = {"llava_uhd": LlavaUhdConfig, "moe_llava": MoeLlavaConfig}[CASES[name].family].from_pretrained(
            checkpoints(name), **CASES[name].load_options
        )
        monkeypatch.setitem(cards.ARCHITECTURES, release, cards.architecture(config))
        return checkpoints(name)

    return make


def test_every_release_has_a_card_and_an_architecture():
    folder = ROOT / "model_cards"
    assert sorted(path.stem for path in folder.glob("*.md") if path.stem != "mole-adapter") == RELEASES
    assert len(set(cards.ARCHITECTURES.values())) == len(RELEASES)


def test_architecture_of_the_releases_configuration():
    text = {"model_type": "llama", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}
    assert cards.architecture(LlavaUhdConfig(text_config=text)) == cards.ARCHITECTURES["llava-uhd-144-13b"]
    phi = {"model_type": "moe_llava_phi_text", "hidden_size": 2560, "num_hidden_layers": 32}
    assert cards.architecture(MoeLlavaConfig(text_config=phi)) == cards.ARCHITECTURES[PHI_CARD]


@pytest.mark.parametrize("is_original", [False, True], ids=["converted", "original"])
@pytest.mark.parametrize("release", RELEASES)
def test_release_cards_become_the_repositorys(release, is_original):
    before = ModelCard.load(ROOT / "model_cards" / f"{release}.md").data.to_dict()
    text = cards.release_card(release, "someone/some-model", is_original)
    card = ModelCard(text)
    assert card.data.to_dict() == {**before, "tags": [*before["tags"], "custom_code"]}
    code = "\n".join(re.findall(r"^```python\n(.+?)^```$", text, flags=re.DOTALL | re.MULTILINE))
    assert "llava_family" not in code and "path/to" not in code
    loads = re.findall(r"from_pretrained\(.*", code)
    assert len(loads) >= 2
    for load in loads:
        assert re.fullmatch(r'from_pretrained\("someone/some-model", (.+, )?trust_remote_code=True\)', load), load
    assert cards.USAGE in text and cards.CODE_LICENSE in text
    assert "import it first" not in text and "This folder" not in text
    # Only what a conversion script wrote is said to be by one.
    assert ("conversion_scripts/" in text) != is_original
    assert (cards.ORIGINAL in text) == is_original
    assert "vision tower is CLIP's own" not in text or not is_original


def test_card_of_another_shape_is_an_error(monkeypatch, tmp_path):
    (tmp_path / f"{PHI_CARD}.md").write_text("---\ntags:\n- llava\n---\n\n# Something else\n")
    monkeypatch.setattr(cards, "package_file", lambda name: tmp_path)
    with pytest.raises(ValueError, match=r"must be a card like those of all releases, but has nothing like"):
        cards.release_card(PHI_CARD, "name", is_original=False)


@pytest.mark.slow
def test_card_is_found_by_name_and_sizes(tiny_release, tmp_path):
    checkpoint, lines = tiny_release("phi-converted", PHI_CARD), []
    named = tmp_path / "MoE-LLaVA-Phi2-2.7B-4e-hf"
    shutil.copytree(checkpoint, named)
    found = export_model(named, tmp_path / "named", report=lines.append)
    assert "# MoE-LLaVA Phi2 2.7B 4e\n" in (found / "README.md").read_text()
    assert lines[0] == f"Card: that of the release {PHI_CARD}, by the checkpoint's name and sizes."
    lines.clear()
    generic = export_model(checkpoint, tmp_path / "unnamed", report=lines.append)
    assert "was made by `llava-family export`" in (generic / "README.md").read_text()
    assert f"choose its card by `--card {PHI_CARD}`" in lines[0]
    asked = export_model(checkpoint, tmp_path / "asked", card=PHI_CARD, report=lines.append)
    assert "# MoE-LLaVA Phi2 2.7B 4e\n" in (asked / "README.md").read_text()
    # The name alone is no proof: this is not the release with SigLIP.
    named = named.rename(tmp_path / "MoE-LLaVA-Phi2-2.7B-4e-384")
    other = export_model(named, tmp_path / "other", report=lines.append)
    assert "was made by `llava-family export`" in (other / "README.md").read_text()


def test_own_card_is_taken_as_it_is(checkpoints, tmp_path):
    (tmp_path / "mine.md").write_text("# Mine\n")
    folder = export_model(checkpoints("phi-converted"), tmp_path / "out", card=tmp_path / "mine.md", report=str)
    assert (folder / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("no/such/card.md", r"there is no file 'no/such/card.md'"),
        ("unheard-of", r"but is 'unheard-of'. Releases are llava-uhd-144-13b: \('llama', 5120, 40, 336\); moe-llava"),
        ("llava-uhd-144-13b", r"are this model's, \('moe_llava_phi_text', \d+, \d+, 56\), but is 'llava-uhd-144-13b'"),
    ],
)
def test_wrong_cards_are_refused(checkpoints, tmp_path, card, message):
    with pytest.raises(ValueError, match=message):
        export_model(checkpoints("phi-converted"), tmp_path / "out", card=card, report=str)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_generic_card(name, repositories):
    card = ModelCard.load(repositories(name) / "README.md")
    family = CASES[name].family.replace("_", "-")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "unknown",
        "tags": ["llava", family, "vision-language", "custom_code"],
    }
    assert card.text.strip().startswith(f"# {name}\n")
    assert "$" not in card.text and "Licence" in card.text and "ASSISTANT:" in card.text
    assert (cards.ORIGINAL in card.text) == (CASES[name].original is not None)
    facts = cells(card.text)
    assert int(facts["parameters in the files"].replace(",", "")) > 10_000
    assert ("slices" in facts["an image is"]) == (family == "llava-uhd")
    experts = {"uhd-converted": None, "uhd-original": None, "uhd-mole": "3", "mole-converted": "3"}
    assert facts.get("experts") == experts.get(name, "4")


@pytest.mark.slow
def test_code_of_the_cards_runs_without_the_package(repositories, tiny_release, tmp_path):
    generic, release = repositories("uhd-converted"), tiny_release("phi-original", PHI_CARD)
    shutil.copytree(generic, tmp_path / generic.name)
    export_model(release, tmp_path / "phi", card=PHI_CARD, report=str)
    shutil.copyfile(ROOT / "examples" / "images" / "rocket.jpg", tmp_path / "photo.jpg")
    texts = [(tmp_path / name / "README.md").read_text() for name in (generic.name, "phi")]
    snippets = [re.search(r"^```python\n(.+?)^```$", text, flags=re.DOTALL | re.MULTILINE)[1] for text in texts]
    run_without_package("\n".join(snippets), tmp_path)
