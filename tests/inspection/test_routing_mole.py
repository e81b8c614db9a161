"""Recorded routing of LoRA experts, of the model family and of PEFT adapters, and routing by domain of the data."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from typer.testing import CliRunner

from llava_family.cli import app
from llava_family.inspection.routing import RoutingRecorder
from llava_family.inspection.routing_plots import image_expert_maps, plot_domain_routing
from llava_family.inspection.routing_report import write_routing_report
from llava_family.llava_mole.configuration_llava_mole import LlavaMoleConfig, LlavaMoleTextConfig
from llava_family.llava_mole.image_processing_pil_llava_mole import LlavaMoleImageProcessorPil
from llava_family.llava_mole.layers_llava_mole import MoleRouter
from llava_family.llava_mole.modeling_llava_mole import LlavaMoleForCausalLM
from llava_family.llava_mole.processing_llava_mole import LlavaMoleProcessor
from llava_family.llava_uhd.configuration_llava_uhd import LlavaUhdVisionConfig
from llava_family.mole import MoleConfig, get_mole_model


VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
IMAGE_TOKEN, PAD_TOKEN = 99, 0


def randomise(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 1)
    return model.eval()


def make_model(vision_encoding="square", text_config=None, **kwargs):
    vision_class = CLIPVisionConfig if vision_encoding == "square" else LlavaUhdVisionConfig
    config = LlavaMoleConfig(
        text_config=text_config or LlavaMoleTextConfig(**TEXT, r=2, **kwargs),
        vision_config=vision_class(**VISION),
        vision_encoding=vision_encoding,
        num_queries=4,
    )
    return randomise(LlavaMoleForCausalLM(config))


def make_inputs(vision_encoding="square"):
    """Two images in the first row, one in the second, padded on the left; or one of two slices, and one uncut."""
    pixels = torch.Generator().manual_seed(1)
    if vision_encoding == "square":
        image = [IMAGE_TOKEN] * 18
        first, second = [5, *image, 6, *image, 7, 8], [9, *image, 10]
        input_ids = torch.tensor([first, [PAD_TOKEN] * (len(first) - len(second)) + second])
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != PAD_TOKEN).long(),
            "pixel_values": torch.randn(3, 3, 56, 56, generator=pixels),
        }
    view = [IMAGE_TOKEN] * 4
    cut = [IMAGE_TOKEN, *view, 3, *view, 4, *view, IMAGE_TOKEN]
    return {
        "input_ids": torch.tensor([[5, *cut, 6, IMAGE_TOKEN, *view, IMAGE_TOKEN, 7]]),
        "pixel_values": torch.randn(4 * 16, 3 * 14 * 14, generator=pixels),
        "image_grids": torch.tensor([[[1, 2], [4, 4], [4, 4]], [[0, 0], [0, 0], [4, 4]]]),
    }


ENCODINGS = {"square": [18, 18, 18], "slices": [14, 6]}
TOKENS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def recorded(model):
    """Images for "general", two rows of text for "document", and a pass without a domain."""
    with RoutingRecorder(model) as recorder, torch.no_grad():
        with recorder.domain("general"):
            model(**make_inputs())
        with recorder.domain("document"):
            model(input_ids=torch.arange(1, 41).reshape(2, 20))
        model(input_ids=TOKENS)
    return recorder


def logits_of(model, **inputs):
    """Router logits by the model's own way, `(layers, tokens, experts)`."""
    with torch.no_grad():
        return torch.stack([x.flatten(0, 1) for x in model(**inputs, output_router_logits=True).router_logits])


def shares(logits):
    return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double().mean(1)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("routing", ["top1", "dense"])
