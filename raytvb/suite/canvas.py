"""The canvas that foregrounds are drawn on. Its side is four times that of an image, and it is
averaged down when the drawing is placed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32
"""Side of an image in pixels."""

SUPERSAMPLE = 4
"""Pixels of the canvas along the side of a pixel of the image."""

CANVAS = SIZE * SUPERSAMPLE
"""Side of the canvas in its own pixels."""

Draw = Callable[[int, np.random.Generator, str], np.ndarray]
"""(label, rng, split) to a coverage mask (32, 32) float32 in [0, 1]: 1 where the foreground covers
the pixel."""


def blank_canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty canvas and a pen for it."""
    image = Image.new("L", (CANVAS, CANVAS))
    return image, ImageDraw.Draw(image)


def box(
    radius: float, x: float = CANVAS / 2, y: float = CANVAS / 2
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a square with centre (x, y); `radius` is half its side."""
    return x - radius, y - radius, x + radius, y + radius


def polygon(radii: Sequence[float]) -> list[tuple[float, float]]:
    """Corners at these distances from the canvas's centre, at even angles. The first one is
    straight above the centre.
    """
    corners = []
    for k, radius in enumerate(radii):
        angle = 2 * math.pi * k / len(radii) - math.pi / 2
        corners.append(
            (CANVAS / 2 + radius * math.cos(angle), CANVAS / 2 + radius * math.sin(angle))
        )
    return corners


def place(
    image: Image.Image, rng: np.random.Generator, *, turn: float = 5.0, shift: float = 1.5
) -> np.ndarray:
    """The coverage mask (32, 32) float32 in [0, 1] of a canvas.

    The canvas is rotated by up to `turn` degrees, moved by up to `shift` pixels of the image,
    scaled by up to 8 %, and averaged down.
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
