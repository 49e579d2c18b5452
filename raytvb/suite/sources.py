"""Sources of the embedded suite: what an image shows, before a domain changes how it looks.

A source has 8 to 16 classes. Each call of its `draw` gives the coverage mask of one image.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytvb.suite.canvas import Draw
from raytvb.suite.characters import draw_digit, drawing_of
from raytvb.suite.shapes import (
    draw_any_shape,
    draw_clock,
    draw_dots,
    draw_position,
    draw_shape,
)
from raytvb.suite.task_names import ALPHABETS, CLASSES, COLOURS
from raytvb.suite.textures import draw_texture


@dataclass(frozen=True)
class Source:
    """One kind of drawing."""

    name: str
    classes: tuple[str, ...]
    draw: Draw
    colours: tuple[tuple[int, int, int], ...] | None = None
    """Colour of each class: red, green and blue, 0 to 255. None: colours are random."""


DRAWINGS: dict[str, Draw] = {
    **{source: drawing_of(characters) for source, characters in ALPHABETS.items()},
    "digits": draw_digit,
    "shapes": draw_shape,
    "counting": draw_dots,
    "textures": draw_texture,
    "colours": draw_any_shape,
    "clock": draw_clock,
    "position": draw_position,
}


def _sources() -> dict[str, Source]:
    sources = {}
    for name, classes in CLASSES.items():
        colours = tuple(COLOURS.values()) if name == "colours" else None
        sources[name] = Source(name, classes, DRAWINGS[name], colours)
    return sources


SOURCES = _sources()
"""Every source by its name."""