def test_counts_are_exact(encoding, routing):
    model, inputs = make_model(encoding, routing=routing), make_inputs(encoding)
    passed = []
    for layer in model.model.language_model.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args: passed.append(args[1].flatten(0, 1)))
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(**inputs)
    weights = torch.stack(passed)
    logits, ids = logits_of(model, **inputs), inputs["input_ids"].flatten()
    masks = {"image": ids == IMAGE_TOKEN, "text": (ids != IMAGE_TOKEN) & (ids != PAD_TOKEN), None: ids != PAD_TOKEN}
    for modality, mask in masks.items():
        assert recorder.num_tokens(modality) == mask.sum()
        assert torch.equal(recorder.loads(modality), shares(logits[:, mask]))
        assert torch.equal(recorder.loads(modality, top_k=True), recorder.loads(modality))
        assert torch.equal(recorder.pathways(modality), logits[:, mask].argmax(-1).T)
        probabilities = logits[:, mask].double().softmax(-1).mean(1)
        torch.testing.assert_close(recorder.mean_probabilities(modality), probabilities)
        # what the experts are run with
        run = recorder.mean_probabilities(modality) if routing == "dense" else recorder.loads(modality)
        torch.testing.assert_close(run, weights[:, mask].double().mean(1), atol=1e-6, rtol=0)
    assert recorder.is_dense == (routing == "dense")
    assert recorder.layer_indices == [0, 1, 2] and recorder.num_experts == 3
    assert recorder.image_lengths == ENCODINGS[encoding]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("adapted", [False, True])
def test_generate(encoding, num_beams, adapted):
    model, inputs = make_model(encoding), make_inputs(encoding)
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*self_attn\.q_proj"))
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": num_beams}
    expected = model.generate(**inputs, **options)
    with RoutingRecorder(model) as recorder:
        generated = model.generate(**inputs, **options)
    assert torch.equal(generated, expected)
    ids = inputs["input_ids"]
    text = int(((ids != IMAGE_TOKEN) & (ids != PAD_TOKEN)).sum())
    assert recorder.num_tokens("image") == num_beams * (ids == IMAGE_TOKEN).sum()
    assert recorder.num_tokens("padding") == num_beams * (ids == PAD_TOKEN).sum()
    assert recorder.num_tokens("text") == num_beams * (text + 2 * len(ids))  # the last new token is never fed
    if num_beams == 1:
        assert recorder.image_lengths == ENCODINGS[encoding]
    if num_beams == len(ids) == 1 and not adapted:
        whole = logits_of(model, **{**inputs, "input_ids": generated[:, :-1]})
        assert torch.equal(recorder.pathways(), whole.argmax(-1).T)


def test_maps_leave_out_start_and_end():
    model, inputs = make_model(), make_inputs()
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(**inputs)
    chosen = logits_of(model, **inputs).argmax(-1)
    experts = image_expert_maps(recorder, (50, 40), image_index=1)["view"]
    assert np.array_equal(experts.reshape(3, 16), chosen[:, 21:37])  # 5, image, 6, start

    model, inputs = make_model("slices"), make_inputs("slices")
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(**inputs)
    chosen = logits_of(model, **inputs).argmax(-1).numpy()[0]
    maps = image_expert_maps(recorder, (112, 56))
    left, right, overview = chosen[2:6], chosen[7:11], chosen[12:16]
    assert maps["slices"][0].tolist() == [[*left[:2], *right[:2]], [*left[2:], *right[2:]]]
    assert maps["overview"][0].ravel().tolist() == overview.tolist()
    uncut = image_expert_maps(recorder, (56, 56), image_index=1)
    assert uncut["overview"][0].ravel().tolist() == chosen[19:23].tolist()
    with pytest.raises(ValueError, match="56x56 pixels has 4 tokens, but 12"):
        image_expert_maps(recorder, (56, 56))


