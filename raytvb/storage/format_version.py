"""The number that says how a file is written: `format` in records and in headers of tensor files.

A store may be opened by an older raytvb than the one that wrote it. Every reader of a record or a
header first calls `format_problem`. So the user gets one clear message, and the file is not taken
for a damaged one and replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FORMAT = 3
"""The format that this version writes, and the highest that it reads.

1: the first format. 2: every record has a checksum of itself, every file of a store has a record,
and the zero-shot heads are in folders of their own. 3: a store grows. What is made again has other
file names (see `replacing`), vectors and masks too; results name what they were measured on among
their parents; and masks that all tasks share are numbered.
"""


@dataclass(frozen=True)
class FormatProblem:
    """Why a file cannot be read, and what the user can do."""

    reason: str
    remedy: str
    newer: bool
    """True if a newer raytvb wrote the file. False if its format is not a number of a format: the
    file is damaged, or a newer raytvb numbers its formats in another way.
    """

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


def format_problem(fields: Mapping[str, object], where: str) -> FormatProblem | None:
    """What is wrong with the `format` of a record or header; None if it can be read.

    fields: those of the record or header. where: the file, for the message. Files without a
    `format` are older than this field and have format 1.
    """
    number = fields.get("format", 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        return FormatProblem(
            f"{where} has the format {number!r}, which is not a format that this raytvb knows",
            "upgrade raytvb (pip install --upgrade raytvb), or restore the file if it is damaged",
            newer=False,
        )
    if number > FORMAT:
        return FormatProblem(
            f"{where} has format {number}, written by a newer raytvb; this one reads formats up "
            f"to {FORMAT}",
            "upgrade raytvb (pip install --upgrade raytvb)",
            newer=True,
        )
    return None
