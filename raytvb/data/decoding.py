"""Images decoded and resized for a model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice

import numpy as np
from PIL import Image, UnidentifiedImageError

from raytvb.data.image_source import Row
from raytvb.data.preprocess import Preprocess

Step = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Unreadable:
    """Why an image cannot be read."""

    reason: str


def decoded_rows(
    rows: Iterator[Row], preprocess: Preprocess, threads: int
) -> Iterator[tuple[Row, np.ndarray | Unreadable]]:
    """The rows in their order, each with its decoded image (3, S, S) uint8.

    threads: number of images that are decoded at the same time.
    """
    decode = partial(_decode, preprocess=preprocess)
    if threads <= 1:
        for row in rows:
            yield row, decode(row)
        return
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(rows, 8 * threads)):
            yield from zip(batch, pool.map(decode, batch), strict=True)


def _decode(row: Row, preprocess: Preprocess) -> np.ndarray | Unreadable:
    """An image as (3, S, S) uint8, or the reason why it cannot be read."""
    try:
        image = _eight_bits(_opened(row))
        if image.size != (preprocess.size, preprocess.size) or image.mode != "RGB":
            for step in _geometry(preprocess.config_text):
                image = step(image)
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
    except UnidentifiedImageError:
        return Unreadable("the image format is not known")
    # Pillow raises these for images that it cannot read.
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        return Unreadable(str(error) or type(error).__name__)


def _opened(row: Row) -> Image.Image:
    """The row's image, not decoded yet.

    Raises ValueError if the row has no image, and the errors of Pillow.
    """
    match row.image:
        case Image.Image():
            return row.image
        case bytes():
            return Image.open(io.BytesIO(row.image))
        case Exception():
            raise row.image
        case None:
            raise ValueError("there is no image")
        case _:
            kind = type(row.image).__name__
            raise ValueError(f"the column holds {kind}, not the bytes of an image")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image; a grey image of 16 bits is scaled to 8 bits, since Pillow would clip it at 255.

    Raises ValueError for wider pixels, whose range is not known.
    """
    is_png_grey = image.mode == "I" and image.format == "PNG"  # PNG has 16 bits at most
    if image.mode.startswith("I;16") or is_png_grey:
        scaled = np.asarray(image).astype(np.float32) / 257 + 0.5
        return Image.fromarray(scaled.astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(
            f"its pixels are {kind}, whose range is not known: save it with 8 or 16 bits"
        )
    return image


@cache
def _geometry(config: str) -> list[Step]:
    """The geometric steps of open_clip's evaluation transform (resize, crop, RGB), from its
    `preprocess_cfg` as a JSON document.
    """
    # This import takes seconds, and images of the right size do not need it.
    import open_clip.transform as clip_transform

    settings = clip_transform.PreprocessCfg(**json.loads(config))
    transform = clip_transform.image_transform_v2(settings, is_train=False)
    return list(transform.transforms[:-2])  # without ToTensor and Normalize