@pytest.mark.parametrize("how", ["trained whole", "adapted by LoRA"])
def test_routers_that_peft_changes(how):
    model = make_model()
    changes = {"modules_to_save": ["mole_router"]} if how == "trained whole" else {"init_lora_weights": False}
    targets = "q_proj" if how == "trained whole" else "mole_router"
    adapted = get_peft_model(model, LoraConfig(target_modules=rf".*language_model.*\.{targets}", **changes))
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name or "lora_B" in name:
            nn.init.normal_(parameter)
    seen = []
    for layer in model.model.language_model.layers:
        layer.mlp.mole_router.register_forward_hook(lambda *args: seen.append(args[-1].flatten(0, 1)))
    recorder = RoutingRecorder(adapted)
    with recorder, torch.no_grad():
        adapted(input_ids=TOKENS)
    assert recorder.layer_indices == [0, 1, 2] and recorder.num_tokens("text") == 3
    assert torch.equal(recorder.pathways(), torch.stack(seen).argmax(-1).T)
    torch.testing.assert_close(recorder.mean_probabilities(), torch.stack(seen).double().softmax(-1).mean(1))


class TunedMLP(nn.Module):
    """A feed-forward network as a tuner leaves it: routers by the adapters' names, of which one is active."""

    def __init__(self, mlp, adapters):
        super().__init__()
        self.base_layer, self.active = mlp, next(iter(adapters))
        hidden_size = mlp.hidden_size
        self.mole_router = nn.ModuleDict({name: MoleRouter(hidden_size, num) for name, num in adapters.items()})
        self.seen = []

    def forward(self, hidden_states):
        if self.active is not None:
            self.seen.append(self.mole_router[self.active](hidden_states).flatten(0, 1))
        return self.base_layer(hidden_states)


def tune(model, layers, adapters):
    """Adds routers to some layers, and wraps the model; returns it and the changed networks."""
    for layer in layers:
        layer.mlp = TunedMLP(layer.mlp, adapters)
    adapted = get_peft_model(randomise(model), LoraConfig(target_modules=r".*layers.*\.q_proj"))
    return adapted, [layer.mlp for layer in layers]


def make_llama(num_layers=3, **kwargs):
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": num_layers}, **kwargs))


def test_adapter_of_a_text_model():
    # A number of experts per token is that of the text model's own experts, if it has any.
    llama = make_llama(num_experts_per_tok=2)
    adapted, tuned = tune(llama, llama.model.layers[1:], {"default": 4})
    input_ids = torch.tensor([[5, 6, 99 - 1, 7], [PAD_TOKEN, PAD_TOKEN, 8, 9]])
    recorder = RoutingRecorder(adapted)
    with recorder:
        adapted.generate(
            input_ids=input_ids, attention_mask=(input_ids != PAD_TOKEN).long(), max_new_tokens=3, do_sample=False
        )
    assert recorder.layer_indices == [1, 2] and recorder.num_experts == 4
    assert recorder.num_tokens("text") == recorder.num_tokens() == 6 + 2 * 2
    assert recorder.num_tokens("padding") == 2 and recorder.num_tokens("image") == 0
    is_real = torch.cat([input_ids.flatten() != PAD_TOKEN, torch.ones(4, dtype=torch.bool)])
    logits = torch.stack([torch.cat(mlp.seen) for mlp in tuned])[:, is_real]
    assert torch.equal(recorder.loads("text"), shares(logits))
    assert torch.equal(recorder.loads(top_k=True), recorder.loads())
    assert not recorder.is_dense and recorder.image_lengths == []
    with pytest.raises(ValueError, match="model is a 'llama'"):
        image_expert_maps(recorder, (50, 40))
    adapted.peft_config["default"].routing = "dense"
    assert RoutingRecorder(adapted).is_dense


def test_one_of_several_adapters_is_recorded():
    llama = make_llama()
    adapted, tuned = tune(llama, llama.model.layers, {"first": 3, "second": 5})
    for adapter in (None, "third"):
        with pytest.raises(ValueError, match=rf"\['first', 'second'\], but is {adapter!r}"):
            RoutingRecorder(adapted, adapter=adapter)
    first, second = (RoutingRecorder(adapted, adapter=name) for name in ("first", "second"))
    with first, second, torch.no_grad():
        for active, num_passes in (("first", 1), ("second", 2), (None, 4)):
            for mlp in tuned:
                mlp.active = active
            for _ in range(num_passes):
                adapted(input_ids=TOKENS)
    assert first.num_tokens() == 3 and first.num_experts == 3
    assert second.num_tokens() == 6 and second.num_experts == 5


