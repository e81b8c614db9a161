"""The world is drawn from its seed alone, things lie where it says, and evaluation has pictures of its own."""

import hashlib
import itertools
import random

import numpy as np
import pytest
from PIL import Image


SEEDS = range(20)
FAINT = 24  # what a thing's pixels differ from its surroundings at least, on a scale of 255


@pytest.fixture(scope="module")
def world(miniature):
    return miniature("world")


def draw(world, seed, dark=False, size=(96, 80)):
    """A picture, and the same one before anything was put on it."""
    rng = random.Random(seed)
    picture = world.Picture(*size, rng, dark=dark)
    empty = picture.image.copy()
    picture.add_number("407", 14)
    for shape, colour in zip(world.SHAPES, world.COLOURS, strict=False):
        picture.add_shape(shape, colour, 18)
    return picture, empty


def change_of(picture, empty, box=None):
    before, after = (np.asarray(image.crop(box), dtype=int) for image in (empty, picture.image))
    return np.abs(after - before).max(axis=-1)


@pytest.mark.parametrize("dark", [False, True, None])
def test_a_seed_is_a_picture(world, dark):
    scenes = [world.draw_scene(random.Random(f"seed {seed}"), (96, 64), (10, 20), dark=dark) for seed in (1, 1, 2)]
    one, same, other = ((scene.image.tobytes(), scene.number, scene.shapes) for scene in scenes)
    assert one == same != other


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_things_lie_where_they_are_said_to(world, dark):
    for seed in SEEDS:
        picture, empty = draw(world, seed, dark)
        assert len(picture.things) >= 5
        outside = change_of(picture, empty)
        for thing in picture.things:
            left, top, right, bottom = (round(edge) for edge in thing.box)
            change = change_of(picture, empty, (left, top, right + 1, bottom + 1)) > FAINT
            # It fills its box from one side to the other: strokes and corners are thin, but there.
            assert change.mean() > 0.15, (seed, thing)
            assert change[:, :3].any() and change[:, -4:].any() and change[:3].any() and change[-4:].any(), thing
            # Anti-aliasing and drawing by Pillow may reach a pixel further.
            outside[max(top - 1, 0) : bottom + 2, max(left - 1, 0) : right + 2] = 0
        assert not outside.any(), seed


def test_shapes_have_their_colours(world):
    for seed in SEEDS:
        picture, _ = draw(world, seed)
        for thing in picture.things:
            if thing.colour is not None:
                center = tuple(int(sum(thing.box[axis::2]) / 2) for axis in (0, 1))
                assert picture.image.getpixel(center) == world.COLOURS[thing.colour], thing


def test_numbers_have_their_ink(world):
    for ink in world.INKS:
        picture, _ = draw(world, 0)
        assert picture.add_number("8", 20, ink)
        thing = picture.things[-1]
        assert (thing.name, thing.colour) == ("8", ink)
        colours = picture.image.crop(tuple(round(edge) for edge in thing.box)).getcolors()
        assert world.COLOURS[ink] in [colour for _, colour in colours]
    scenes = [world.draw_scene(random.Random(seed), (64, 64), (12, 28), inks=("red", None)) for seed in range(50)]
    assert {scene.ink for scene in scenes} == {"red", None}
    assert all(world.draw_scene(random.Random(seed), (64, 64), (12, 28)).ink is None for seed in range(20))


def test_digits_have_their_height(world):
    for height in (7, 10, 13, 20, 32):
        picture = world.Picture(100, 60, random.Random(0))
        assert picture.add_number("38", height)
        heights = {thing.box[3] - thing.box[1] for thing in picture.things}
        assert all(abs(each - height) <= 1 for each in heights), height


