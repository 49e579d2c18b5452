"""Textures: patterns that repeat over the whole canvas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raytvb.suite.canvas import CANVAS, place
from raytvb.suite.task_names import TEXTURES

Coordinate = NDArray[np.floating[Any]]
Covered = NDArray[np.bool_]


@cache
def _grid() -> tuple[Coordinate, Coordinate]:
    """x and y of every pixel, relative to the canvas's centre; both are (128, 128) float32."""
    y, x = np.mgrid[:CANVAS, :CANVAS].astype(np.float32)
    return x - CANVAS / 2, y - CANVAS / 2


@dataclass(frozen=True)
class _Wave:
    """A pattern that repeats along a coordinate; period and phase in pixels of the canvas."""

    period: float
    phase: float

    def bars(self, u: Coordinate) -> Covered:
        """Whether u is in the first half of its period."""
        return ((u + self.phase) / self.period) % 1.0 < 0.5

    def lines(self, u: Coordinate, every: float = 1.0) -> Covered:
        """Whether u is on a line. Lines are 0.3 periods wide, one in `every` periods."""
        return ((u + self.phase) / (self.period * every)) % 1.0 < 0.3 / every

    def from_middle(self, u: Coordinate) -> Coordinate:
        """Distance to the middle of u's period, with a sign and in periods: -0.5 to 0.5."""
        return (u + self.phase) / self.period % 1.0 - 0.5


def _pattern(name: str, wave: _Wave) -> Covered:
    """Boolean canvas (128, 128): where the texture covers it. Raises KeyError for other names."""
    x, y = _grid()
    rising, falling = (x + y) / math.sqrt(2.0), (x - y) / math.sqrt(2.0)
    match name:
        case "horizontal lines":
            return wave.bars(y)
        case "vertical lines":
            return wave.bars(x)
        case "rising diagonal lines":
            return wave.bars(rising)
        case "falling diagonal lines":
            return wave.bars(falling)
        case "checkerboard":
            return wave.bars(x) ^ wave.bars(y)
        case "grid of dots":
            return (wave.from_middle(x) ** 2 + wave.from_middle(y) ** 2) < 0.08
        case "square grid":
            return wave.lines(x) | wave.lines(y)
        case "concentric circles":
            return wave.bars(np.hypot(x, y))
        case "radial rays":
            return (np.arctan2(y, x) * 6 / math.pi + wave.phase / wave.period) % 1.0 < 0.5
        case "zigzag lines":
            return wave.bars(y + np.abs(wave.from_middle(x)) * wave.period * 1.6)
        case "brick wall":
            offset = wave.period * ((y + wave.phase) // wave.period % 2)
            return wave.lines(y) | wave.lines(x + offset, every=2.0)
        case "slanted grid":
            return wave.lines(rising) | wave.lines(falling)
    raise KeyError(name)


def draw_texture(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    """One of TEXTURES, with a random period and phase."""
    period = CANVAS * rng.uniform(0.2, 0.28)
    pattern = _pattern(TEXTURES[label], _Wave(period, rng.uniform(0, period)))
    return place(Image.fromarray(pattern.astype(np.uint8) * 255), rng, shift=0.0)