@pytest.mark.parametrize("routing", ["top1", "dense"])
def test_adapter_of_the_tuner(routing):
    def run(**kwargs):
        with torch.no_grad():
            adapted(**kwargs)

    settings = {"routing": routing, "r": 2, "num_experts": 3}
    adapted = get_mole_model(make_llama(), MoleConfig(**settings)).eval()
    recorder = RoutingRecorder(adapted)
    with recorder:
        run(input_ids=TOKENS)
        with adapted.disable_adapter():
            run(input_ids=TOKENS)
    assert recorder.num_tokens("text") == 3 and recorder.layer_indices == [0, 1, 2]
    assert recorder.num_experts == 3 and recorder.is_dense == (routing == "dense")

    adapted.add_adapter("other", MoleConfig(**{**settings, "num_experts": 5}))
    other = RoutingRecorder(adapted, adapter="other")
    with recorder, other:
        run(input_ids=TOKENS)
        adapted.set_adapter("other")
        run(input_ids=TOKENS[:, :1])
    assert recorder.num_tokens() == 6
    assert other.num_tokens() == 1 and other.num_experts == 5


def test_adapter_of_a_vision_language_model():
    model = make_model(text_config=LlamaConfig(**TEXT))
    adapted, _ = tune(model, model.model.language_model.layers, {"default": 3})
    with RoutingRecorder(adapted) as recorder, torch.no_grad():
        adapted(**make_inputs())
    assert recorder.num_tokens("image") == 3 * 18 and recorder.num_tokens("text") == 6
    assert recorder.image_lengths == [18] * 3

    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION), image_token_index=98
    )
    llava = LlavaForConditionalGeneration(config)
    adapted, _ = tune(llava, llava.model.language_model.layers, {"default": 3})
    with RoutingRecorder(adapted) as recorder, torch.no_grad():
        adapted(input_ids=torch.tensor([[5, *[98] * 16, 7]]), pixel_values=make_inputs()["pixel_values"][:1])
    assert recorder.num_tokens("image") == 16 and recorder.num_tokens("text") == 2
    assert recorder.image_lengths == []  # whose images have other shapes
    with pytest.raises(ValueError, match="model is a 'llava'"):
        image_expert_maps(recorder, (50, 40))


def test_what_is_no_whole_model(model):
    llama = make_llama(num_layers=1)
    adapted, tuned = tune(llama, llama.model.layers, {"default": 3})
    tuned[0].config = llama.config  # as Llama's own networks have it
    with RoutingRecorder(adapted) as recorder, torch.no_grad():
        llama.model(TOKENS)  # without the head, by position
    assert recorder.num_tokens("text") == 3
    with pytest.raises(ValueError, match="LlavaMoleTextModel has none"):
        RoutingRecorder(model.model.language_model)
    with pytest.raises(ValueError, match="LlamaDecoderLayer takes `input_ids`"):
        RoutingRecorder(llama.model.layers[0])


def test_readings_by_domain(model, recorded):
    assert recorded.domains == ["general", "document"]
    inputs = {"general": make_inputs(), "document": {"input_ids": torch.arange(1, 41).reshape(2, 20)}}
    for domain, arguments in inputs.items():
        with RoutingRecorder(model) as alone, torch.no_grad():
            model(**arguments)
        assert recorded.num_tokens(domain=domain) == alone.num_tokens()
        for modality in ("text", None):
            for read in ("loads", "mean_probabilities", "entropies", "pathways"):
                expected = getattr(alone, read)(modality)
                assert torch.equal(getattr(recorded, read)(modality, domain=domain), expected), read
    assert recorded.num_tokens() == 60 + 40 + 3
    assert recorded.num_tokens("image", domain="general") == 54
    assert recorded.num_tokens("image", domain="document") == 0
    assert recorded.num_tokens("padding", domain="general") == 20


