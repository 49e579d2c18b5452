"""Foreground drawings of the embedded suite: what an image shows, before a domain changes how it
looks.

A *source* has 8 to 16 classes and draws one 32x32 coverage mask a call: values in [0, 1], 1 where
the foreground covers the pixel. Glyphs come from the DejaVu fonts that matplotlib ships, digits are
the handwritten ones of scikit-learn, everything else is drawn at four times the size and averaged
down.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

SIZE = 32


SUPERSAMPLE = 4


CANVAS = SIZE * SUPERSAMPLE


SPLITS = ("train", "val", "test")


GLYPHS = {
    "latin": "ABDEFGHKMQRSWZ",
    "greek": "αβγδεζθλξπφψωσ",
    "cyrillic": "БДЖИЛФЦЧШЭЮЯ",
    "hebrew": "אבגדהחטלמסעפצש",
    "armenian": "ԱԳԴԵԶԹԺԽԾՁՃՄ",
    "georgian": "აბგდევზთკლმფ",
    "arabic": "ابجدرسصطعفكلمه",
    "tifinagh": "ⴱⴳⴷⴼⴽⵅⵇⵉⵊⵎⵙⵛⵣⵢ",
    "canadian": "ᐁᐅᐊᐯᐳᑌᑎᑐᑫᑭᒉᒋ",
    "math": "∀∃∅∆∈∏∑√∞∩∪≈⊕⊗",
    "pictograms": "♈♉♊♋♌♍♎♏♐♑♒♓",
    "arrows": "←↑→↓↖↗↘↙↔↕↩↻",
    "braille": "⠁⠃⠉⠙⠑⠋⠛⠓⠞⠺⠽⠿",
    "dingbats": "✂✈✉✌✎✔✖✞✡✪❄❤❥✿",
    "trigrams": "☰☱☲☳☴☵☶☷",
}


SHAPES = (
    "circle",
    "square",
    "triangle",
    "diamond",
    "pentagon",
    "hexagon",
    "star",
    "cross",
    "ring",
    "crescent",
    "half disc",
    "heart",
)


NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)


TEXTURES = (
    "horizontal lines",
    "vertical lines",
    "rising diagonal lines",
    "falling diagonal lines",
    "checkerboard",
    "grid of dots",
    "square grid",
    "concentric circles",
    "radial rays",
    "zigzag lines",
    "brick wall",
    "slanted grid",
)


# Every colour is light enough to stand out from the dark backgrounds that go with it.
COLOURS = {
    "red": (235, 60, 50),
    "green": (60, 200, 70),
    "blue": (80, 110, 245),
    "yellow": (240, 225, 60),
    "orange": (245, 145, 40),
    "purple": (165, 80, 210),
    "cyan": (70, 220, 225),
    "pink": (250, 150, 195),
    "white": (248, 248, 248),
    "grey": (150, 150, 150),
}


POSITIONS = {
    "right of": (1, 0),
    "below right of": (1, 1),
    "below": (0, 1),
    "below left of": (-1, 1),
    "left of": (-1, 0),
    "above left of": (-1, -1),
    "above": (0, -1),
    "above right of": (1, -1),
}


Draw = Callable[
    [int, np.random.Generator, str], np.ndarray
]  # (class, rng, split) -> mask (32, 32) float32


@dataclass(frozen=True)
class Source:
    """One kind of drawing: its class names, and a function that draws a class. `colours` fixes a
    class's colour.
    """

    name: str
    classes: tuple[str, ...]
    draw: Draw
    colours: tuple[tuple[int, int, int], ...] | None = None


@cache
def _font_files(characters: str) -> tuple[tuple[str, float], ...]:
    """(file, probability) of the DejaVu fonts that have all the characters; Sans and Mono get 80 %
    between them.
    """
    folder = Path(get_data_path()) / "fonts" / "ttf"
    files = sorted(p for p in folder.glob("DejaVu*.ttf") if "Display" not in p.name)
    covered = [p for p in files if all(ord(c) in FT2Font(str(p)).get_charmap() for c in characters)]
    serif = sum("Serif" in p.name for p in covered)
    plain = len(covered) - serif
    return tuple(
        (
            str(p),
            (0.2 / serif if "Serif" in p.name else 0.8 / plain)
            if serif and plain
            else 1 / len(covered),
        )
        for p in covered
    )


@cache
def _glyph(character: str, font_file: str) -> Image.Image:
    """The character, centred by its bounding box on a square canvas; 1 em is 0.6 of the canvas."""
    font = ImageFont.truetype(font_file, int(CANVAS * 0.6))
    left, top, right, bottom = font.getbbox(character)
    scale = min(1.0, 0.72 * CANVAS / max(right - left, bottom - top, 1))
    if scale < 1.0:
        font = ImageFont.truetype(font_file, int(CANVAS * 0.6 * scale))
        left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (CANVAS, CANVAS))
    position = ((CANVAS - right - left) / 2, (CANVAS - bottom - top) / 2)
    ImageDraw.Draw(image).text(position, character, fill=255, font=font)
    return image


def _place(
    image: Image.Image, rng: np.random.Generator, *, turn: float = 5.0, shift: float = 1.5
) -> np.ndarray:
    """Rotate by up to `turn` degrees, move by up to `shift` pixels, scale by up to 8 %, and average
    down to 32x32.
    """
    angle = math.radians(rng.uniform(-turn, turn))
    scale = rng.uniform(0.92, 1.08)
    dx, dy = rng.uniform(-shift, shift, 2) * SUPERSAMPLE
    cos, sin, centre = math.cos(angle) / scale, math.sin(angle) / scale, CANVAS / 2
    affine = (
        cos,
        sin,
        centre - cos * (centre + dx) - sin * (centre + dy),
        -sin,
        cos,
        centre + sin * (centre + dx) - cos * (centre + dy),
    )
    moved = image.transform(
        (CANVAS, CANVAS), Image.Transform.AFFINE, affine, resample=Image.Resampling.BILINEAR
    )
    return np.asarray(moved.reduce(SUPERSAMPLE), dtype=np.float32) / 255.0


def _glyph_source(name: str, characters: str) -> Source:
    def draw(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
        files = _font_files(characters)
        choice = rng.choice(len(files), p=[probability for _, probability in files])
        return _place(_glyph(characters[label], files[choice][0]), rng)

    # The text tower reads 20 tokens: braille names are cut to what tells them apart.
    names = (unicodedata.name(c).lower().replace("pattern dots-", "dots ") for c in characters)
    return Source(name, tuple(names), draw)


@cache
def _digits(split: str) -> dict[int, np.ndarray]:
    """Handwritten digits by label, (n, 8, 8) in [0, 1]; a writer's image is in one split only
    (60/15/25 %).
    """
    from sklearn.datasets import load_digits  # a heavy import that only this source needs

    data = load_digits()
    first, last = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}[split]
    chosen = {}
    for label in range(10):
        images = data.images[data.target == label] / 16.0
        chosen[label] = images[int(first * len(images)) : int(last * len(images))]
    return chosen


def _draw_digit(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    pool = _digits(split)[label]
    digit = Image.fromarray((pool[rng.integers(len(pool))] * 255).astype(np.uint8))
    image = Image.new("L", (CANVAS, CANVAS))
    side = int(CANVAS * 0.8)
    image.paste(digit.resize((side, side), Image.Resampling.BICUBIC), ((CANVAS - side) // 2,) * 2)
    return _place(image, rng)


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("L", (CANVAS, CANVAS))
    return image, ImageDraw.Draw(image)


def _box(
    radius: float, x: float = CANVAS / 2, y: float = CANVAS / 2
) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def _polygon(radii: list[float], turn: float) -> list[tuple[float, float]]:
    """Corners at the given distances from the centre, evenly spaced, the first one straight up
    turned by `turn`.
    """
    angles = [turn + 2 * math.pi * k / len(radii) - math.pi / 2 for k in range(len(radii))]
    return [
        (CANVAS / 2 + r * math.cos(a), CANVAS / 2 + r * math.sin(a))
        for r, a in zip(radii, angles, strict=True)
    ]


def _draw_named_shape(pen: ImageDraw.ImageDraw, name: str, radius: float) -> None:
    corners = {"triangle": 3, "diamond": 4, "pentagon": 5, "hexagon": 6}
    centre = CANVAS / 2
    if name in corners:
        pen.polygon(_polygon([radius] * corners[name], 0.0), fill=255)
    elif name == "square":
        pen.rectangle(_box(radius * 0.8), fill=255)
    elif name == "star":
        pen.polygon(_polygon([radius, radius * 0.42] * 5, 0.0), fill=255)
    elif name == "cross":
        pen.rectangle(
            (centre - radius, centre - radius / 3, centre + radius, centre + radius / 3), fill=255
        )
        pen.rectangle(
            (centre - radius / 3, centre - radius, centre + radius / 3, centre + radius), fill=255
        )
    elif name == "ring":
        pen.ellipse(_box(radius), outline=255, width=int(radius * 0.35))
    elif name == "half disc":
        pen.pieslice(_box(radius), 180, 360, fill=255)
    elif name == "heart":
        pen.ellipse(_box(radius * 0.52, centre - radius * 0.45, centre - radius * 0.35), fill=255)
        pen.ellipse(_box(radius * 0.52, centre + radius * 0.45, centre - radius * 0.35), fill=255)
        pen.polygon(
            [
                (centre - radius * 0.92, centre - radius * 0.1),
                (centre + radius * 0.92, centre - radius * 0.1),
                (centre, centre + radius),
            ],
            fill=255,
        )
    else:
        pen.ellipse(_box(radius), fill=255)
        if name == "crescent":
            pen.ellipse(_box(radius * 0.9, centre + radius * 0.45), fill=0)


def _draw_shape(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    image, pen = _canvas()
    _draw_named_shape(pen, SHAPES[label], CANVAS * rng.uniform(0.28, 0.38))
    return _place(image, rng)


def _draw_dots(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    """label + 1 dots that do not touch, on a jittered 3x3 grid."""
    image, pen = _canvas()
    for cell in rng.permutation(9)[: label + 1]:
        x, y = ((k + 0.5) * CANVAS / 3.6 + CANVAS * 0.083 for k in divmod(int(cell), 3))
        jx, jy = rng.uniform(-0.04, 0.04, 2) * CANVAS
        pen.ellipse(_box(CANVAS * rng.uniform(0.07, 0.09), x + jx, y + jy), fill=255)
    return _place(image, rng, turn=2.0, shift=0.5)


@cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:CANVAS, :CANVAS].astype(np.float32)
    return x - CANVAS / 2, y - CANVAS / 2


def _texture(name: str, period: float, phase: float) -> np.ndarray:
    """Boolean canvas of a periodic pattern; period and phase in canvas pixels."""
    x, y = _grid()
    root = math.sqrt(2.0)

    def stripes(u: np.ndarray) -> np.ndarray:
        return ((u + phase) / period) % 1.0 < 0.5

    def thin(u: np.ndarray, every: float = 1.0) -> np.ndarray:
        return ((u + phase) / (period * every)) % 1.0 < 0.3 / every

    patterns: dict[str, Callable[[], np.ndarray]] = {
        "horizontal lines": lambda: stripes(y),
        "vertical lines": lambda: stripes(x),
        "rising diagonal lines": lambda: stripes((x + y) / root),
        "falling diagonal lines": lambda: stripes((x - y) / root),
        "checkerboard": lambda: stripes(x) ^ stripes(y),
        "grid of dots": lambda: (
            (((x + phase) / period % 1 - 0.5) ** 2 + ((y + phase) / period % 1 - 0.5) ** 2) < 0.08
        ),
        "square grid": lambda: thin(x) | thin(y),
        "concentric circles": lambda: stripes(np.hypot(x, y)),
        "radial rays": lambda: (np.arctan2(y, x) * 6 / math.pi + phase / period) % 1.0 < 0.5,
        "zigzag lines": lambda: stripes(
            y + np.abs(((x + phase) / period % 1.0) - 0.5) * period * 1.6
        ),
        "brick wall": lambda: thin(y) | (thin(x + period * ((y + phase) // period % 2), 2.0)),
        "slanted grid": lambda: thin((x + y) / root) | thin((x - y) / root),
    }
    return patterns[name]()


def _draw_texture(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    period = CANVAS * rng.uniform(0.2, 0.28)
    pattern = _texture(TEXTURES[label], period, rng.uniform(0, period))
    return _place(Image.fromarray(pattern.astype(np.uint8) * 255), rng, shift=0.0)


def _draw_coloured(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    return _draw_shape(int(rng.integers(len(SHAPES))), rng, split)


def _draw_clock(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    image, pen = _canvas()
    centre, radius = CANVAS / 2, CANVAS * rng.uniform(0.36, 0.42)
    pen.ellipse(_box(radius), outline=255, width=SUPERSAMPLE + 1)
    angle = 2 * math.pi * (label + 1) / 12 - math.pi / 2
    tip = centre + 0.78 * radius * math.cos(angle), centre + 0.78 * radius * math.sin(angle)
    pen.line((centre, centre, *tip), fill=255, width=int(SUPERSAMPLE * 2.2))
    pen.ellipse(_box(SUPERSAMPLE * 2.0, centre, centre), fill=255)
    return _place(image, rng, turn=3.0)


def _draw_position(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    image, pen = _canvas()
    dx, dy = list(POSITIONS.values())[label]
    away = CANVAS * 0.36 / (math.hypot(dx, dy) if dx and dy else 1.0) * (1.25 if dx and dy else 1.0)
    x, y = CANVAS / 2 - dx * away / 2, CANVAS / 2 - dy * away / 2
    pen.rectangle(_box(CANVAS * rng.uniform(0.12, 0.15), x, y), fill=255)
    pen.ellipse(_box(CANVAS * rng.uniform(0.08, 0.1), x + dx * away, y + dy * away), fill=255)
    return _place(image, rng)


SOURCES: dict[str, Source] = {
    s.name: s
    for s in (
        *(_glyph_source(name, characters) for name, characters in GLYPHS.items()),
        Source("digits", tuple(f"handwritten digit {n}" for n in NUMBERS[:10]), _draw_digit),
        Source("shapes", SHAPES, _draw_shape),
        Source(
            "counting",
            tuple(f"{n} dot{'s' * (k > 0)}" for k, n in enumerate(NUMBERS[1:9])),
            _draw_dots,
        ),
        Source("textures", tuple(f"texture of {t}" for t in TEXTURES), _draw_texture),
        Source(
            "colours",
            tuple(f"{c} object" for c in COLOURS),
            _draw_coloured,
            tuple(COLOURS.values()),
        ),
        Source("clock", tuple(f"clock at {n} o'clock" for n in NUMBERS[1:]), _draw_clock),
        Source("position", tuple(f"disc {p} a block" for p in POSITIONS), _draw_position),
    )
}
