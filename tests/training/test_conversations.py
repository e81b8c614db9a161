"""Samples as they come: two formats, files and objects, good ones and every kind of bad one."""

import json
import logging
import pickle

import pytest
from PIL import Image, ImageChops

from llava_family.training import BadSample, ConversationDataset

from .tiny import picture, tiny_samples


QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A tree."}


def sample(*turns, **kwargs):
    return {"id": "7", "image": "a.png", "conversations": list(turns or (QUESTION, ANSWER)), **kwargs}


def text(value):
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}
EXPECTED = [
    {"role": "user", "content": [IMAGE, text("What is it?")]},
    {"role": "assistant", "content": [text("A tree.")]},
]


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    picture(1).save(images / "a.png")
    picture(2).save(images / "sub" / "b.jpg")
    (images / "text.png").write_text("not an image")
    (images / "empty.png").write_bytes(b"")
    (tmp_path / "outside.png").write_bytes((images / "a.png").read_bytes())
    return images


def test_llava_format(folder):
    dataset = ConversationDataset([sample()], folder)
    (item,) = (dataset[index] for index in range(len(dataset)))
    assert item["id"] == "7" and item["messages"] == EXPECTED
    (image,) = item["images"]
    assert image.mode == "RGB" and image.tobytes() == picture(1).tobytes()
    assert dataset.bad_samples == []


@pytest.mark.parametrize(
    "messages",
    [
        EXPECTED,
        [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A tree."}],
        [
            {"role": "user", "content": [text("What is it?"), IMAGE]},
            {"role": "assistant", "content": [text("A tree.")]},
        ],
        # datasets fills keys with None
        [
            {"role": "user", "content": [{**IMAGE, "text": None}, {**text("What is it?"), "image": None}]},
            {"role": "assistant", "content": [text("A tree.")]},
        ],
    ],
)
@pytest.mark.parametrize("images", [{"image": "a.png"}, {"images": ["a.png"]}, {"image": picture(1)}])
def test_chat_format(folder, messages, images):
    item = ConversationDataset([{"messages": messages, "conversations": None, **images}], folder)[0]
    assert item["id"] == "0" and item["messages"] == EXPECTED
    assert item["images"][0].tobytes() == picture(1).tobytes()


def test_text_and_many_images_and_a_system_message(folder):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Compare <image> with\n<image>"},
        ANSWER,
        {"from": "human", "value": " And now? "},
        ANSWER,
    ]
    dataset = ConversationDataset(
        [sample(*turns, image=["a.png", "sub/b.jpg"]), sample(*turns[3:], image=None)], folder
    )
    system, question, _, followed, _ = dataset[0]["messages"]
    assert system == {"role": "system", "content": [text("Be brief.")]}
    assert question["content"] == [IMAGE, IMAGE, text("Compare  with")]  # images first, the rest as it is
    assert followed["content"] == [text(" And now? ")]  # as in the original, only a message with images is stripped
    assert [image.size for image in dataset[0]["images"]] == [picture(1).size, picture(2).size]
    assert dataset[1]["images"] == []
    # 2 + 2 + 2 + 2 + 2 words and two images; 2 + 2 words without any
    assert dataset.modality_lengths == [10 + 2 * 128, -4]


def test_transparent_images_lie_on_white(folder):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    actual = ConversationDataset([sample(image=image)])[0]["images"][0]
    assert ImageChops.difference(actual, Image.new("RGB", (4, 4), "white")).getbbox() is None


@pytest.mark.parametrize("write", ["json", "jsonl"])
def test_files(folder, tmp_path, write):
    samples = [sample(id=index, image="sub/../a.png", note="line\u2028separator") for index in range(3)]
    path = tmp_path / f"data.{write}"
    lines = "\n\n".join(json.dumps(one, ensure_ascii=False) for one in samples)
    path.write_text(json.dumps(samples) if write == "json" else "\ufeff" + lines + "\n", encoding="utf-8")
    dataset = ConversationDataset(str(path), str(folder))
    assert [dataset[index]["id"] for index in range(3)] == ["0", "1", "2"]
    assert dataset[2]["messages"] == EXPECTED


def test_paths_are_used_as_they_are_without_a_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for image in ("a.png", "../outside.png", str(folder / "a.png"), folder / "a.png"):
        assert ConversationDataset([sample(image=image)])[0]["images"][0].size == picture(1).size