def test_domains_nest_and_end(model):
    recorder = RoutingRecorder(model)
    with torch.no_grad(), recorder.domain("around"), recorder:
        model(input_ids=TOKENS)
        with recorder.domain("inner"):
            model(input_ids=TOKENS[:, :1])
            with pytest.raises(ZeroDivisionError), recorder.domain("fails"):
                raise ZeroDivisionError
            model(input_ids=TOKENS[:, :1])
        model(input_ids=TOKENS)
    with torch.no_grad(), recorder:
        model(input_ids=TOKENS)
        assert recorder.domains == ["around", "inner"]
    assert recorder.num_tokens(domain="around") == 6 and recorder.num_tokens(domain="inner") == 2
    assert recorder.num_tokens() == 11
    recorder.clear()
    assert recorder.domains == [] and recorder.num_tokens() == 0


def test_domains_of_threads_are_kept_apart(model):
    recorder, barrier = RoutingRecorder(model), threading.Barrier(3, timeout=30)

    def run(domain, input_ids):
        with torch.no_grad(), recorder.domain(domain):
            barrier.wait()
            for _ in range(10):
                model(input_ids=input_ids)
            barrier.wait()

    with recorder, torch.no_grad():
        threads = [
            threading.Thread(target=run, args=arguments)
            for arguments in (("one", TOKENS[:, :1]), ("two", TOKENS[:, :2]))
        ]
        for thread in threads:
            thread.start()
        barrier.wait()
        model(input_ids=TOKENS)
        barrier.wait()
        for thread in threads:
            thread.join()
    assert recorder.num_tokens(domain="one") == 10 and recorder.num_tokens(domain="two") == 20
    assert recorder.num_tokens() == 33


def test_errors_about_domains(model, recorded):
    for read in ("loads", "mean_probabilities", "entropies", "pathways", "num_tokens"):
        with pytest.raises(ValueError, match=r"\['general', 'document'\] or None, but is 'medical'"):
            getattr(recorded, read)(domain="medical")
    with pytest.raises(ValueError, match="modality 'image' was recorded in domain 'document'"):
        recorded.loads("image", domain="document")
    for name in ("", None, 3):
        with pytest.raises(ValueError, match=re.escape(f"is {name!r}")), recorded.domain(name):
            pass
    empty = RoutingRecorder(model)
    with pytest.raises(ValueError, match="none was recorded"):
        empty.num_tokens(domain="general")
    with pytest.raises(ValueError, match="No domain was recorded"):
        plot_domain_routing(empty)


def widths(axes):
    """Widths of an axes' bars by their places, drawn one after the other."""
    bars = {}
    for container in axes.containers:
        for bar in container:
            place = round(bar.get_y() + bar.get_height() / 2)
            assert bar.get_x() == pytest.approx(sum(bars.get(place, ())))
            bars.setdefault(place, []).append(bar.get_width())
    return bars


