"""Recorded routing against counts by hand, figures, and the report of `llava-family routing`."""

import base64
import math
import re
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, SiglipVisionConfig
from typer.testing import CliRunner

from llava_family.cli import app
from llava_family.inspection import routing_report
from llava_family.inspection.routing import RoutingRecorder
from llava_family.inspection.routing_plots import (
    image_expert_maps,
    plot_expert_loads,
    plot_image_routing,
    plot_modality_loads,
    plot_pathways,
    principal_pathways,
)
from llava_family.inspection.routing_report import write_routing_report
from llava_family.llava_uhd.configuration_llava_uhd import LlavaUhdVisionConfig
from llava_family.llava_uhd.slicing_llava_uhd import plan_slices
from llava_family.moe_llava.configuration_moe_llava import MoeLlavaConfig, MoeLlavaPhiConfig
from llava_family.moe_llava.modeling_moe_llava import MoeLlavaForCausalLM, MoeLlavaRouter


FIXTURES = Path(__file__).parents[1] / "fixtures" / "moe_llava" / "phi_clip336"
VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
IMAGE_TOKEN, PAD_TOKEN = 99, 0
SQUARE = {"clip": (CLIPVisionConfig, 16), "siglip": (SiglipVisionConfig, 15)}


def make_model(vision_config=None, num_layers=6, **kwargs):
    torch.manual_seed(0)
    text_config = MoeLlavaPhiConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        vocab_size=99,
        pad_token_id=PAD_TOKEN,
        eos_token_id=None,
    )
    config = MoeLlavaConfig(
        text_config=text_config, vision_config=vision_config or CLIPVisionConfig(**VISION), **kwargs
    )
    model = MoeLlavaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 1)
    return model


def make_slices_model(**kwargs):
    return make_model(LlavaUhdVisionConfig(**VISION), vision_encoding="slices", num_queries=4, **kwargs)


def square_inputs(num_features=16):
    """Two images in the first row, one in the second, which is padded on the left."""
    image = [IMAGE_TOKEN] * num_features
    first = [5, *image, 6, *image, 7, 8]
    second = [9, *image, 10]
    second = [PAD_TOKEN] * (len(first) - len(second)) + second
    input_ids = torch.tensor([first, second])
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD_TOKEN).long(),
        "pixel_values": torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1)),
    }


def slices_inputs():
    """An image of two slices, and one that is not sliced."""
    view = [IMAGE_TOKEN] * 4
    return {
        "input_ids": torch.tensor([[5, *view, 3, *view, 4, *view, 6, *view, 7]]),
        "pixel_values": torch.randn(4 * 16, 3 * 14 * 14, generator=torch.Generator().manual_seed(1)),
        "image_grids": torch.tensor([[[1, 2], [4, 4], [4, 4]], [[0, 0], [0, 0], [4, 4]]]),
    }


CASES = {"square": (make_model, square_inputs), "slices": (make_slices_model, slices_inputs)}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def recorded(model):
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(**square_inputs())
    return recorder


def count_by_hand(router_logits, masks):
    """First choices of `(layers, experts)` by a plain loop over tokens."""
    counts = torch.zeros(len(router_logits), router_logits[0].shape[1], dtype=torch.long)
    for layer, logits in enumerate(router_logits):
        for token, row in enumerate(logits.tolist()):
            if masks[token]:
                counts[layer, max(range(len(row)), key=row.__getitem__)] += 1
    return counts


def hooks_of(model):
    """transformers has hooks of its own."""
    return [
        (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._forward_hooks_always_called)
        for module in model.modules()
    ]


