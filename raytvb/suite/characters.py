"""Drawings of characters, from the DejaVu fonts that matplotlib ships, and of handwritten digits,
from scikit-learn.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from raytvb.suite.canvas import CANVAS, Draw, place

SERIF_SHARE = 0.2
"""Probability of a serif font; Sans and Mono share the rest."""


@cache
def _fonts(characters: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Files of the DejaVu fonts that have all the characters, and the probability of each."""
    folder = Path(get_data_path()) / "fonts" / "ttf"
    files = []
    for file in sorted(folder.glob("DejaVu*.ttf")):
        if "Display" not in file.name and _has_all(file, characters):
            files.append(file)
    serif = sum("Serif" in file.name for file in files)
    plain = len(files) - serif
    probabilities = []
    for file in files:
        if not (serif and plain):
            probabilities.append(1 / len(files))
        elif "Serif" in file.name:
            probabilities.append(SERIF_SHARE / serif)
        else:
            probabilities.append((1 - SERIF_SHARE) / plain)
    return tuple(map(str, files)), tuple(probabilities)


def _has_all(font_file: Path, characters: str) -> bool:
    codes = FT2Font(str(font_file)).get_charmap()
    return all(ord(character) in codes for character in characters)


@cache
def _glyph(character: str, font_file: str) -> Image.Image:
    """The character on a canvas, centred by its bounding box. 1 em is 0.6 of the canvas, or less if
    the character is too large for that.
    """
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


def drawing_of(characters: str) -> Draw:
    """The function that draws one of these characters, in one of the fonts that have them all."""

    def draw(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
        files, probabilities = _fonts(characters)
        choice = rng.choice(len(files), p=probabilities)
        return place(_glyph(characters[label], files[choice]), rng)

    return draw


@cache
def handwritten_digits(split: str) -> dict[int, np.ndarray]:
    """scikit-learn's digits by label, (n, 8, 8) in [0, 1].

    Each image is in only one split: 60 % are in train, 15 % in val, 25 % in test.
    """
    from sklearn.datasets import load_digits  # a heavy import that only this source needs

    data = load_digits()
    first, last = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}[split]
    digits = {}
    for label in range(10):
        images = data.images[data.target == label] / 16.0
        digits[label] = images[int(first * len(images)) : int(last * len(images))]
    return digits


def draw_digit(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    """A handwritten digit of the split, enlarged."""
    digits = handwritten_digits(split)[label]
    digit = Image.fromarray((digits[rng.integers(len(digits))] * 255).astype(np.uint8))
    image = Image.new("L", (CANVAS, CANVAS))
    side = int(CANVAS * 0.8)
    corner = (CANVAS - side) // 2
    image.paste(digit.resize((side, side), Image.Resampling.BICUBIC), (corner, corner))
    return place(image, rng)
