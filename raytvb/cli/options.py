"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import load_experiment

EXPERIMENT_FILE = click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)


def local_cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--num-gpus",
        type=click.IntRange(0),
        help="GPUs of the local Ray that is started where "
        "RAY_ADDRESS is not set (default: those found).",
    )(command)
    return click.option(
        "--num-cpus", type=click.IntRange(1), help="CPUs of that local Ray (default: all)."
    )(command)


def store_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--store",
        help="Local folder or URL (s3://bucket/prefix) to use instead of the file's `store:`.",
    )(command)


def read_experiment(file: Path, store: str | None) -> Experiment:
    return load_experiment(file, {"store": store} if store else None)


AS_JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


THREADS_OPTION = click.option("--threads", type=click.IntRange(1), default=1, show_default=True)


FOLDER_OPTION = click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False),
    help="Where the files are made (default: the temporary folder).",
)