def test_objects_of_datasets(folder):
    datasets = pytest.importorskip("datasets")
    rows = {
        "messages": [EXPECTED, [{**EXPECTED[0], "content": [text("Hi?")]}, EXPECTED[1]]],
        "images": [[str(folder / "a.png")], []],
    }
    features = datasets.Features(
        {
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                }
            ],
            "images": [datasets.Image()],
        }
    )
    dataset = ConversationDataset(datasets.Dataset.from_dict(rows, features=features))
    assert dataset[0]["messages"] == EXPECTED and dataset[0]["images"][0].tobytes() == picture(1).tobytes()
    assert dataset[1]["images"] == [] and dataset.modality_lengths == [128 + 5, -3]


def test_workers_get_the_same_samples(folder):
    dataset = ConversationDataset([sample()], folder)
    assert pickle.loads(pickle.dumps(dataset))[0]["messages"] == EXPECTED
    with pytest.raises(IndexError):
        dataset[1]


BAD = {
    "a list": ([], "must be a dictionary, but is a list"),
    "no conversation": ({"id": "7", "image": "a.png"}, "either `conversations` or `messages`.*'id', 'image'"),
    "both formats": (sample(messages=EXPECTED), "either `conversations` or `messages`"),
    "no list": (sample(conversations="Hi"), "`conversations` must be a list with messages, but is 'Hi'"),
    "empty": (sample(conversations=[]), r"must be a list with messages, but is \[\]"),
    "a turn is a string": (sample("Hi", ANSWER), "turn 0 must be a dictionary with `from` and `value`, but is 'Hi'"),
    "missing key": (sample(QUESTION, {"from": "gpt"}), "turn 1 must be a dictionary with `from` and `value`"),
    "unknown role": (sample(QUESTION, {**ANSWER, "from": "bard"}), "turn 1 must be by one of.*but is by 'bard'"),
    "role of the other format": (sample({**QUESTION, "from": "user"}, ANSWER), "turn 0 must be by one of.*'human'"),
    "role is a list": (sample({**QUESTION, "from": ["human"]}, ANSWER), "turn 0 must be by one of"),
    "number as text": (sample(QUESTION, {**ANSWER, "value": 3}), "the text of turn 1 must be a string, but is 3"),
    "None as text": (sample(QUESTION, {**ANSWER, "value": None}), "the text of turn 1 must be a string, but is None"),
    "empty answer": (sample(QUESTION, {**ANSWER, "value": " \n"}), "turn 1 is empty"),
    "empty question": (sample({**QUESTION, "value": ""}, ANSWER, image=None), "turn 0 is empty"),
    "begins with an answer": (sample(ANSWER, QUESTION, ANSWER), "must alternate.*'assistant', 'user', 'assistant'"),
    "ends with a question": (
        sample(QUESTION, ANSWER, {**QUESTION, "value": "?"}),
        "must alternate.*end with an answer",
    ),
    "two questions": (sample(QUESTION, QUESTION, ANSWER, image=["a.png"] * 2), "must alternate"),
    "late system message": (sample(QUESTION, ANSWER, {"from": "system", "value": "x"}, ANSWER), "must alternate"),
    "only a system message": (sample({"from": "system", "value": "x"}, image=None), "must alternate"),
    "no image": (sample(image=None), "its text has 1 <image>, but it has 0 images"),
    "no placeholder": (sample({**QUESTION, "value": "What?"}, ANSWER), "its text has 0 <image>, but it has 1 images"),
    "too many images": (sample(image=["a.png", "a.png"]), "its text has 1 <image>, but it has 2 images"),
    "image in an answer": (
        sample({**QUESTION, "value": "?"}, {**ANSWER, "value": "<image>"}),
        "turn 1 has <image>.*by the assistant",
    ),
    "image and images": (sample(images=["a.png"]), "either `image` or `images`, but has both"),
    "image is a number": (sample(image=3), "an image must be a path or a PIL image, but is 3"),
    "image is empty": (sample(image=""), "an image must be a path or a PIL image, but is ''"),
    "missing file": (sample(image="c.png"), "the image '.*c.png' does not exist"),
    "folder": (sample(image="sub"), "the image '.*sub' does not exist"),
    "no image file": (sample(image="text.png"), "the image '.*text.png' cannot be opened: cannot identify"),
    "empty file": (sample(image="empty.png"), "the image '.*empty.png' cannot be opened"),
    "null byte": (sample(image="a\0.png"), "the image .* does not exist"),
    "above the folder": (sample(image="../outside.png"), "the image '../outside.png' is not in the image folder"),
    "hidden way out": (sample(image="sub/../../outside.png"), "is not in the image folder"),
    "absolute path": (sample(image="/etc/hostname"), "'/etc/hostname' is not in the image folder.*relative"),
    "chat without content": (
        {"messages": [{"role": "user"}]},
        "turn 0 must be a dictionary with `role` and `content`",
    ),
    "chat with a tool": (
        {"messages": [{"role": "tool", "content": "x"}]},
        "turn 0 must be by one of.*but is by 'tool'",
    ),
    "chat with video": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "turn 0 must be made of"),
    "chat with strings": ({"messages": [{"role": "user", "content": ["Hi"]}]}, "turn 0 must be made of.*'Hi'"),
    "chat with an inline image": (
        {"messages": [{"role": "user", "content": [{**IMAGE, "path": "a.png"}]}]},
        "turn 0 must be made of.*in the sample's `images`",
    ),
    "chat without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "turn 0 must be a string"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_samples_are_refused(folder, kind):
    bad, reason = BAD[kind]
    with pytest.raises(ValueError, match="(?s)1 of 3 samples are bad:\n  sample 1 .*" + reason) as error:
        ConversationDataset([sample(), bad, sample()], folder)
    assert error.type is ValueError
    name = "'7'" if isinstance(bad, dict) and "id" in bad else "'1'"
    assert f"sample 1 ({name}): " in str(error.value) and "skip_bad_samples=True" in str(error.value)


