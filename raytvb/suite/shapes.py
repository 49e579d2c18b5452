"""Figures drawn with a pen: shapes, dots to count, clock hands, a disc beside a block."""

from __future__ import annotations

import math

import numpy as np
from PIL import ImageDraw

from raytvb.suite.canvas import CANVAS, SUPERSAMPLE, blank_canvas, box, place, polygon
from raytvb.suite.task_names import POSITIONS, SHAPES

CENTRE = CANVAS / 2
CORNERS = {"triangle": 3, "diamond": 4, "pentagon": 5, "hexagon": 6}


def draw_shape(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    """One of SHAPES, filled."""
    image, pen = blank_canvas()
    _fill_shape(pen, SHAPES[label], CANVAS * rng.uniform(0.28, 0.38))
    return place(image, rng)


def draw_any_shape(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    """A random one of SHAPES. The label only decides the colour, which the source `colours` has."""
    return draw_shape(int(rng.integers(len(SHAPES))), rng, split)


def _fill_shape(pen: ImageDraw.ImageDraw, name: str, radius: float) -> None:
    match name:
        case "circle":
            pen.ellipse(box(radius), fill=255)
        case "square":
            pen.rectangle(box(radius * 0.8), fill=255)
        case "star":
            pen.polygon(polygon([radius, radius * 0.42] * 5), fill=255)
        case "cross":
            _fill_cross(pen, radius)
        case "ring":
            pen.ellipse(box(radius), outline=255, width=int(radius * 0.35))
        case "crescent":
            pen.ellipse(box(radius), fill=255)
            pen.ellipse(box(radius * 0.9, CENTRE + radius * 0.45), fill=0)
        case "half disc":
            pen.pieslice(box(radius), 180, 360, fill=255)
        case "heart":
            _fill_heart(pen, radius)
        case _:
            pen.polygon(polygon([radius] * CORNERS[name]), fill=255)


def _fill_cross(pen: ImageDraw.ImageDraw, radius: float) -> None:
    near, far = radius / 3, radius
    pen.rectangle((CENTRE - far, CENTRE - near, CENTRE + far, CENTRE + near), fill=255)
    pen.rectangle((CENTRE - near, CENTRE - far, CENTRE + near, CENTRE + far), fill=255)


def _fill_heart(pen: ImageDraw.ImageDraw, radius: float) -> None:
    """Two discs above a triangle."""
    left, right = CENTRE - radius * 0.45, CENTRE + radius * 0.45
    pen.ellipse(box(radius * 0.52, left, CENTRE - radius * 0.35), fill=255)
    pen.ellipse(box(radius * 0.52, right, CENTRE - radius * 0.35), fill=255)
    shoulder = CENTRE - radius * 0.1
    tip = (CENTRE, CENTRE + radius)
    pen.polygon(
        [(CENTRE - radius * 0.92, shoulder), (CENTRE + radius * 0.92, shoulder), tip], fill=255
    )


def draw_dots(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    """label + 1 dots that do not touch, on a jittered 3x3 grid."""
    image, pen = blank_canvas()
    for cell in rng.permutation(9)[: label + 1]:
        column, row = divmod(int(cell), 3)
        jitter_x, jitter_y = rng.uniform(-0.04, 0.04, 2) * CANVAS
        radius = CANVAS * rng.uniform(0.07, 0.09)
        pen.ellipse(box(radius, _cell(column) + jitter_x, _cell(row) + jitter_y), fill=255)
    return place(image, rng, turn=2.0, shift=0.5)


def _cell(number: int) -> float:
    """Centre of the first, second or third cell along a side of the canvas."""
    return (number + 0.5) * CANVAS / 3.6 + CANVAS * 0.083


def draw_clock(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    """A clock face with one hand, which points to label + 1."""
    image, pen = blank_canvas()
    radius = CANVAS * rng.uniform(0.36, 0.42)
    pen.ellipse(box(radius), outline=255, width=SUPERSAMPLE + 1)
    angle = 2 * math.pi * (label + 1) / 12 - math.pi / 2
    tip = CENTRE + 0.78 * radius * math.cos(angle), CENTRE + 0.78 * radius * math.sin(angle)
    pen.line((CENTRE, CENTRE, *tip), fill=255, width=int(SUPERSAMPLE * 2.2))
    pen.ellipse(box(SUPERSAMPLE * 2.0, CENTRE, CENTRE), fill=255)
    return place(image, rng, turn=3.0)


def draw_position(label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    """A block, and a disc in one of POSITIONS relative to the block."""
    image, pen = blank_canvas()
    dx, dy = list(POSITIONS.values())[label]
    distance = CANVAS * 0.36
    if dx and dy:
        distance = distance / math.hypot(dx, dy) * 1.25
    x, y = CENTRE - dx * distance / 2, CENTRE - dy * distance / 2
    pen.rectangle(box(CANVAS * rng.uniform(0.12, 0.15), x, y), fill=255)
    disc_radius = CANVAS * rng.uniform(0.08, 0.1)
    pen.ellipse(box(disc_radius, x + dx * distance, y + dy * distance), fill=255)
    return place(image, rng)
