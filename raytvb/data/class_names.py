"""The classes of Parquet files: one list of names for all files, whatever order each has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from raytvb.data.image_source import check_classes, check_given_classes
from raytvb.data.parquet_header import Header
from raytvb.errors import UserError, listed
from raytvb.experiment.sections.tasks import TaskConfig


@dataclass
class ClassNames:
    """The class names of a task, and the number of each file's labels among them."""

    names: tuple[str, ...]
    numbers: dict[str, list[int]] = field(default_factory=dict)
    """By the key of a file with names: the number in `names` of each of its labels."""
    places: dict[str, int] = field(default_factory=dict)
    """The number of each class by the name that labels may have: the one in the files, also where
    the task gives others."""
    warnings: list[str] = field(default_factory=list)


def class_names(task: TaskConfig, headers: Sequence[Header], where: str) -> ClassNames | None:
    """The classes of files whose headers have names; None if neither they nor the task have any.

    The longest list of the files is taken, the first of several. Labels of files with another order
    are mapped to it by name. Names that the task gives replace this list one by one.

    Raises UserError for names that can be no classes, for files with names that the longest list
    does not have, and for given names that contradict those of the files.
    """
    named = [header for header in headers if header.names is not None]
    if not named:
        if task.classes is None:
            return None
        check_classes(task, task.classes, "`classes`")
        places = {name: number for number, name in enumerate(task.classes)}
        return ClassNames(task.classes, places=places)
    for header in named:
        check_classes(task, header.names or (), f"{where}/{header.key}")
    longest = max(named, key=lambda header: len(header.names or ()))
    names = longest.names or ()
    if task.classes is not None:
        check_classes(task, task.classes, "`classes`")
        check_given_classes(task, names, f"{where}/{longest.key}")
    place = {name: number for number, name in enumerate(names)}
    given = {name: number for number, name in enumerate(task.classes or ())}
    classes = ClassNames(task.classes or names, places={**given, **place})
    reordered = []
    for header in named:
        _check_known(task, header, longest, where)
        classes.numbers[header.key] = [place[name] for name in header.names or ()]
        if header.names != names:
            reordered.append(header)
    classes.warnings += _warnings(reordered, longest, headers)
    return classes


def _check_known(task: TaskConfig, header: Header, longest: Header, where: str) -> None:
    """Raise UserError if a file has names that the longest list does not have."""
    names, known = header.names or (), longest.names or ()
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(
            f"task {task.name}: the files under {where} have other classes: {header.key} has "
            f"{listed(names)}, and {longest.key} has {listed(known)} (without {listed(unknown)}): "
            f"write them again with the same names, or name a folder with one of them in `data:`"
        )


def _warnings(reordered: Sequence[Header], longest: Header, headers: Sequence[Header]) -> list[str]:
    warnings = []
    if reordered:
        first = reordered[0]
        warnings.append(
            f"the class names have another order or number in {listed(h.key for h in reordered)} "
            f"({listed(first.names or ())}) than in {longest.key} "
            f"({listed(longest.names or ())}): labels are matched by name"
        )
    unnamed = [header.key for header in headers if header.names is None and not header.has_texts]
    if unnamed:
        warnings.append(
            f"there are no class names in {listed(unnamed)}: the labels there are taken as numbers "
            f"of the classes of {longest.key}"
        )
    return warnings
