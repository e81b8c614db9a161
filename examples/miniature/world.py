"""The miniatures' world: pictures with coloured shapes and numbers, drawn by Pillow and its built-in font.

Everything is drawn from a `random.Random`, so a seed is a data set. Sizes are in pixels.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont


COLOURS = {
    "red": (214, 40, 40),
    "green": (34, 139, 60),
    "blue": (40, 80, 200),
    "yellow": (235, 190, 20),
    "purple": (130, 50, 160),
    "orange": (240, 120, 20),
}
INKS = ("red", "green", "blue", "purple")  # what can be read on light and dark
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = "0123456789"
MARGIN = 3  # least distance between two things

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Thing:
    """A shape or a digit in a picture."""

    name: str  # of SHAPES or DIGITS
    colour: str | None  # of COLOURS; None for digits in black or white
    box: Box
    group: int  # what belongs together has the same one: the digits of a number


@lru_cache
def digit_font(height: int) -> ImageFont.FreeTypeFont:
    """The font whose digits are `height` pixels high."""
    sizes = range(4, 4 * height + 8)
    return next(font for font in map(ImageFont.load_default, sizes) if _digit_box(font, DIGITS)[3] >= height)


def _digit_box(font: ImageFont.FreeTypeFont, text: str) -> Box:
    left, top, right, bottom = font.getbbox(text)
    return left, top, right - left, bottom - top


class Picture:
    """A picture that is drawn thing by thing; `things` tells what is on it, and where."""

    def __init__(self, width: int, height: int, rng: random.Random, dark: bool = False):
        self.width, self.height, self.rng, self.dark = width, height, rng, dark
        self.things: list[Thing] = []
        self._taken: list[Box] = []
        level = rng.randint(20, 60) if dark else rng.randint(205, 255)
        colour = tuple(max(level - rng.randint(0, 14), 0) for _ in range(3))
        self.image = Image.new("RGB", (width, height), colour)
        self._draw = ImageDraw.Draw(self.image)
        self._draw_clutter()

    def _draw_clutter(self) -> None:
        """Faint lines."""
        levels = (50, 110) if self.dark else (150, 235)
        for _ in range(self.rng.randint(0, 1 + self.width * self.height // 4096)):
            colour = tuple(self.rng.randint(*levels) for _ in range(3))
            x, y = self.rng.randint(0, self.width), self.rng.randint(0, self.height)
            end = (x + self.rng.randint(-60, 60), y + self.rng.randint(-60, 60))
            self._draw.line((x, y, *end), fill=colour, width=self.rng.randint(1, 2))

    def add_shape(self, name: str, colour: str, size: int) -> bool:
        """Draws a shape at a random free place; False, and nothing drawn, where none was found."""
        place = self._find_place(size, size)
        if place is None:
            return False
        x, y = place
        fill = COLOURS[colour]
        if name == "circle":
            self._draw.ellipse((x, y, x + size, y + size), fill=fill)
        elif name == "square":
            self._draw.rectangle((x, y, x + size, y + size), fill=fill)
        elif name == "triangle":
            self._draw.polygon([(x + size / 2, y), (x + size, y + size), (x, y + size)], fill=fill)
        else:
            arm = 0.34 * size
            self._draw.rectangle((x + arm, y, x + size - arm, y + size), fill=fill)
            self._draw.rectangle((x, y + arm, x + size, y + size - arm), fill=fill)
        self.things.append(Thing(name, colour, (x, y, x + size, y + size), len(self._taken)))
        return True

    def add_number(self, number: str, height: int, ink: str | None = None) -> bool:
        """Writes digits of `height` pixels at a random free place; False, and nothing drawn, where none was found.

        `ink` is one of INKS; without it, digits are about black, or white on a dark background.
        """
        font, gap = digit_font(height), max(1, round(0.12 * height))
        boxes = [_digit_box(font, digit) for digit in number]
        place = self._find_place(sum(box[2] for box in boxes) + gap * (len(number) - 1), height)
        if place is None:
            return False
        x, y = place
        levels = (190, 255) if self.dark else (0, 70)
        fill = COLOURS[ink] if ink else tuple(self.rng.randint(*levels) for _ in range(3))
        for digit, (left, top, width, digit_height) in zip(number, boxes, strict=True):
            self._draw.text((x - left, y - top), digit, fill=fill, font=font)
            self.things.append(Thing(digit, ink, (x, y, x + width, y + digit_height), len(self._taken)))
            x += width + gap
        return True

    def _find_place(self, width: float, height: float, tries: int = 20) -> tuple[int, int] | None:
        if width > self.width or height > self.height:
            return None
        for _ in range(tries):
            x, y = self.rng.randint(0, int(self.width - width)), self.rng.randint(0, int(self.height - height))
            box = (x - MARGIN, y - MARGIN, x + width + MARGIN, y + height + MARGIN)
            if not any(_overlap(box, other) for other in self._taken):
                self._taken.append((x, y, x + width, y + height))
                return x, y
        return None


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@dataclass(frozen=True)
class Scene:
    """A picture, the number on it, and its shapes, all of different kinds and colours, as `"red circle"`."""

    image: Image.Image
    number: str
    shapes: list[str]
    ink: str | None  # of the number


def draw_scene(
    rng: random.Random,
    size: tuple[int, int],
    text_heights: tuple[int, int],
    shapes: list[tuple[str, str]] | None = None,
    dark: bool | None = None,
    inks: tuple[str | None, ...] = (None,),
) -> Scene:
    """A scene with a number of two digits and `(colour, kind)` shapes, by default up to three of different ones.

    Where nothing else is said, every fourth one has a dark background. The number's ink is one of `inks`.
    """
    picture = Picture(*size, rng, dark=rng.random() < 0.25 if dark is None else dark)
    number, ink = "".join(rng.choices(DIGITS, k=2)), rng.choice(inks)
    if not picture.add_number(number, rng.randint(*text_heights), ink):
        raise ValueError(f"A number of {text_heights[1]} pixels does not fit into a picture of {size[0]}x{size[1]}.")
    if shapes is None:
        colours, kinds = rng.sample(list(COLOURS), 3), rng.sample(SHAPES, 3)
        shapes = list(zip(colours, kinds, strict=True))[: rng.randint(0, 3)]
    drawn = [f"{colour} {kind}" for colour, kind in shapes if picture.add_shape(kind, colour, rng.randint(10, 24))]
    return Scene(picture.image, number, drawn, ink)
