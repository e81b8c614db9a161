"""The demo's answers without a browser: they stream, stop, know the conversation, and do not mix their routing."""

import gc
import itertools
import json
import re
import socket
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from llava_family import cli
from llava_family.demo import panels
from llava_family.demo.chat import Chat, read_image
from llava_family.demo.page import add_question, answer_question, check_port, drop_answer, read_conversation
from llava_family.demo.panels import ROUTING_EMPTY, ROUTING_PENDING, VIEWS_EMPTY
from llava_family.generating import decoding_config
from llava_family.inspection.routing_plots import plot_image_routing


ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "examples" / "miniature" / "checkpoints"
PICTURES = ROOT / "examples" / "images" / "miniature"
QUESTIONS = json.loads((PICTURES / "questions.json").read_text("utf-8"))
MINIATURES = {"uhd": "llava-uhd-miniature", "moe": "moe-llava-miniature", "mole": "llava-mole-miniature"}
# Of the original's layout
RANDOM = ROOT / "tests" / "fixtures" / "moe_llava" / "phi_clip336" / "original_checkpoint"
NUM_TOKENS = 400
RED, GREEN = "What number is written?", "What colour is the cross?"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chats():
    """One of every family, by its group of questions."""
    folders = {name: CHECKPOINTS / miniature for name, miniature in MINIATURES.items()}
    return {
        name: Chat(AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder))
        for name, folder in folders.items()
    }


@pytest.fixture
def endless():
    """A chat with a random MoE-LLaVA that never ends by itself, and what counts its forward passes."""
    model, passes = AutoModelForImageTextToText.from_pretrained(RANDOM), []
    model.generation_config.eos_token_id = None
    model.register_forward_hook(lambda *_: passes.append(None))
    torch.manual_seed(0)
    chat = Chat(model, AutoProcessor.from_pretrained(RANDOM))
    yield chat, passes
    chat.stop()