@pytest.mark.parametrize("weights", [False, True])
def test_figure_by_domain(recorded, weights, tmp_path):
    figure = plot_domain_routing(recorded, tmp_path / "figure.png", layers=[2, 0], weights=weights)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in figure.axes] == ["Layer 2", "Layer 0"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["general (60)", "document (40)"]
    assert figure.axes[0].get_xlabel() == ("mean weight for tokens" if weights else "share of tokens")
    read = recorded.mean_probabilities if weights else recorded.loads
    for axes, layer in zip(figure.axes, (2, 0), strict=True):
        bars = widths(axes)
        for place, domain in enumerate(recorded.domains):
            expected = read(domain=domain)[layer].tolist()
            assert bars[place] == pytest.approx(expected)
            shown = [text.get_text() for text in axes.texts if round(text.get_position()[1]) == place]
            assert shown == [f"{share:.0%}" for share in expected if share >= 0.13]


@pytest.mark.slow
def test_figure_by_domain_of_a_modality_and_of_many_layers(recorded):
    figure = plot_domain_routing(recorded, modality="image")
    assert len(figure.axes) == 3
    for layer, axes in enumerate(figure.axes):
        expected = recorded.loads("image", domain="general")[layer].tolist()
        assert widths(axes) == {0: pytest.approx(expected)}
        assert axes.texts[-1].get_text() == "none recorded"
    for layers in ([], [0, 7]):
        with pytest.raises(ValueError, match=re.escape(f"[0, 1, 2], but is {layers}")):
            plot_domain_routing(recorded, layers=layers)

    model = make_model(text_config=LlavaMoleTextConfig(**{**TEXT, "num_hidden_layers": 32}, num_experts=2, r=1))
    with RoutingRecorder(model) as recorder, torch.no_grad(), recorder.domain("from $1 to $2"):
        model(input_ids=TOKENS)
    figure = plot_domain_routing(recorder)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"Layer {layer}" for layer in (0, 4, 9, 13, 18, 22, 27, 31)]
    assert figure.axes[0].get_yticklabels()[0].get_parse_math() is False


@pytest.mark.slow
def test_report(recorded, tmp_path):
    document = write_routing_report(recorded, tmp_path / "report.html").read_text(encoding="utf-8")
    assert document.count("<img") == 4 and "Loads by domain" in document and "dense" not in document
    share = recorded.loads(domain="document")[1, 2]
    table = document[document.index("<caption>Domain document</caption>") :]
    assert f"<td>{share:.1%}</td>" in table[: table.index("</table>")]

    model = make_model(routing="dense")
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(input_ids=TOKENS)
        document = write_routing_report(recorder, tmp_path / "dense.html").read_text(encoding="utf-8")
        assert document.count("<img") == 3 and "Loads by domain" not in document
        table = document[document.index("<caption>All tokens: weights</caption>") :]
        assert f"<td>{recorder.mean_probabilities()[2, 1]:.1%}</td>" in table[: table.index("</table>")]
        with recorder.domain("<b>"):
            model(input_ids=TOKENS)
    document = write_routing_report(recorder, tmp_path / "domain.html").read_text(encoding="utf-8")
    assert document.count("<img") == 5 and "<caption>Domain &lt;b&gt;</caption>" in document


FIXTURES = Path(__file__).parents[1] / "fixtures" / "llava_mole"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_command(encoding, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    tokenizer = LlamaTokenizer.from_pretrained(FIXTURES / "original_checkpoint" / "vicuna-7b-v1.5")
    size = {"height": 56, "width": 56}
    image_processor = LlavaMoleImageProcessorPil(
        size=size, crop_size=size, base_size=56, patch_size=14, vision_encoding=encoding
    )
    processor = LlavaMoleProcessor(image_processor, tokenizer, num_image_tokens=18, num_queries=4)
    processor.save_pretrained(tmp_path / "model")
    vocab_size = tokenizer.convert_tokens_to_ids("<image>")
    model = make_model(encoding, LlavaMoleTextConfig(**{**TEXT, "vocab_size": vocab_size}, r=2))
    model.save_pretrained(tmp_path / "model")

    output = tmp_path / "report.html"
    image = FIXTURES / "images" / "img0.png"
    options = ("--prompt", "What is this?", "--max-new-tokens", "2", "--dtype", "float32", "--device", "cpu")
    arguments = ("--model", tmp_path / "model", "--image", image, "--output", output, *options)
    result = CliRunner().invoke(app, ["routing", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "Expert 2" in result.stdout and "text / image" in result.stdout
    document = output.read_text(encoding="utf-8")
    assert document.count("<img") == 4 and "First-choice expert of every image token." in document
    if encoding == "square":
        assert "18 image" in document
