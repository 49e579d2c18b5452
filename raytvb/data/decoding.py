"""Images decoded and resized for a model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from raytvb.data.preprocess import Preprocess
from raytvb.data.source import Row


@cache
def _geometry(document: str) -> list[Any]:
    """The geometric part of open_clip's evaluation transform (resize, crop, RGB), from its
    configuration as JSON.
    """
    import open_clip.transform as clip_transform  # takes seconds to import; images of the right size do without

    config = clip_transform.PreprocessCfg(**json.loads(document))
    transform = clip_transform.image_transform_v2(config, is_train=False)
    return list(transform.transforms[:-2])  # without ToTensor and Normalize


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits scaled to 8, where Pillow would cut off at 255. ValueError for wider
    ones.
    """
    if image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PNG"
    ):  # PNG has 16 bits at most
        return Image.fromarray((np.asarray(image).astype(np.float32) / 257 + 0.5).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are {'floats' if image.mode == 'F' else '32-bit integers'}, whose range is not "
            f"known: save it with 8 or 16 bits"
        )
    return image


def _decode(row: Row, preprocess: Preprocess) -> np.ndarray | str:
    """An image as (3, S, S) uint8, or the reason why it cannot be read."""
    try:
        if isinstance(row.image, Exception):
            raise row.image
        if row.image is None:
            return "there is no image"
        if not isinstance(row.image, bytes | Image.Image):
            return f"the column holds {type(row.image).__name__}, not the bytes of an image"
        image = (
            row.image if isinstance(row.image, Image.Image) else Image.open(io.BytesIO(row.image))
        )
        image = _eight_bits(image)
        if image.size != (preprocess.size, preprocess.size) or image.mode != "RGB":
            for step in _geometry(json.dumps(dict(preprocess.config))):
                image = step(image)
        return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
    except UnidentifiedImageError:
        return "no format that is known"
    except (
        OSError,
        SyntaxError,
        TypeError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # what Pillow raises
        return str(error) or type(error).__name__


def decoded_rows(
    rows: Iterator[Row], preprocess: Preprocess, threads: int
) -> Iterator[tuple[Row, np.ndarray | str]]:
    """Rows with their decoded images, in their order; Pillow lets threads decode side by side."""
    decode = partial(_decode, preprocess=preprocess)
    if threads <= 1:
        yield from ((row, decode(row)) for row in rows)
        return
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(rows, 8 * threads)):
            yield from zip(some, pool.map(decode, some), strict=True)