def user(question, *pictures):
    files = [{"type": "file", "file": {"path": str(PICTURES / picture)}} for picture in pictures]
    return {"role": "user", "content": [*files, {"type": "text", "text": question}]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def ask(chat, *history, max_new_tokens=8, temperature=0.0):
    return list(chat.answer(read_conversation(history), max_new_tokens, temperature))


def pictures_in(html):
    """Alternative texts of the pictures, each of which has data."""
    return re.findall(r'<img (?:class="view" )?alt="([^"]+)" src="data:image/png;base64,\w', html)


def generation_threads():
    return [thread for thread in threading.enumerate() if thread.name == "generation"]


@pytest.mark.parametrize("group", MINIATURES)
def test_answers_are_right_and_stream(chats, group):
    for item in QUESTIONS[group][:2]:
        updates = ask(chats[group], user(item["question"], item["image"]))
        texts = [update.text for update in updates]
        assert texts[0] == "" and texts[-1] == item["answer"]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert not generation_threads()


def test_text_comes_while_it_is_generated(endless):
    chat, passes = endless
    answer = chat.answer(read_conversation([user(RED, "skill_0.png")]), NUM_TOKENS, 1.0)
    texts = [update.text for update in itertools.islice(answer, 3)]
    answer.close()
    assert texts[0] == "" and len(texts[1]) < len(texts[2])
    assert len(passes) < NUM_TOKENS


@pytest.mark.parametrize("group", MINIATURES)
def test_panels(chats, group):
    names = [item["image"] for item in QUESTIONS[group][:2]]
    updates = ask(chats[group], user(RED, *names))
    views = "its slices and its overview" if group == "uhd" else "as the square view that is encoded"
    assert [name.split(views)[0].rstrip(" :") for name in pictures_in(updates[0].views)] == ["Image 1", "Image 2"]
    assert updates[0].views.count('class="view"') == (0 if group == "uhd" else len(names))  # which is drawn smaller
    assert all(update.views is None for update in updates[1:])
    if group == "uhd":
        assert all(update.routing is None for update in updates)
        return
    assert updates[0].routing == ROUTING_PENDING
    assert all(update.routing is None for update in updates[1:-1])
    assert [name[:8] for name in pictures_in(updates[-1].routing)] == ["Image 1:", "Image 2:", "Stacked "]
    # Those of the views that are there already are not drawn again; the routing is that of the whole conversation.
    later = ask(chats[group], user(RED, *names), assistant("5"), user("And now?"))
    assert all(update.views is None for update in later)
    assert len(pictures_in(later[-1].routing)) == 3


def test_maps_are_those_of_their_images(chats, monkeypatch):
    drawn, names = [], [item["image"] for item in QUESTIONS["moe"][:2]]

    def plot(image, recorder, image_index):
        drawn.append((image, image_index))
        return plot_image_routing(image, recorder, image_index)

    monkeypatch.setattr(panels, "plot_image_routing", plot)
    ask(chats["moe"], user(RED, *names))
    pixels = [Image.open(PICTURES / name).convert("RGB").tobytes() for name in names]
    assert [(image.tobytes(), index) for image, index in drawn] == [(pixels[0], 0), (pixels[1], 1)]


def test_text_alone(chats):
    assert ask(chats["uhd"], user("Hello?"))[0].views is None
    updates = ask(chats["moe"], user("Hello?"))
    assert [name[:8] for name in pictures_in(updates[-1].routing)] == ["Stacked "]


def test_the_model_gets_the_conversation(chats, monkeypatch):
    chat, prompts = chats["moe"], []
    generate = chat.model.generate
    monkeypatch.setattr(chat.model, "generate", lambda **inputs: prompts.append(inputs) or generate(**inputs))
    failed = {**assistant("Error: no memory"), "metadata": {"id": "error"}}
    history = [user(RED, "skill_0.png", "skill_1.png"), assistant("52"), user("Why?", "skill_2.png"), failed]
    ask(chat, *history, user(GREEN, "skill_3.png"))
    (inputs,) = prompts
    image = "<image>" * chat.processor.num_image_tokens
    expected = f"USER: {image}\n{image}\n{RED} ASSISTANT: 52</s>USER: {image}\n{GREEN} ASSISTANT:"
    text = chat.processor.tokenizer.decode(inputs["input_ids"][0])
    # Decoders differ in their spaces.
    assert text.replace(" ", "").endswith(expected.replace(" ", "")), text
    own = chat.processor.image_processor(
        [Image.open(PICTURES / f"skill_{index}.png") for index in (0, 1, 3)], return_tensors="pt"
    )
    assert torch.equal(inputs["pixel_values"], own["pixel_values"])
    assert not inputs["generation_config"].do_sample


def test_a_closed_answer_stops_the_model(endless):
    chat, passes = endless
    answer = chat.answer(read_conversation([user(RED, "skill_0.png")]), NUM_TOKENS, 1.0)
    next(update for update in answer if update.text)
    answer.close()
    for thread in generation_threads():
        thread.join(20)
        assert not thread.is_alive()
    assert 1 <= len(passes) < NUM_TOKENS


def test_an_answer_that_nobody_wants_makes_way(endless):
    """Of a user who has left, gradio drops the iterator."""
    chat, passes = endless
    answer = chat.answer(read_conversation([user(RED, "skill_0.png")]), NUM_TOKENS, 1.0)
    next(answer)
    del answer
    ask(chat, user(GREEN, "skill_1.png"), max_new_tokens=1)
    assert len(passes) < NUM_TOKENS and not generation_threads()


def test_two_users_do_not_mix(chats):
    chat = chats["moe"]
    histories = [[user(RED, "skill_0.png")], [user(GREEN, "skill_1.png", "skill_2.png")]]
    alone = [ask(chat, *history)[-1] for history in histories]
    assert alone[0].routing != alone[1].routing
    together = [None] * 6
    barrier = threading.Barrier(len(together))

    def run(index):
        barrier.wait()
        together[index] = ask(chat, *histories[index % 2])[-1]

    threads = [threading.Thread(target=run, args=[index]) for index in range(len(together))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, update in enumerate(together):
        assert update == alone[index % 2], index


def test_questions_leave_nothing_behind(chats):
    chat = chats["mole"]

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts, passes = [], []
    for _ in range(4):
        ask(chat, user(RED, "clinic_0.png"))
        hooks = sum(len(module._forward_hooks) for module in chat.model.modules())
        counts.append((tensors(), threading.active_count(), hooks))
        passes.append(len(chat.recorder.image_lengths))
    assert len(set(counts[1:])) == 1, counts
    assert passes == [1] * 4


def test_retry_asks_the_same_again(chats):
    history = [user(RED, "elongated_0.png"), assistant("93"), user("Again?"), assistant("17"), assistant("18")]
    assert drop_answer(history)[1] == history[:3]
    first, second = (list(answer_question(chats["uhd"], history[:1], 8, 0.0))[-1][0] for _ in range(2))
    assert first == second and first[-1]["content"] == "93"


def test_temperature_samples(chats):
    torch.manual_seed(0)  # one answer has more than half of the probability
    answers = {ask(chats["uhd"], user(RED, "elongated_0.png"), temperature=2.0)[-1].text for _ in range(8)}
    assert len(answers) > 1


def test_decoding_leaves_the_models_settings(chats):
    model = chats["uhd"].model
    before = model.generation_config.to_dict()
    sampled, greedy = decoding_config(model, 5, 0.7), decoding_config(model, 6, 0)
    assert (sampled.do_sample, sampled.temperature, sampled.max_new_tokens) == (True, 0.7, 5)
    assert (greedy.do_sample, greedy.temperature, greedy.max_new_tokens) == (False, None, 6)
    assert model.generation_config.to_dict() == before


def test_bad_images_are_answered(chats, tmp_path, monkeypatch):
    whole = (PICTURES / "skill_0.png").read_bytes()
    text, truncated, bomb = (tmp_path / name for name in ("notes.png", "half.png", "bomb.png"))
    text.write_text("not an image")
    truncated.write_bytes(whole[: len(whole) // 2])
    Image.new("L", (40, 30)).save(bomb)
    cases = {text: "is not an image", truncated: "cannot be read", bomb: "decompression bomb"}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for path, reason in cases.items():
        question = user(RED, path)
        (update,) = answer_question(chats["moe"], [question], 8, 0.0)
        history, _, routing = update
        assert history[0] == question and routing == ROUTING_EMPTY
        assert history[1]["content"].startswith("Error: ") and reason in history[1]["content"]
        assert path.name in history[1]["content"] and "BytesIO" not in history[1]["content"]
        with pytest.raises(ValueError, match=reason):
            read_image(path)
    monkeypatch.undo()
    # The page goes on, and the question that failed is not the model's.
    history = [history[0], {**history[1], "content": [{"type": "text", "text": history[1]["content"]}]}]
    *_, last = answer_question(chats["moe"], [*history, user(GREEN, "skill_1.png")], 8, 0.0)
    assert last[0][-1]["content"] == "green"


def test_a_failing_generation_is_answered(chats, monkeypatch):
    chat = chats["moe"]

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(chat.model.get_output_embeddings(), "forward", fail)
        *_, (history, _, routing) = answer_question(chat, [user(RED, "skill_0.png")], 8, 0.0)
    assert history[-1]["content"] == "Error: RuntimeError: out of memory"
    assert history[-1]["metadata"]["id"] == "error" and routing == ROUTING_EMPTY
    assert ask(chat, user(RED, "skill_0.png"))[-1].text == "52"


def test_an_answer_without_text_is_said_to_be_one(chats):
    question = user(RED, "elongated_0.png")
    *_, (history, _, _) = answer_question(chats["uhd"], [question], 1, 0.0)  # a space
    assert history[-1]["content"] == "(an answer without text)"
    answer = {**assistant(history[-1]["content"]), "metadata": history[-1]["metadata"]}
    assert read_conversation([question, answer, user(GREEN)])[1]["content"] == assistant("")["content"]


def test_a_question_needs_words():
    with pytest.raises(Exception, match="Type a question"):
        add_question({"text": " ", "files": ["a.png"]}, [])
    _, history = add_question({"text": " Why? ", "files": ["/tmp/a.png"]}, [assistant("5")])
    assert history[1:] == [{"role": "user", "content": [{"path": "/tmp/a.png", "alt_text": "a.png"}, "Why?"]}]
    assert VIEWS_EMPTY  # what the page begins with


def demo(*arguments):
    return CliRunner().invoke(cli.app, ["demo", "--model", str(CHECKPOINTS / MINIATURES["uhd"]), *arguments])


def test_missing_gradio_is_one_clear_message(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "gradio" else name)
    result = demo()
    assert result.exit_code == 1 and "pip install 'llava-family[demo]'" in result.stderr
    assert "Traceback" not in result.output


def test_taken_port_is_one_clear_message():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = demo("--port", str(port))
    assert result.exit_code == 1 and f"Port {port} of '127.0.0.1'" in result.stderr and "--port" in result.stderr
    assert check_port("127.0.0.1", 0) > 0
