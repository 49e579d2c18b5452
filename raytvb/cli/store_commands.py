"""Commands that look into a store: `ls`, `verify` and `spectrum`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from raytvb.cli.options import AS_JSON_OPTION, BASIS_METHOD, open_store, store_argument
from raytvb.errors import UserError, VectorError

if TYPE_CHECKING:
    from rich.table import Table

    from raytvb.experiment.config import Experiment
    from raytvb.experiment.vector_states import VectorState
    from raytvb.report.history import OnlineHistory
    from raytvb.storage.contract import JsonObject
    from raytvb.storage.records import Record
    from raytvb.storage.store import Store
    from raytvb.storage.verify import Findings

LISTED = ("base", "masks", "overlap", "vectors", "basis")
"""Folders of a store whose contents `ls` lists."""

LARGE = 8 * 2**30
"""From this number of bytes on, Ray tasks read a store."""


@click.command(name="ls")
@store_argument
@click.option(
    "--history",
    is_flag=True,
    help="Show instead when and why the vectors were made, and what online bases lost.",
)
@AS_JSON_OPTION
def list_store(store: str, history: bool, as_json: bool) -> None:
    """List the vectors and bases of a store.

    Marks as `unused` what no experiment of the store uses (`raytvb gc` removes it), and as `stale`
    vectors and bases that are not as an experiment asks for (a run makes them again). Vectors that
    the experiment takes from another store are listed with the URL of that store.

    \b
    raytvb ls raytvb-quickstart
    raytvb ls raytvb-quickstart --history
    """
    target = open_store(store)
    if history:
        _list_history(target, as_json)
        return
    rows, notes = _rows_of(target)
    if not rows:
        raise UserError(f"{target.url} holds no experiment yet")
    lines = [*notes, *_missing(target)]
    if as_json:
        print(json.dumps({"things": [row.to_json() for row in rows], "notes": lines}, indent=1))
        return
    from rich.table import Table

    from raytvb.cli.printing import wide_console
    from raytvb.report.formatting import format_bytes

    table = Table("what", "size", "details", box=None)
    for row in rows:
        table.add_row(row.what, format_bytes(row.record.size), row.details)
    wide_console(160).print(table, markup=False)
    for line in lines:
        print(line)


@dataclass(frozen=True)
class _Row:
    """A line of `ls`."""

    what: str
    record: Record
    mark: str = ""
    """`unused`, `stale` or nothing."""

    @property
    def details(self) -> str:
        """The mark, and the numbers among the metrics."""
        return ", ".join(part for part in (self.mark, _details(self.record)) if part)

    def to_json(self) -> JsonObject:
        """The fields for `--json`."""
        numbers: JsonObject = {}
        for name, value in self.record.metrics.items():
            if isinstance(value, int | float):
                numbers[name] = value
        return {"what": self.what, "bytes": self.record.size, "mark": self.mark, "metrics": numbers}


def _rows_of(store: Store) -> tuple[list[_Row], list[str]]:
    """The lines of `ls`, and notes on what cannot be told."""
    from raytvb.experiment.present_experiments import present_experiments
    from raytvb.storage.records import find_all
    from raytvb.storage.store_errors import StoreError

    marks: dict[str, str] = {}
    borrowed: dict[str, Record] = {}
    notes: list[str] = []
    if present_experiments(store):
        try:
            marks, borrowed = _marks(store)
        except (StoreError, VectorError) as error:  # perhaps of the other store with vectors
            notes.append(f"note: what is unused or stale cannot be told: {error}")
    rows = []
    for folder in sorted(LISTED):
        for name, record in find_all(store, folder).items():
            rows.append(_Row(name, record, marks.get(name, "")))
        if folder == "vectors":
            rows += [_Row(place, record) for place, record in sorted(borrowed.items())]
    return rows, notes


def _marks(store: Store) -> tuple[dict[str, str], dict[str, Record]]:
    """`unused` and `stale` by folder; and the records of vectors of another store, by URL."""
    from raytvb.experiment.unused import find_unused, parsed_experiments
    from raytvb.storage.records import find_all

    stale, fresh = set[str](), set[str]()
    borrowed: dict[str, Record] = {}
    for experiment in parsed_experiments(store)[0].values():
        for prefix, is_fresh in _judged_bases(store, experiment):
            (fresh if is_fresh else stale).add(prefix)
        for state in _states(store, experiment):
            vector = state.vector
            if vector is not None and state.is_borrowed(store):
                borrowed[vector.store.where(vector.prefix)] = vector.record
            elif vector is not None:
                (fresh if state.is_current else stale).add(vector.prefix)
    marks = dict.fromkeys(stale - fresh, "stale")
    unused = find_unused(store, (*LISTED, "prepared"))
    for folder in LISTED:
        for prefix in find_all(store, folder):
            if unused.has(prefix):
                marks[prefix] = "unused"
    return marks, borrowed


def _states(store: Store, experiment: Experiment) -> list[VectorState]:
    """The states of the vectors of an experiment."""
    from raytvb.experiment.shared_masks import in_force
    from raytvb.experiment.vector_states import vector_states

    mask = in_force(store, experiment) if experiment.shares_mask else None
    return list(vector_states(experiment, mask).values())


def _judged_bases(store: Store, experiment: Experiment) -> Iterator[tuple[str, bool]]:
    """The bases of an experiment, and whether each was made of the present vectors."""
    from raytvb.experiment.basis_specs import basis_specs
    from raytvb.experiment.layout import BASES, basis_prefix
    from raytvb.experiment.present_versions import is_present_basis
    from raytvb.experiment.stored_vectors import basis_vectors_of
    from raytvb.experiment.unused import without_missing
    from raytvb.storage.records import find_all

    vectors = basis_vectors_of(experiment, experiment.task_names)
    found, restricted = find_all(store, BASES), without_missing(experiment, vectors)
    for spec in (*basis_specs(experiment), *basis_specs(restricted)):
        record = found.get(basis_prefix(spec.name))
        if record is not None:
            yield (
                basis_prefix(spec.name),
                is_present_basis(store, restricted, spec, record, vectors),
            )


def _list_history(store: Store, as_json: bool) -> None:
    """Print when vectors were made, and what online bases were after each arrival."""
    from raytvb.report.history import read_history

    history = read_history(store)
    if as_json:
        print(json.dumps(history.to_json(), indent=1))
        return
    if not history.vectors and not history.online:
        raise UserError(f"{store.url} holds no vectors yet")
    from rich.table import Table

    from raytvb.cli.printing import wide_console

    table = Table("time", "task", "why", box=None)
    for arrival in history.vectors:
        table.add_row(arrival.time or "-", arrival.task, arrival.reason or "-")
    wide_console(160).print(table, markup=False)
    for basis in history.online:
        if basis.arrivals:
            wide_console(160).print(_table_of(basis), markup=False)


def _table_of(basis: OnlineHistory) -> Table:
    """The arrivals in an online basis."""
    from rich.table import Table

    from raytvb.report.formatting import percent

    table = Table(title=f"\n{basis.name}", title_justify="left", box=None)
    for column in ("arrived", "mean bound", "largest bound", "accuracy, %"):
        table.add_column(column, justify="right")
    table.add_column("last")
    for arrival in basis.arrivals:
        table.add_row(
            str(arrival.count),
            "" if arrival.mean_bound is None else f"{arrival.mean_bound:.4f}",
            "" if arrival.largest_bound is None else f"{arrival.largest_bound:.4f}",
            "" if arrival.accuracy is None else percent(arrival.accuracy),
            ", ".join(arrival.tasks),
        )
    return table


def _missing(store: Store) -> list[str]:
    """A line for each task that failed, and for each that has no vector yet."""
    from raytvb.storage.records import find, find_all

    lines: dict[str, str] = {}
    experiment = find(store, "")
    tasks = None if experiment is None else experiment.identity.get("tasks")
    vectors = find_all(store, "vectors")
    for task in tasks if isinstance(tasks, list) else ():
        name = str(task["name"]) if isinstance(task, dict) and "name" in task else ""
        if name and f"vectors/{name}" not in vectors:
            lines[name] = f"missing: {name}: no vector yet"
    for prefix, record in find_all(store, "failed").items():
        name, metrics = prefix.removeprefix("failed/"), record.metrics
        part = f"{name}: {metrics.get('stage')}: {metrics.get('reason')}"
        lines[name] = f"missing: {part} ({metrics.get('attempts')} attempts)"
    return list(lines.values())


def _details(record: Record) -> str:
    """The numbers among the metrics of a record."""
    details = []
    for name, value in record.metrics.items():
        if isinstance(value, float):
            details.append(f"{name} {value:.4g}")
        elif isinstance(value, int):
            details.append(f"{name} {value}")
    return ", ".join(details)


@click.command()
@store_argument
@click.option(
    "--repair",
    is_flag=True,
    help="Remove what is damaged and what has no record, so that the next run makes it anew.",
)
@click.option("--yes", is_flag=True, help="With --repair: do not ask before removing.")
@AS_JSON_OPTION
def verify(store: str, repair: bool, yes: bool, as_json: bool) -> None:
    """Check every file of a store.

    Reads the whole store, and compares every file with the checksum in its record. Names the files
    that are missing, truncated, altered, or orphaned (no record lists them), and the things that
    must have been there, judged by what was made of them. A large store is read by Ray tasks.

    A run that is at work has files without a record for a moment: verify the store when it is done.

    \b
    raytvb verify raytvb-quickstart
    raytvb verify s3://bucket/prefix --repair        shows what is wrong, asks, and removes it
    RAY_ADDRESS=auto raytvb verify s3://bucket/prefix --json
    """
    from raytvb.storage.verify import removable
    from raytvb.storage.verify import repair as remove_damaged

    target = open_store(store)
    findings = _findings(target)
    lines = findings.messages()
    if not findings.checked and not lines:
        raise UserError(f"{target.url} holds no records")
    if as_json:
        print(json.dumps(_as_fields(findings), indent=1))
    elif not lines:
        print(_all_well(findings))
    if not lines:
        return
    text = f"{findings.checked} files checked, {len(lines)} problems:\n  " + "\n  ".join(lines)
    if not repair:
        way_out = f"`raytvb verify {target.url} --repair` removes what is damaged"
        raise UserError(f"{text}\n{way_out}; the next run makes it anew")
    if not removable(target, findings.problems):
        raise UserError(f"{text}\nNothing is to be removed: the next run makes what is missing")
    if not yes:
        click.confirm(f"{text}\nRemove what is damaged or orphaned?", abort=True, err=True)
    removed = remove_damaged(target, findings.problems)
    print(
        f"{len(removed)} files removed; run the experiment again to make them anew", file=sys.stderr
    )


def _findings(store: Store) -> Findings:
    """What is found in a store, by Ray tasks if there is a cluster or much to read."""
    from raytvb.experiment.inventory import verify_store

    if "RAY_ADDRESS" not in os.environ and sum(store.sizes().values()) < LARGE:
        return verify_store(store)
    from raytvb.experiment.parsing import parse_experiment
    from raytvb.experiment.present_experiments import stored_experiment
    from raytvb.storage.filesystems import is_anonymous

    stored = stored_experiment(store)
    if stored is None:
        return verify_store(store)
    resources = {"anonymous": is_anonymous()}
    try:
        experiment = parse_experiment({**stored, "store": store.url, "resources": resources})
    except UserError:  # made by a version that allowed what this one refuses
        return verify_store(store)
    from raytvb.orchestration.connect import connect
    from raytvb.orchestration.progress import Reporter
    from raytvb.orchestration.verify_store import verify_on_ray

    connect()
    return verify_on_ray(store, experiment, Reporter())


def _all_well(findings: Findings) -> str:
    text = f"{findings.checked} files match their records"
    if findings.unrecorded:
        text += (
            f"; {len(findings.unrecorded)} files of an earlier version have no checksum to "
            f"compare with"
        )
    return text


def _as_fields(findings: Findings) -> dict[str, object]:
    problems = []
    for problem in sorted(findings.problems):
        problems.append({"file": problem.key, "kind": problem.kind, "reason": problem.reason})
    return {
        "checked": findings.checked,
        "problems": problems,
        "without_checksum": sorted(findings.unrecorded),
        "newer": findings.newer,
    }


@click.command()
@store_argument
@click.option(
    "--method",
    type=BASIS_METHOD,
    default="ae",
    show_default=True,
    help="Basis method of the fit that --size asks for.",
)
@click.option(
    "--size",
    type=click.IntRange(1),
    help="Number of basis vectors M. If given, also fit a basis and show the error of every task.",
)
@AS_JSON_OPTION
def spectrum(store: str, method: str, size: int | None, as_json: bool) -> None:
    """Show what bases of each size would lose.

    Also works while vectors are still being made. Prints the eigenvalues of the Gram matrix of the
    task vectors so far, and for each M the least relative error that M basis vectors can have.

    \b
    raytvb spectrum raytvb-quickstart
    raytvb spectrum s3://bucket/prefix --size 16 --method svd --json
    """
    from rich.table import Table

    from raytvb.bases.spectrum import describe_spectrum, spectrum_of
    from raytvb.cli.printing import wide_console

    result = spectrum_of(open_store(store), method, size)
    if as_json:
        print(json.dumps(result.to_json(), indent=1))
        return
    table = Table("M", "eigenvalue, % of the sum", "least error of M vectors", box=None)
    for m, (share, floor) in enumerate(zip(result.share, result.floor, strict=True), 1):
        table.add_row(str(m), f"{100 * share:.2f}", f"{floor:.4f}")
    wide_console(80).print(table)
    print(describe_spectrum(result))
