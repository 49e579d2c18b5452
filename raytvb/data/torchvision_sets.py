"""Labelled images of torchvision's data sets."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image

from raytvb.data.source import TORCHVISION, Row
from raytvb.errors import UserError
from raytvb.experiment.tasks import TaskConfig


def _by_train(name: str, **options: Any) -> tuple[str, dict[str, dict[str, Any]]]:
    return name, {"train": {"train": True, **options}, "test": {"train": False, **options}}


def _by_split(name: str, *splits: str) -> tuple[str, dict[str, dict[str, Any]]]:
    return name, {s: {"split": s} for s in splits}


# Our name -> class in torchvision.datasets and its arguments by pool.
DATA_SETS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    **{n: _by_train(n) for n in ("MNIST", "FashionMNIST", "KMNIST", "USPS", "CIFAR10", "CIFAR100")},
    **{
        f"EMNIST-{s}": _by_train("EMNIST", split=s)
        for s in ("balanced", "byclass", "bymerge", "digits", "letters")
    },
    **{
        n: _by_split(n, "train", "test")
        for n in ("SVHN", "STL10", "Food101", "GTSRB", "StanfordCars", "FER2013")
    },
    **{
        n: _by_split(n, "train", "val", "test")
        for n in ("DTD", "Flowers102", "PCAM", "RenderedSST2", "FGVCAircraft")
    },
    **{n: _by_split(n, "train", "val") for n in ("ImageNet", "Imagenette")},
    "Country211": _by_split("Country211", "train", "valid", "test"),
    "OxfordIIITPet": _by_split("OxfordIIITPet", "trainval", "test"),
    **{n: (n, {"": {}}) for n in ("EuroSAT", "SUN397", "Caltech101", "Caltech256")},
}


class TorchvisionSource:
    """A data set of torchvision by name, downloaded into its root unless it is there."""

    def __init__(self, task: TaskConfig, root: Path) -> None:
        name = (task.data or "").removeprefix(TORCHVISION).strip("/")
        if name not in DATA_SETS:
            raise UserError(
                f"task {task.name}: torchvision data set {name!r} is not known here; there are "
                f"{', '.join(sorted(DATA_SETS))}"
            )
        self._task, self._name, self._root = task, name, root
        self._made: dict[str, Any] = {}
        self.where = f"torchvision's {name} in {root}"

    @property
    def pools(self) -> tuple[str, ...]:
        """torchvision's own names of the splits."""
        return tuple(DATA_SETS[self._name][1])

    def _data_set(self, pool: str) -> Any:
        if pool not in self._made:
            import torchvision.datasets

            name, options = DATA_SETS[self._name]
            kind = getattr(torchvision.datasets, name)
            takes = inspect.signature(kind.__init__).parameters
            downloads = "download" in takes or ("kwargs" in takes and name != "ImageNet")
            arguments = options[pool] | ({"download": True} if downloads else {})
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                with FileLock(
                    str(self._root / f".{self._name}.lock")
                ):  # other workers of this machine wait
                    self._made[pool] = kind(str(self._root), **arguments)
            except Exception as error:  # of the network, of a server, of an archive: torchvision has no common class
                raise UserError(
                    f"task {self._task.name}: torchvision cannot get {self._name}: {error}. Put its files "
                    f"under {self._root} yourself, or give `root:`, where they are"
                ) from error
        return self._made[pool]

    @property
    def classes(self) -> tuple[str, ...]:
        """torchvision's class names, where it has them, unless the task gives them."""
        if self._task.classes is not None:
            return self._task.classes
        found = getattr(self._data_set(self.pools[0]), "classes", None)
        if not found:
            raise UserError(
                f"task {self._task.name}: torchvision has no class names for {self._name}; give them as "
                f"`classes: [...]` of the task"
            )
        # ImageNet has several names for a class; the first is the best known.
        return tuple(c if isinstance(c, str) else c[0] for c in found)

    def count(self, pool: str) -> int:
        """Images of the data set."""
        return len(self._data_set(pool))

    def rows(self, pool: str, wanted: Sequence[int]) -> Iterator[Row]:
        """Images in torchvision's order, opened one by one."""
        data_set = self._data_set(pool)
        for number in wanted:
            name = f"{self._name} {pool} image {number}".replace("  ", " ")
            try:
                image, label = data_set[number]
            except FileNotFoundError as error:
                raise UserError(f"task {self._task.name}: {name} is missing: {error}") from None
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                yield Row(name, error, 0)
            else:
                yield Row(name, image, int(label))
