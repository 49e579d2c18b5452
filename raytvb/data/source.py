"""Where labelled images come from: Parquet files, folders with a folder per class, and
torchvision's data sets.

Parquet is read as the CLIP task collections on the Hugging Face hub have it: an image column of
`{bytes, path}` structs or binary, a label column of integers, class names in the `huggingface`
entry of the Arrow schema metadata. Folders and Parquet may lie under any fsspec URL (s3://,
hf://datasets/OWNER/NAME). A source has one or several *pools* of images (train, validation,
test...; the pool '' where there are no names), read in one pass with a bounded part in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from raytvb.experiment.tasks import TaskConfig

TORCHVISION = "torchvision:"


SPLITS = ("train", "val", "test")


ALIASES = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


ROWS_AT_ONCE = 64  # encoded images in memory: what one read asks for


@dataclass(frozen=True)
class Row:
    """One image, encoded or opened or the reason why there is none, with its label; `name` is for
    messages.
    """

    name: str
    image: bytes | Image.Image | Exception | None
    label: Any


class Source(Protocol):
    """Labelled images in one or several pools."""

    where: str

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of the pools; '' for the one pool of data without named splits."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names. Raises UserError where there are none."""

    def count(self, pool: str) -> int:
        """Images of a pool, readable or not."""

    def rows(self, pool: str, wanted: Sequence[int]) -> Iterator[Row]:
        """The images at some positions of a pool, which rise; little else is read."""


KNOWN_POOLS = frozenset(alias for aliases in ALIASES.values() for alias in aliases)


def pools_of(
    task: TaskConfig, keys: Sequence[str], name: Callable[[str], str]
) -> dict[str, list[str]]:
    """Keys by the name of their pool: a usual one, in lower case, or one that the task asks for;
    else '' for all.
    """
    named: dict[str, list[str]] = {}
    for key in keys:
        found = name(key)
        named.setdefault(found.lower() if found.lower() in KNOWN_POOLS else found, []).append(key)
    asked = {
        s for s in (task.splits.train, task.splits.val, task.splits.test) if isinstance(s, str)
    }
    return named if (KNOWN_POOLS | asked) & named.keys() else {"": list(keys)}
