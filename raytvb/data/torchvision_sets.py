"""Labelled images from torchvision's data sets."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock
from PIL import Image

from raytvb.data.image_source import TORCHVISION, Row, check_classes, check_given_classes
from raytvb.errors import UserError
from raytvb.experiment.sections.tasks import TaskConfig

Arguments = dict[str, bool | str]


@dataclass(frozen=True)
class DataSetClass:
    """A class of `torchvision.datasets`, and its arguments for each pool."""

    name: str
    pools: dict[str, Arguments]


def _by_train(name: str, **arguments: str) -> DataSetClass:
    """A class whose pools are train and test, chosen by the argument `train`."""
    train: Arguments = {"train": True, **arguments}
    test: Arguments = {"train": False, **arguments}
    return DataSetClass(name, {"train": train, "test": test})


def _by_split(name: str, *splits: str) -> DataSetClass:
    """A class whose pools are chosen by the argument `split`."""
    return DataSetClass(name, {split: {"split": split} for split in splits})


def _data_sets() -> dict[str, DataSetClass]:
    sets = {}
    for name in ("MNIST", "FashionMNIST", "KMNIST", "USPS", "CIFAR10", "CIFAR100"):
        sets[name] = _by_train(name)
    for part in ("balanced", "byclass", "bymerge", "digits", "letters"):
        sets[f"EMNIST-{part}"] = _by_train("EMNIST", split=part)
    for name in ("SVHN", "STL10", "Food101", "GTSRB", "StanfordCars", "FER2013"):
        sets[name] = _by_split(name, "train", "test")
    for name in ("DTD", "Flowers102", "PCAM", "RenderedSST2", "FGVCAircraft"):
        sets[name] = _by_split(name, "train", "val", "test")
    for name in ("ImageNet", "Imagenette"):
        sets[name] = _by_split(name, "train", "val")
    sets["Country211"] = _by_split("Country211", "train", "valid", "test")
    sets["OxfordIIITPet"] = _by_split("OxfordIIITPet", "trainval", "test")
    for name in ("EuroSAT", "SUN397", "Caltech101", "Caltech256"):
        sets[name] = DataSetClass(name, {"": {}})
    return sets


DATA_SETS = _data_sets()
"""Data sets by the name that follows `torchvision:`."""


class _ImageDataSet(Protocol):
    """The methods of torchvision's data sets that are used here."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[object, int]: ...


class TorchvisionSource:
    """A data set of torchvision. It is downloaded into its root unless it is there."""

    def __init__(self, task: TaskConfig, root: Path) -> None:
        """Downloads nothing yet. Raises UserError for a name that is not in DATA_SETS."""
        name = (task.data or "").removeprefix(TORCHVISION).strip("/")
        if name not in DATA_SETS:
            raise UserError(
                f"task {task.name}: torchvision data set {name!r} is not known here; there are "
                f"{', '.join(sorted(DATA_SETS))}"
            )
        self._task = task
        self._name = name
        self._root = root
        self._opened: dict[str, _ImageDataSet] = {}
        self.left_out: dict[str, int] = {}
        self.warnings: list[str] = []
        self.where = f"torchvision's {name} in {root}"

    @property
    def pools(self) -> tuple[str, ...]:
        """torchvision's own names for the splits."""
        return tuple(DATA_SETS[self._name].pools)

    def _data_set(self, pool: str) -> _ImageDataSet:
        """The data set of a pool, downloaded and opened at first use. Raises UserError if that
        fails.
        """
        if pool not in self._opened:
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                # The lock makes other workers of this machine wait.
                with FileLock(str(self._root / f".{self._name}.lock")):
                    self._opened[pool] = self._open(pool)
            # Network, server and archive errors: torchvision has no common class for them.
            except Exception as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"task {self._task.name}: torchvision cannot get {self._name}: put its files "
                    f"under {self._root} yourself, or set `root:` to their folder ({reason:.300})"
                ) from error
        return self._opened[pool]

    def _open(self, pool: str) -> _ImageDataSet:
        import torchvision.datasets  # takes seconds

        entry = DATA_SETS[self._name]
        data_set_class = getattr(torchvision.datasets, entry.name)
        parameters = inspect.signature(data_set_class.__init__).parameters
        arguments = dict(entry.pools[pool])
        # ImageNet passes its keywords on, but has no `download`.
        if "download" in parameters or ("kwargs" in parameters and entry.name != "ImageNet"):
            arguments["download"] = True
        data_set: _ImageDataSet = data_set_class(str(self._root), **arguments)
        return data_set

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names that the task gives, else torchvision's. Raises UserError if both are
        missing, and for given names that contradict torchvision's.
        """
        found = getattr(self._data_set(self.pools[0]), "classes", None) or ()
        # ImageNet has several names for a class; the first is the best known.
        names = tuple(name if isinstance(name, str) else name[0] for name in found)
        given = self._task.classes
        if given is not None and names:
            check_given_classes(self._task, names, f"torchvision's {self._name}")
        if not (given or names):
            raise UserError(
                f"task {self._task.name}: torchvision has no class names for {self._name}; give "
                f"them as `classes: [...]` of the task"
            )
        check_classes(self._task, given or names, "`classes`" if given else self.where)
        return given or names

    def count(self, pool: str) -> int:
        """Number of images in a pool."""
        return len(self._data_set(pool))

    def labels(self, pool: str, positions: Sequence[int]) -> Iterator[object]:
        """The labels at these positions. Some data sets give them only with their images."""
        data_set = self._data_set(pool)
        for name in ("targets", "labels", "_labels"):
            labels = getattr(data_set, name, None)
            if labels is not None and len(labels) == len(data_set):
                yield from (int(labels[position]) for position in positions)
                return
        for row in self.rows(pool, positions):
            yield row.label

    def rows(self, pool: str, positions: Sequence[int]) -> Iterator[Row]:
        """The images at these positions, in torchvision's order, opened one by one."""
        data_set = self._data_set(pool)
        for position in positions:
            name = f"{self._name} {pool} image {position}".replace("  ", " ")
            try:
                image, label = data_set[position]
            except FileNotFoundError as error:
                raise UserError(f"task {self._task.name}: {name} is missing: {error}") from None
            except IndexError:
                raise UserError(
                    f"task {self._task.name}: {name} has no label or no pixels, so the data set's "
                    f"files contradict each other: get them again"
                ) from None
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                yield Row(name, error, 0)
            else:
                yield Row(name, image, int(label))
