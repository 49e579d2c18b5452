"""`raytvb bench chaos`: what a run survives."""

from __future__ import annotations

import sys
from typing import Any

import click

from raytvb.cli.options import AS_JSON_OPTION

SHOWN = 20
"""A list of what is wrong names at most this many."""


@click.command()
@click.option(
    "--tasks",
    type=click.IntRange(2),
    default=300,
    show_default=True,
    help="Number of small tasks, drawn on the spot.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Longest time in which something is killed. Afterwards the run may finish.",
)
@click.option(
    "--every",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="Mean seconds between kills.",
)
@click.option(
    "--failing",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Share of the requests to the store that fail.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Training steps of each fine-tune.",
)
@click.option(
    "--checkpoint",
    type=click.FloatRange(0, min_open=True),
    default=0.5,
    show_default=True,
    help="Seconds between the checkpoints of a fine-tune.",
)
@click.option(
    "--nodes",
    type=click.IntRange(2),
    default=3,
    show_default=True,
    help="Number of nodes with one CPU each, beside the head.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the kills and of the failing requests.",
)
@click.option(
    "--store",
    help="URL of an empty store. Default: a bucket of an S3 server that is started here. Requests "
    "fail, and are counted, only in a store on S3 whose endpoint (AWS_ENDPOINT_URL) has no TLS.",
)
@AS_JSON_OPTION
def chaos(as_json: bool, **options: Any) -> None:
    """What a run survives: kills of processes, and a store whose requests fail.

    A Ray cluster of several nodes runs on this machine. A quiet run on a local folder gives the
    reference. Then the same experiment runs with a failing store, while workers, basis actors,
    nodes and the driver are killed with SIGKILL. Both runs make the mask, the fine-tunes, and
    offline and online bases.

    Prints how many vectors were lost or counted twice, and how many files have other bits than in
    the quiet run. If there are any, the exit code is 1.

    What was done twice is counted at the store, from the requests that reach it. A training begins
    when it asks for a checkpoint. One that is killed loses the time since its last checkpoint; this
    time is counted in steps, at the mean pace of the task.

    \b
    raytvb bench chaos --json
    raytvb bench chaos --tasks 20 --minutes 3 --every 10
    """
    from raytvb.bench.chaos import bench_chaos
    from raytvb.cli.printing import print_result

    result, found = bench_chaos(**options, tell=_tell)
    print_result(result.to_json(), as_json)
    wrong = {"lost": found.lost, "duplicated": found.duplicated, "differing": found.differing}
    for kind, names in wrong.items():
        for name in names[:SHOWN]:
            _tell(f"{kind}: {name}")
    if not result.is_sound:
        raise click.exceptions.Exit(1)


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