@pytest.mark.parametrize("case", CASES)
def test_counts_are_exact(case):
    make, make_inputs = CASES[case]
    model, inputs = make(), make_inputs()
    with torch.no_grad():
        expected = model(**inputs, output_router_logits=True)
        with RoutingRecorder(model) as recorder:
            outputs = model(**inputs)
    assert torch.equal(outputs.logits, expected.logits)
    assert outputs.router_logits is None

    ids = inputs["input_ids"].flatten()
    masks = {"image": ids == IMAGE_TOKEN, "text": (ids != IMAGE_TOKEN) & (ids != PAD_TOKEN), None: ids != PAD_TOKEN}
    masks["padding"] = ids == PAD_TOKEN
    logits = torch.stack(expected.router_logits)
    probabilities = logits.double().softmax(-1)
    for modality, mask in masks.items():
        assert recorder.num_tokens(modality) == mask.sum()
        if not mask.any():
            continue
        counts = count_by_hand(expected.router_logits, mask.tolist())
        assert torch.equal((recorder.loads(modality) * mask.sum()).round().long(), counts)
        assert torch.equal(recorder.pathways(modality), logits[:, mask].argmax(-1).T)
        two = torch.zeros_like(probabilities).scatter(-1, logits.topk(2).indices, 0.5)
        torch.testing.assert_close(recorder.loads(modality, top_k=True), two[:, mask].mean(1))
        entropies = -(probabilities * probabilities.log()).sum(-1)[:, mask].mean(1)
        torch.testing.assert_close(recorder.entropies(modality), entropies)
    assert recorder.layer_indices == [0, 2, 4]
    assert recorder.image_lengths == ([16, 16, 16] if case == "square" else [12, 4])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_records_prompt_and_answer(case, cache):
    make, make_inputs = CASES[case]
    model, inputs = make(), make_inputs()
    options = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    if cache:
        options["cache_implementation"] = cache
    expected = model.generate(**inputs, **options)
    with RoutingRecorder(model) as recorder:
        generated = model.generate(**inputs, **options)
    assert torch.equal(generated, expected)

    rows, ids = len(generated), inputs["input_ids"]
    assert recorder.num_tokens("image") == (ids == IMAGE_TOKEN).sum()
    assert recorder.num_tokens("padding") == (ids == PAD_TOKEN).sum()
    # the last new token is never fed
    real = int(((ids != IMAGE_TOKEN) & (ids != PAD_TOKEN)).sum())
    assert recorder.num_tokens("text") == real + 3 * rows
    assert recorder.image_lengths == ([16, 16, 16] if case == "square" else [12, 4])
    if rows == 1:
        with torch.no_grad():
            whole = model(**{**inputs, "input_ids": generated[:, :-1]}, output_router_logits=True)
        assert torch.equal(recorder.pathways(), torch.stack(whole.router_logits).argmax(-1).T)


def test_recordings_add_up_until_clear(model, recorded):
    recorder = RoutingRecorder(model)
    assert recorder.num_tokens() == 0
    with torch.no_grad():
        for _ in range(2):
            with recorder:
                model(**square_inputs())
        model(**square_inputs())  # outside
    assert recorder.num_tokens() == 2 * recorded.num_tokens()
    assert torch.equal(recorder.loads("text"), recorded.loads("text"))
    recorder.clear()
    assert recorder.num_tokens("image") == 0 and recorder.image_lengths == []


def test_exceptions_and_nesting(model):
    outer, inner = RoutingRecorder(model), RoutingRecorder(model)
    with torch.no_grad():
        model(**square_inputs(), output_router_logits=True)
    before = hooks_of(model)
    wrong = {**square_inputs(), "pixel_values": torch.randn(1, 3, 56, 56)}
    with outer, torch.no_grad():
        with pytest.raises(ValueError, match="do not match"), inner:  # noqa: PT012
            with inner:  # of itself
                model(**square_inputs())
            model(**square_inputs())
            model(**wrong)
        model.model.language_model.layers[0].mlp(torch.zeros(1, 3, 32))  # in no forward pass of the model
        model(**square_inputs())
    assert hooks_of(model) == before
    assert outer.num_tokens() == 3 * 54 and inner.num_tokens() == 2 * 54


def test_pass_that_fails_behind_the_routers_is_not_recorded(model):
    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.language_model.final_layernorm.register_forward_hook(fail)
    with RoutingRecorder(model) as recorder, torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        model(**square_inputs())
    handle.remove()
    assert recorder.num_tokens() == 0 and recorder.image_lengths == []


