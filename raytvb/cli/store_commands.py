"""Commands that look into a store: `ls`, `verify` and `spectrum`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from raytvb.cli.options import AS_JSON_OPTION, BASIS_METHOD
from raytvb.errors import UserError

if TYPE_CHECKING:
    from raytvb.storage.records import Record

LISTED = ("base", "masks", "overlap", "vectors", "basis")
"""Folders of a store whose contents `ls` lists."""


@click.command(name="ls")
@click.argument("store")
def list_store(store: str) -> None:
    """List the vectors and bases of a store.

    \b
    raytvb ls raytvb-quickstart
    """
    from rich.table import Table

    from raytvb.cli.printing import wide_console
    from raytvb.report.formatting import format_bytes
    from raytvb.storage.records import find_all
    from raytvb.storage.store import Store

    target = Store(store)
    table = Table("what", "size", "details", box=None)
    for folder in sorted(LISTED):
        for name, record in find_all(target, folder).items():
            table.add_row(name, format_bytes(record.size), _details(record))
    if not table.row_count:
        raise UserError(f"{target.url} holds no experiment yet")
    wide_console(160).print(table, markup=False)


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
@click.argument("store")
def verify(store: str) -> None:
    """Compare every file of a store with its checksum.

    Reads the whole store. Names every file that is damaged or missing.

    \b
    raytvb verify raytvb-quickstart
    """
    from raytvb.storage.store import Store
    from raytvb.storage.verify import verify as verify_store

    target = Store(store)
    checked, problems = verify_store(target)
    if problems:
        raise UserError(
            f"{checked} files checked, {len(problems)} problems:\n  " + "\n  ".join(problems)
        )
    if not checked:
        raise UserError(f"{target.url} holds no records")
    print(f"{checked} files match their records")


@click.command()
@click.argument("store")
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
    from raytvb.storage.store import Store

    result = spectrum_of(Store(store), method, size)
    if as_json:
        print(json.dumps(result.to_json(), indent=1))
        return
    table = Table("M", "eigenvalue, % of the sum", "least error of M vectors", box=None)
    for m, (share, floor) in enumerate(zip(result.share, result.floor, strict=True), 1):
        table.add_row(str(m), f"{100 * share:.2f}", f"{floor:.4f}")
    wide_console(80).print(table)
    print(describe_spectrum(result))
