"""Domains of the embedded suite: how an image looks.

A domain is a function that degrades an image: (image (32, 32, 3) float32 in [0, 1], strength in
[0, 1], rng) -> image of the same shape. Tasks use strength 1. Pretraining uses only strengths up to
0.4, so that fine-tuning has something to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from raytvb.suite.canvas import SIZE

Domain = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8))


def _from_pil(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255.0


def _edge_colour(image: np.ndarray) -> tuple[int, int, int]:
    """Colour of the first pixel. It fills the corners of an image that was turned or slanted."""
    red, green, blue = image[0, 0].clip(0, 1)
    return int(255 * red), int(255 * green), int(255 * blue)


def _smooth_field(rng: np.random.Generator, cells: int, channels: int = 1) -> np.ndarray:
    """Random field in [0, 1] that varies over about 32/cells pixels, shape (32, 32, channels)."""
    coarse = rng.random((channels, cells, cells), dtype=np.float32)
    planes = []
    for plane in coarse:
        smooth = Image.fromarray(plane).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        planes.append(np.asarray(smooth))
    field: np.ndarray = np.clip(np.stack(planes, axis=-1), 0.0, 1.0)
    return field


def noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise on every channel."""
    grain = rng.standard_normal(image.shape, dtype=np.float32) * (0.25 * strength)
    noisy: np.ndarray = image + grain
    return noisy


def blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Separable Gaussian blur with sigma up to 2.2 pixels."""
    sigma = max(strength * rng.uniform(1.8, 2.2), 1e-3)
    reach = np.arange(SIZE)[:, None] - np.arange(SIZE)[None, :]
    kernel = np.exp(-0.5 * (reach / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum(axis=1, keepdims=True)
    blurred: np.ndarray = np.einsum("ij,jkc,lk->ilc", kernel, image, kernel, optimize=True)
    return blurred


def stripes(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Opaque parallel bars of random direction and colour."""
    angle, period = rng.uniform(0, math.pi), rng.uniform(5.0, 7.0)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    wave = ((x * math.cos(angle) + y * math.sin(angle) + rng.uniform(0, period)) / period) % 1.0
    cover = (wave < 0.45).astype(np.float32)[..., None] * (0.85 * strength)
    striped: np.ndarray = image * (1 - cover) + cover * rng.random(3, dtype=np.float32)
    return striped


def contrast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Contrast reduced to as little as 12 %, plus a little noise that is not reduced."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    flat = mean + (image - mean) * (1.0 - 0.88 * strength)
    grain = rng.standard_normal(image.shape, dtype=np.float32) * (0.03 * strength)
    faded: np.ndarray = flat + grain
    return faded


def occlusion(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Three opaque blocks."""
    image = image.copy()
    for _ in range(3):
        side = max(1, round(strength * rng.uniform(8, 12)))
        x, y = rng.integers(0, SIZE - side + 1, 2)
        image[y : y + side, x : x + side] = rng.random(3, dtype=np.float32)
    return image


def pixelation(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Averaged down to 8 or 9 pixels on a side, and enlarged again with hard edges."""
    side = round(SIZE - strength * (SIZE - rng.integers(8, 10)))
    small = _to_pil(image).resize((side, side), Image.Resampling.BOX)
    return _from_pil(small.resize((SIZE, SIZE), Image.Resampling.NEAREST))


def saltpepper(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Up to 35 % of the pixels set to black or white."""
    image = image.copy()
    hit = rng.random(image.shape[:2]) < 0.35 * strength
    image[hit] = (rng.random(int(hit.sum())) < 0.5)[:, None]
    return image


def clutter(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Random thin line segments, as light as the foreground."""
    image = image.copy()
    for _ in range(round(10 * strength)):
        start, end = rng.uniform(0, SIZE - 1, (2, 2))
        points = np.rint(start + (end - start) * np.linspace(0, 1, SIZE)[:, None]).astype(int)
        image[points[:, 0], points[:, 1]] = rng.uniform(0.4, 1.0, 3)
    return image


def fog(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A light, uneven veil that covers most of the contrast."""
    veil = (0.55 + 0.42 * _smooth_field(rng, 4)) * strength
    return image * (1 - veil) + veil * rng.uniform(0.75, 0.95)


def shear(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Slanted by up to 0.8, to either side."""
    slant = strength * rng.uniform(0.6, 0.8) * rng.choice((-1.0, 1.0))
    moved = _to_pil(image).transform(
        (SIZE, SIZE),
        Image.Transform.AFFINE,
        (1, slant, -slant * SIZE / 2, 0, 1, 0),
        resample=Image.Resampling.BILINEAR,
        fillcolor=_edge_colour(image),
    )
    return _from_pil(moved)


def rotation(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Turned by up to 60 degrees, either way."""
    angle = strength * rng.uniform(40, 60) * rng.choice((-1.0, 1.0))
    return _from_pil(
        _to_pil(image).rotate(angle, Image.Resampling.BILINEAR, fillcolor=_edge_colour(image))
    )


def photo(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The picture as a faint print over a smooth, colourful scene with grain."""
    scene = _smooth_field(rng, 6, channels=3)
    grain = rng.standard_normal(image.shape, dtype=np.float32) * (0.06 * strength)
    share = 0.6 * strength
    return image * (1 - share) + scene * share + grain


DOMAINS: dict[str, Domain] = {
    "noise": noise,
    "blur": blur,
    "stripes": stripes,
    "contrast": contrast,
    "occlusion": occlusion,
    "pixelation": pixelation,
    "saltpepper": saltpepper,
    "clutter": clutter,
    "fog": fog,
    "shear": shear,
    "rotation": rotation,
    "photo": photo,
}
"""Every domain by its name, in the order of `task_names.DOMAIN_NAMES`."""
