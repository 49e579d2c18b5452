"""Commands that look into a store: `ls`, `verify` and `spectrum`."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import click

from raytvb.cli.options import AS_JSON_OPTION, BASIS_METHOD, open_store, store_argument
from raytvb.errors import UserError

if TYPE_CHECKING:
    from raytvb.storage.records import Record
    from raytvb.storage.store import Store
    from raytvb.storage.verify import Findings

LISTED = ("base", "masks", "overlap", "vectors", "basis")
"""Folders of a store whose contents `ls` lists."""

LARGE = 8 * 2**30
"""From this number of bytes on, Ray tasks read a store."""


@click.command(name="ls")
@store_argument
def list_store(store: str) -> None:
    """List the vectors and bases of a store.

    \b
    raytvb ls raytvb-quickstart
    """
    from rich.table import Table

    from raytvb.cli.printing import wide_console
    from raytvb.report.formatting import format_bytes
    from raytvb.storage.records import find_all

    target = open_store(store)
    table = Table("what", "size", "details", box=None)
    for folder in sorted(LISTED):
        for name, record in find_all(target, folder).items():
            table.add_row(name, format_bytes(record.size), _details(record))
    if not table.row_count:
        raise UserError(f"{target.url} holds no experiment yet")
    wide_console(160).print(table, markup=False)
    for line in _missing(target):
        print(line)


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