def test_records_through_wrappers_and_without_the_head(model):
    class Wrapper(nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped = wrapped

    with RoutingRecorder(Wrapper(model)) as recorder, torch.no_grad():
        model.generate(**square_inputs(), max_new_tokens=1)
        inputs = square_inputs()
        model.model(inputs["input_ids"], inputs["pixel_values"], None, inputs["attention_mask"])  # by position
    assert recorder.num_tokens() == 2 * 54 and recorder.num_tokens("padding") == 2 * 18


def test_gradient_checkpointing_counts_once():
    model = make_model().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with RoutingRecorder(model) as recorder:
        model(**square_inputs(), labels=square_inputs()["input_ids"].clamp(max=98)).loss.backward()
    assert recorder.num_tokens() == 54


def test_threads_are_kept_apart(model):
    inputs, recorder = square_inputs(), RoutingRecorder(model)
    text = {"input_ids": torch.tensor([[5, 6, 7]])}

    def run(arguments):
        with torch.no_grad():
            for _ in range(10):
                model(**arguments)

    with recorder:
        threads = [threading.Thread(target=run, args=(arguments,)) for arguments in (inputs, text, inputs, text)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recorder.num_tokens("image") == 20 * 48
    assert recorder.num_tokens("text") == 20 * (6 + 3)


def test_tokens_without_ids_have_no_modality(model):
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(inputs_embeds=torch.randn(1, 5, 32))
    assert recorder.num_tokens() == 5 and recorder.num_tokens("text") == 0
    assert recorder.loads().shape == (3, 4)
    with pytest.raises(ValueError, match="Neither text nor image"):
        plot_expert_loads(recorder)


def test_routers_of_other_families():
    class OtherRouter(MoeLlavaRouter):
        records_routing = True

        def forward(self, hidden_states):
            return super().forward(hidden_states).unflatten(0, (1, -1))  # (batch, length, experts)

    class Recorder(RoutingRecorder):
        router_classes = ()

    model = make_model()
    with pytest.raises(ValueError, match="no router"):
        Recorder(model)
    router = model.model.language_model.layers[2].mlp.gate
    router.__class__ = OtherRouter
    router.forward = lambda hidden_states: nn.functional.linear(hidden_states, router.weight)
    with Recorder(model) as recorder, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert recorder.layer_indices == [2] and recorder.loads().shape == (1, 4)


def test_errors_say_what_is_wrong(model, recorded):
    config = model.config.text_config
    with pytest.raises(ValueError, match="has no router"):
        RoutingRecorder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="MoeLlavaPhiModel has none"):
        RoutingRecorder(model.model.language_model)
    assert config is model.config.text_config
    with pytest.raises(ValueError, match="Nothing was recorded"):
        RoutingRecorder(model).loads()
    with pytest.raises(ValueError, match="'audio'"):
        recorded.loads("audio")
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="modality 'image'"):
        recorder.pathways("image")
    with pytest.raises(ValueError, match="0 recorded images"):
        image_expert_maps(recorder, (56, 56))


@pytest.mark.parametrize("tower", SQUARE)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_map_of_a_square_view(tower, strategy):
    vision_class, num_features = SQUARE[tower]
    num_features += strategy == "full"
    model = make_model(vision_class(**VISION), vision_feature_select_strategy=strategy)
    with RoutingRecorder(model) as recorder, torch.no_grad():
        outputs = model(**square_inputs(num_features), output_router_logits=True)
    chosen = torch.stack(outputs.router_logits).argmax(-1)[:, 2 + num_features : 2 + 2 * num_features]  # second image
    experts = image_expert_maps(recorder, (50, 40), image_index=1)["view"]
    assert experts.shape == (3, 4, 4)
    first = 1 if num_features == 15 else 0
    assert (experts.reshape(3, 16)[:, :first] == -1).all()
    assert np.array_equal(experts.reshape(3, 16)[:, first:], chosen[:, -(16 - first) :])
    with pytest.raises(ValueError, match="3 recorded images, but is 3"):
        image_expert_maps(recorder, (50, 40), image_index=3)


