"""A split read, decoded and resized. Decoded images lie in a temporary file that is mapped into
memory, so the system drops and rereads them as it needs to."""

from __future__ import annotations

import tempfile

import numpy as np
import torch

from raytvb.data.decoding import decoded_rows
from raytvb.data.preprocess import Preprocess
from raytvb.data.source import Row
from raytvb.data.splits import Split, require_split, split_parts, task_source
from raytvb.errors import UserError
from raytvb.experiment.tasks import TaskConfig


def load_split(
    task: TaskConfig,
    split: str,
    preprocess: Preprocess,
    *,
    threads: int = 1,
    sample: int | None = None,
    generator: torch.Generator | None = None,
) -> Split:
    """Read, decode and resize a split, or `sample` images of it that `generator` draws, in the
    order of the draw.

    The images lie in an unnamed temporary file ($TMPDIR) of N * 3 * S * S bytes, mapped into
    memory. Images that cannot be read are counted and left out. Raises UserError for a split that
    is not there or empty, a label outside the classes, and more unreadable images than the task's
    `max_corrupt`.
    """
    source = task_source(task)
    classes, parts = source.classes, split_parts(task, source)
    require_split(task, source, parts, split)
    members = parts[split].members(source, task.splits.seed)
    if not len(members):
        raise UserError(f"task {task.name}: the {split} split under {source.where} is empty")
    if sample is not None:
        members = members[torch.randperm(len(members), generator=generator)[:sample].numpy()]
    wanted = np.sort(members)
    labels, kept, skipped = list[int](), list[int](), list[str]()
    with tempfile.TemporaryFile(prefix="raytvb-images-") as file:
        rows = source.rows(parts[split].pool, wanted.tolist())
        for position, (row, image) in zip(
            wanted, decoded_rows(rows, preprocess, threads), strict=True
        ):
            if isinstance(image, str):
                skipped.append(f"{row.name} is not a readable image: {image}")
                if len(skipped) > task.max_corrupt:
                    raise UserError(
                        f"task {task.name}: {skipped[0]}"
                        + (f", and {len(skipped) - 1} more of {split}" if len(skipped) > 1 else "")
                        + f"; up to `max_corrupt: {task.max_corrupt}` of a split are skipped"
                    )
                continue
            labels.append(_label(task, row, classes))
            kept.append(int(position))
            file.write(image.data)
        if not kept:
            raise UserError(
                f"task {task.name}: the {split} split under {source.where} is empty: {skipped[0]}"
            )
        file.flush()
        shape = (len(kept), 3, preprocess.size, preprocess.size)
        images = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=shape))
    found = Split(images, torch.tensor(labels, dtype=torch.int64), classes, len(skipped))
    if sample is None:
        return found
    place = {position: k for k, position in enumerate(kept)}
    order = torch.tensor([place[int(m)] for m in members if int(m) in place])
    return Split(found.images[order], found.labels[order], classes, len(skipped))


def _label(task: TaskConfig, row: Row, classes: tuple[str, ...]) -> int:
    if isinstance(row.label, str) and row.label in classes:
        return classes.index(row.label)
    if not isinstance(row.label, int):
        raise UserError(
            f"task {task.name}: {row.name} has label {row.label!r}; labels are integers, 0 for the first "
            f"class, or names of `classes`"
        )
    if not 0 <= row.label < len(classes):
        raise UserError(
            f"task {task.name}: {row.name} has label {row.label!r}, but there are {len(classes)} classes"
        )
    return int(row.label)