def test_bad_samples_are_left_out_if_asked_for(folder, caplog):
    samples = [bad for bad, _ in BAD.values()]
    samples.insert(5, sample(id="good"))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        dataset = ConversationDataset(samples, folder, skip_bad_samples=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert len(dataset) == len(dataset.modality_lengths) == 1 and dataset[0]["id"] == "good"
    assert [bad.index for bad in dataset.bad_samples] == [index for index in range(len(samples)) if index != 5]
    assert dataset.bad_samples[0] == BadSample(0, "0", "it must be a dictionary, but is a list.")
    (warning,) = caplog.messages
    assert f"{len(BAD)} of {len(samples)} samples are bad" in warning and f"and {len(BAD) - 10} others" in warning
    assert warning.count("\n  sample ") == 10 and "left out" in warning


def test_nothing_is_left(folder):
    with pytest.raises(ValueError, match="nothing to train on: all of the 2 samples are bad"):
        ConversationDataset([{}, {}], folder, skip_bad_samples=True)
    with pytest.raises(ValueError, match="`source` has no samples"):
        ConversationDataset([])


FILES = {
    "data.json": ('[\n{"id": 1},\n{"id": 2\n]', r"data.json is not JSON: .*line 4 column 1"),
    "object.json": ('{"id": 1}', "must hold a list of samples, but holds a dict"),
    "empty.json": ("", "empty.json is not JSON"),
    "data.jsonl": ('{"id": 1}\n\n{"id": \n', "line 3 of .*data.jsonl is not JSON"),
    "empty.jsonl": ("\n", "`source` has no samples"),
    "latin.json": (b"[\xe9]", "latin.json is not UTF-8"),
    "data.csv": ("id", "must be in a .json or .jsonl file, but '.*data.csv' is none"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(tmp_path, name):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        ConversationDataset(tmp_path / name)


def test_arguments_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="'.*missing.json' is none"):
        ConversationDataset(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="`image_folder` must be a folder, but '.*missing' is none"):
        ConversationDataset([sample()], tmp_path / "missing")
    with pytest.raises(ValueError, match="`source` must be a path.*but is a generator"):
        ConversationDataset(one for one in tiny_samples())


def test_an_image_whose_end_is_missing_names_its_sample(folder):
    """Which only its decoding shows, so it is found when it is needed."""
    data = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    dataset = ConversationDataset([sample(), sample(id="cut", image="cut.png")], folder)
    with pytest.raises(ValueError, match=r"Sample 1 \('cut'\): the image .*cut.png cannot be read"):
        dataset[1]