def test_map_of_slices(monkeypatch):
    model = make_slices_model()
    with RoutingRecorder(model) as recorder, torch.no_grad():
        outputs = model(**slices_inputs(), output_router_logits=True)
    chosen = torch.stack(outputs.router_logits).argmax(-1).numpy()[0]
    maps = image_expert_maps(recorder, (112, 56))
    left, right, overview = chosen[1:5], chosen[6:10], chosen[11:15]
    assert maps["slices"][0].tolist() == [[*left[:2], *right[:2]], [*left[2:], *right[2:]]]
    assert maps["overview"][0].ravel().tolist() == overview.tolist()
    unsliced = image_expert_maps(recorder, (56, 56), image_index=1)
    assert list(unsliced) == ["overview"] and unsliced["overview"][0].ravel().tolist() == chosen[16:20].tolist()
    with pytest.raises(ValueError, match="56x56 pixels has 4 tokens, but 12"):
        image_expert_maps(recorder, (56, 56))
    figure = plot_image_routing(Image.new("RGB", (112, 56), "teal"), recorder)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [
        *("slices", "layer 0", "layer 2", "layer 4"),
        *("overview", "layer 0", "layer 2", "layer 4"),
    ]

    plan = plan_slices(140, 112, base_size=56)
    assert (plan.rows, plan.columns) == (2, 3)
    monkeypatch.setattr(RoutingRecorder, "image_lengths", [28])
    recorder.pathways = lambda modality: torch.arange(28)[:, None]
    maps = image_expert_maps(recorder, (140, 112))
    monkeypatch.undo()
    assert maps["slices"][0].tolist() == [
        [0, 1, 4, 5, 8, 9],
        [2, 3, 6, 7, 10, 11],
        [12, 13, 16, 17, 20, 21],
        [14, 15, 18, 19, 22, 23],
    ]
    assert maps["overview"][0].tolist() == [[24, 25], [26, 27]]

    perceiver = make_slices_model(resampler_type="perceiver")
    with RoutingRecorder(perceiver) as recorder, torch.no_grad():
        perceiver(**slices_inputs())
    with pytest.raises(ValueError, match="spatial resampler"):
        plot_image_routing(Image.new("RGB", (112, 56)), recorder)


