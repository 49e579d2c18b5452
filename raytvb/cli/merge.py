"""`raytvb merge`: any mix of tasks, or of basis vectors, as an open_clip folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import click

from raytvb.cli.options import MERGE_METHOD, open_store, store_argument
from raytvb.errors import UserError, shortened

if TYPE_CHECKING:
    from raytvb.merging.addends import Addends
    from raytvb.merging.merge import Merged

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")

LONGEST_NAME = 200
"""Characters of a task's name."""

Weighted = list[tuple[str, float]]
"""Names with their weights, in the order of the command line. A name may appear more than once."""


def _weights(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Weighted:
    """The values of an option, `NAME` or `NAME=WEIGHT`, as pairs. Without a weight it is 1."""
    parsed = []
    for value in values:
        name, separator, weight = value.partition("=")
        if not name.strip():
            raise click.BadParameter(f"{value!r} has no name: use NAME or NAME=WEIGHT")
        number = 1.0
        if separator:
            number = float(weight) if _NUMBER.fullmatch(weight) else math.nan
        if not math.isfinite(number):
            raise click.BadParameter(
                f"{value[:200]!r}: use NAME or NAME=WEIGHT, with a finite number"
            )
        parsed.append((name, number))
    return parsed


@click.command()
@store_argument
@click.option(
    "--add",
    multiple=True,
    metavar="TASK[=WEIGHT]",
    callback=_weights,
    help="Add a task's vector; repeatable.",
)
@click.option(
    "--negate",
    multiple=True,
    metavar="TASK[=WEIGHT]",
    callback=_weights,
    help="Subtract a task's vector, so that the model forgets the task; repeatable.",
)
@click.option(
    "--analogy", nargs=3, metavar="A B C", help="Add the task vectors A - B + C of three tasks."
)
@click.option(
    "--basis",
    help="Basis to decode the vectors from, as `raytvb ls` lists it (ae-m4), or `full` for the "
    "task vectors themselves. Default: the basis that the search chose.",
)
@click.option(
    "--merge",
    "kind",
    type=click.Choice(["decoded", "sum"]),
    default="decoded",
    show_default=True,
    help="decoded: decode the vectors of the named tasks from the basis, and merge those. sum: the "
    "plain sum of the basis vectors, which adds all tasks; only for bases whose vectors are convex "
    "combinations of task vectors.",
)
@click.option(
    "--method",
    type=MERGE_METHOD,
    default="sum",
    show_default=True,
    help="Merge method, with the settings of its paper: how the task vectors become one vector.",
)
@click.option(
    "--vector",
    "vectors",
    multiple=True,
    metavar="NUMBER[=WEIGHT]",
    callback=_weights,
    help="Add a basis vector, numbered from 1, instead of a task; repeatable.",
)
@click.option(
    "--coefficient",
    type=float,
    help="Factor on the whole merge. Default: the value that the search chose on validation images "
    "for that many tasks; 1 with --vector. For --negate, the report lists the coefficient that was "
    "chosen for each task.",
)
@click.option(
    "--lengths",
    type=click.Choice(["projected", "own"]),
    help="Lengths of the vectors that are decoded from a basis. projected: as they are decoded. "
    "own: stretched to the lengths of the task vectors. Default: what the search chose together "
    "with the coefficient on validation images; projected if --coefficient is given.",
)
@click.option(
    "--out",
    required=True,
    metavar="FOLDER",
    help="Folder to write. It must be empty, or not exist, and lie outside of every store.",
)
@click.option("--overwrite", is_flag=True, help="Replace the model that the folder holds.")
def merge(
    store: str,
    add: Weighted,
    negate: Weighted,
    analogy: tuple[str, str, str] | None,
    basis: str | None,
    kind: Literal["decoded", "sum"],
    method: str,
    vectors: Weighted,
    coefficient: float | None,
    lengths: Literal["projected", "own"] | None,
    out: str,
    overwrite: bool,
) -> None:
    """Write any mix of tasks as an open_clip folder.

    Load it with open_clip as the model `local-dir:OUT`.

    \b
    raytvb merge raytvb-quickstart --add glyphs/greek-blur --add glyphs/latin-fog --out merged/
    raytvb merge s3://bucket/prefix --negate cars --basis full --coefficient 0.5 --out forgot/
    raytvb merge s3://bucket/prefix --analogy cars trucks birds --out analogy/
    raytvb merge raytvb-quickstart --merge sum --basis ae-m4 --out all/
    raytvb merge s3://bucket/prefix --add cars --add birds --method ties --basis full --out ties/
    raytvb merge raytvb-quickstart --basis svd-m4 --vector 1=0.8 --vector 3=-0.2 --out mixed/
    """
    tasks = _mix_of_tasks(add, negate, analogy)
    numbers = _numbered(vectors)
    _check_request(tasks, numbers, kind, method)
    _check_names(tasks, basis)
    if coefficient is not None and not math.isfinite(coefficient):
        raise UserError(f"--coefficient {coefficient}: use a finite number")
    from raytvb.merging.merge import merge as merge_tasks
    from raytvb.models.open_clip_package import quiet_open_clip

    quiet_open_clip()
    merged = merge_tasks(
        open_store(store),
        _addends(tasks, numbers, method, lengths),
        out,
        basis=basis,
        coefficient=coefficient,
        overwrite=overwrite,
    )
    if basis is None and not merged.searched:
        print("no basis has been chosen yet (`raytvb run` does): merged from the full vectors")
    print(_description(merged, tasks, numbers, method, out))
    print(f"open_clip.create_model('local-dir:{out}')")


def _mix_of_tasks(
    add: Weighted, negate: Weighted, analogy: tuple[str, str, str] | None
) -> dict[str, float]:
    """The weight of each named task. A task that is named twice gets the sum of both weights."""
    terms = [*add, *((name, -weight) for name, weight in negate)]
    if analogy:
        plus, minus, target = analogy
        terms += [(plus, 1.0), (minus, -1.0), (target, 1.0)]
    return _summed(terms)


def _numbered(vectors: Weighted) -> dict[int, float]:
    """The weight of each named basis vector, by its number from 1."""
    for number, _ in vectors:
        if not re.fullmatch("[0-9]{1,9}", number):
            raise UserError(f"--vector {shortened(number)}: use a whole number, 1 or more")
    return {int(number): weight for number, weight in _summed(vectors).items()}


def _summed(terms: Weighted) -> dict[str, float]:
    weights: dict[str, float] = {}
    for name, weight in terms:
        weights[name] = weights.get(name, 0.0) + weight
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise UserError(f"the weights of {name} add up to {weight}: use smaller ones")
    return weights


def _check_request(
    tasks: Mapping[str, float], numbers: Mapping[int, float], kind: str, method: str
) -> None:
    """Raise UserError unless the request names exactly one kind of sum, and it is not empty."""
    requests = sum((bool(tasks), bool(numbers), kind == "sum"))
    if requests > 1:
        raise UserError(
            "tasks (--add, --negate, --analogy), `--merge sum` and --vector cannot be combined: "
            "use one"
        )
    if not requests:
        raise UserError(
            "name tasks with --add, --negate or --analogy (`raytvb ls STORE` lists them); or name "
            "no tasks, and add all with `--merge sum` or basis vectors with --vector"
        )
    if tasks and not any(tasks.values()):
        raise UserError("the weights of the tasks cancel out: nothing would be merged")
    if method != "sum" and not tasks:
        raise UserError(
            f"--method {method} merges tasks: name them with --add, --negate or --analogy"
        )


def _check_names(tasks: Mapping[str, float], basis: str | None) -> None:
    """Raise UserError for what cannot be the name of a task or a basis of any store."""
    for name in tasks:
        if len(name) > LONGEST_NAME or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name):
            raise UserError(
                f"task {shortened(name)}: use a name that `raytvb ls STORE` lists below vectors/"
            )
    if basis is not None and not re.fullmatch(r"\w[\w.-]{0,99}", basis):
        raise UserError(
            f"--basis {shortened(basis)}: use a name that `raytvb ls STORE` lists below basis/, "
            f"such as ae-m4, or full"
        )