def test_things_do_not_overlap(world):
    for seed in SEEDS:
        picture, _ = draw(world, seed)
        digits = [thing for thing in picture.things if thing.colour is None]
        shapes = [thing for thing in picture.things if thing.colour is not None]
        for one, other in itertools.combinations(picture.things, 2):
            (left, top, right, bottom), (left_2, top_2, right_2, bottom_2) = one.box, other.box
            distance = max(left_2 - right, left - right_2, top_2 - bottom, top - bottom_2)
            assert distance >= (1 if one in digits and other in digits else 3), (seed, one, other)
        assert len(digits) == 3 and 2 <= len(shapes) <= 4
        for thing in picture.things:
            left, top, right, bottom = thing.box
            assert left >= 0 and top >= 0 and right <= picture.width and bottom <= picture.height


def test_no_place_is_not_drawn(world):
    picture = world.Picture(20, 20, random.Random(0))
    before = picture.image.tobytes()
    assert not picture.add_number("1234", 18) and not picture.add_shape("circle", "red", 30)
    assert picture.image.tobytes() == before and not picture.things
    with pytest.raises(ValueError, match=r"40 pixels does not fit into a picture of 64x32"):
        world.draw_scene(random.Random(0), (64, 32), (40, 40))


def test_scenes_say_what_is_on_them(world, monkeypatch):
    pictures = []

    class Watched(world.Picture):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pictures.append(self)

    monkeypatch.setattr(world, "Picture", Watched)
    scenes = [world.draw_scene(random.Random(seed), (96, 64), (10, 20)) for seed in range(300)]
    for scene, picture in zip(scenes, pictures, strict=True):
        assert scene.image is picture.image and scene.image.size == (96, 64)
        assert len(scene.number) == 2
        assert scene.number == "".join(thing.name for thing in picture.things if thing.colour is None)
        shapes = [thing for thing in picture.things if thing.colour is not None]
        assert scene.shapes == [f"{thing.colour} {thing.name}" for thing in shapes]
        # Questions about a colour or a shape have one answer.
        assert len({thing.colour for thing in shapes}) == len({thing.name for thing in shapes}) == len(shapes) <= 3
    assert len({scene.number for scene in scenes}) > 80
    assert {len(scene.shapes) for scene in scenes} == {0, 1, 2, 3}
    assert 0.15 < sum(picture.dark for picture in pictures) / len(pictures) < 0.35


def digest(image):
    return hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).digest()


def run_without_training(module, folder, monkeypatch, count):
    """Digests of all pictures that an experiment's arms of the first seed learn from, and of those they are asked.

    It learns from the first `count` of each kind: where two kinds had one seed, these would be equal.
    """
    learned, asked = set(), []

    def train(model, processor, examples, *args, **kwargs):
        learned.update(digest(example.image) for example in examples)
        return []

    def accuracies(model, processor, examples):
        asked.append([digest(example.image) for example in examples])
        return {example.group: 1.0 for example in examples}

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", train)
        patch.setattr(module, "accuracies", accuracies)
        for name in ("expert_loads", "domain_loads"):
            patch.setattr(module, name, lambda *args: {}, raising=False)
        for name in ("CAPTIONS", "FIRST_QUESTIONS", "READINGS", "QUESTIONS"):
            patch.setattr(module, name, count, raising=False)
        if hasattr(module, "prepare"):
            module.prepare(folder)
        for arm in module.ARMS:
            module.run(module.Run(arm, 0, folder, None))
    return learned, asked


@pytest.fixture(scope="module")
def shown(miniature):
    """Digests of the demo's pictures."""
    folder = miniature("tables").PICTURES
    files = sorted(folder.glob("*.png"))
    assert len(files) >= 9, f"{folder} has no pictures: run examples/miniature/demo_pictures.py"
    digests = {digest(Image.open(file)) for file in files}
    assert len(digests) == len(files)
    return digests


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uhd_reading", "moe_skills", "mole_domains"])
def test_pictures_that_are_asked_about_are_new(name, miniature, shown, tmp_path, monkeypatch):
    learned, asked = run_without_training(miniature(name), tmp_path, monkeypatch, count=200)
    assert len(learned) >= 400 and len(asked) == len(miniature(name).ARMS)
    assert not shown & learned
    for pictures in asked:
        assert len(set(pictures)) == len(pictures) >= 100
        assert not set(pictures) & (learned | shown)