def test_principal_pathways():
    # layers: 0 to 3; most tokens go up, some go down, one stays
    pathways = torch.tensor([[0, 1, 2, 3]] * 10 + [[3, 1, 1, 0]] * 3 + [[2, 2, 2, 2]])
    curves = principal_pathways(pathways, num_experts=4)
    assert curves.shape[1] == 4 and 1 <= len(curves) <= 3
    assert curves.min(axis=1).tolist() == [0] * len(curves) and curves.max(axis=1).tolist() == [3] * len(curves)
    assert curves[0].tolist() in ([0, 1, 2, 3], [3, 2, 1, 0])
    assert len(principal_pathways(torch.tensor([[1, 1, 1]] * 5), num_experts=4)) == 0
    assert len(principal_pathways(torch.randint(0, 4, (100, 30)), num_experts=4)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("plot", [plot_expert_loads, plot_modality_loads, plot_pathways])
def test_figures(plot, recorded, model, tmp_path):
    import matplotlib.figure

    figure = plot(recorded, tmp_path / "figure.png")
    assert isinstance(figure, matplotlib.figure.Figure)
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG" and image.width > 400
    with RoutingRecorder(model) as text_only, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    plot(text_only)


def test_figure_shows_the_loads(recorded):
    figure = plot_modality_loads(recorded)
    for axes, modality in zip(figure.axes, ("text", "image"), strict=True):
        heights = np.array([[bar.get_height() for bar in container] for container in axes.containers])
        np.testing.assert_allclose(heights.T, recorded.loads(modality).numpy())
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2", "4"]

    panels = plot_expert_loads(recorded).axes[1:]
    text, image = (recorded.loads(name).numpy() for name in ("text", "image"))
    for expert, axes in enumerate(panels):
        shown = [bar.get_height() for bar in axes.containers[0]]
        total = text[:, expert] + image[:, expert]
        np.testing.assert_allclose(shown, np.where(total > 0, text[:, expert] / np.maximum(total, 1e-12), 0))


@pytest.mark.slow
def test_report_is_one_complete_file(recorded, tmp_path, monkeypatch):
    output = tmp_path / "report.html"
    images = [Image.new("RGB", (56, 40), color) for color in ("red", "green", "blue")]
    facts = {"Prompt": "Is 1 < 2 & <script>alert(1)</script>?"}
    assert write_routing_report(recorded, output, images, facts) == output
    document = output.read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', document)
    assert len(pictures) == 3 + 3 == document.count("<img")
    for picture in pictures:
        Image.open(BytesIO(base64.b64decode(picture))).verify()
    assert "http" not in re.sub(r"base64,[^\"]+", "", document)
    assert "<script>" not in document and "&lt;script&gt;" in document
    assert f"<td>{recorded.loads('image')[1, 2]:.1%}</td>" in document
    assert f"<td>{recorded.entropies()[0]:.3f}</td>" in document

    with pytest.raises(ValueError, match="exists already"):
        write_routing_report(recorded, output)
    monkeypatch.setattr(routing_report.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_routing_report(recorded, output, overwrite=True)
    assert output.read_text(encoding="utf-8") == document
    assert list(tmp_path.iterdir()) == [output]


def routing(*arguments):
    return CliRunner().invoke(app, ["routing", *map(str, arguments)])


ORIGINAL = (
    *("--model", FIXTURES / "original_checkpoint"),
    *("--vision-tower", FIXTURES / "openai" / "clip-vit-tiny-patch14-56"),
)
RUN = ("--prompt", "What is this?", "--max-new-tokens", "4", "--dtype", "float32")


@pytest.mark.slow
def test_command(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "report.html"
    images = ("--image", FIXTURES / "image_0.png", "--image", FIXTURES / "image_1.png")
    result = routing(*ORIGINAL, *RUN, *images, "--output", output)
    assert result.exit_code == 0, result.output
    assert "Expert 3" in result.stdout and "text / image" in result.stdout and str(output) in result.stdout
    document = output.read_text(encoding="utf-8")
    assert "32 image" in document and "Image 2" in document and "What is this?" in document

    again = routing(*ORIGINAL, *RUN, "--output", output)
    assert again.exit_code == 1 and "exists already" in again.stderr
    assert output.read_text(encoding="utf-8") == document
    again = routing(*ORIGINAL, *RUN, "--output", output, "--force")
    assert again.exit_code == 0, again.output
    assert "0 image" in output.read_text(encoding="utf-8")


UHD = Path(__file__).parents[1] / "fixtures" / "llava_uhd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*ORIGINAL, "--image", "missing.jpg"), "missing.jpg"),
        ((*ORIGINAL, "--output", "no/such/folder/report.html"), "does not exist"),
        ((*ORIGINAL, "--output", "."), "is a folder"),
        (("--model", "no/such/model"), "no/such/model"),
        (("--model", UHD / "original_checkpoint", "--vision-tower", UHD / "clip_vision_tower"), "has no router"),
    ],
    ids=["image", "folder", "output", "model", "dense"],
)
def test_command_errors_are_one_clear_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = () if "--output" in arguments else ("--output", "report.html")
    result = routing(*arguments, *RUN, *output)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") or "Error: " in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_entropy_of_an_undecided_router_is_the_logarithm_of_the_experts():
    model = make_model()
    for layer in model.config.text_config.moe_layers:
        nn.init.zeros_(model.model.language_model.layers[layer].mlp.gate.weight)
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(recorder.entropies(), torch.full((3,), math.log(4), dtype=torch.float64))
    assert torch.equal(recorder.loads(), torch.tensor([[1.0, 0, 0, 0]] * 3, dtype=torch.float64))