def _addends(
    tasks: Mapping[str, float],
    numbers: Mapping[int, float],
    method: str,
    lengths: Literal["projected", "own"] | None,
) -> Addends:
    """What the merge adds, for a request that has been checked."""
    from raytvb.merging.addends import BasisSum, BasisVectors, Tasks

    if tasks:
        return Tasks(tasks, method, lengths)
    return BasisVectors(numbers) if numbers else BasisSum()


def _description(
    merged: Merged,
    tasks: Mapping[str, float],
    numbers: Mapping[int, float],
    method: str,
    out: str,
) -> str:
    """One line that says what was merged, from which vectors, how, and where the result is."""
    terms = []
    for task, weight in tasks.items():
        terms.append(_term(task, weight))
    for number, weight in numbers.items():
        terms.append(_term(f"vector {number}", weight))
    mix = " ".join(terms).removeprefix("+ ") or "all tasks"
    by = f" by {method}" if method != "sum" else ""
    lengths = ", vectors at their tasks' own lengths" if merged.own_lengths else ""
    count = "" if merged.covers is None else f" ({len(merged.covers)} tasks)"
    return (
        f"{mix}{by} from {merged.source}{count}, coefficient {merged.coefficient:.4g}{lengths}, "
        f"written to {out}"
    )


def _term(name: str, weight: float) -> str:
    """`+ name`, `- name` or `+ 0.5 name`."""
    factor = "" if abs(weight) == 1 else f" {abs(weight):g}"
    return f"{'-' if weight < 0 else '+'}{factor} {name}"
