"""Options and arguments that several commands share.

This module must be quick to import, for every `--help` imports it. It takes the names of methods
and of the embedded tasks from modules that import no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from raytvb.maths.basis_registry import BASIS_METHODS
from raytvb.maths.merge_registry import stored_merges
from raytvb.suite.task_names import task_names

if TYPE_CHECKING:
    from raytvb.experiment.config import Experiment

    NameType = click.ParamType[str]
else:
    NameType = click.ParamType  # older versions of click take no type argument

Command = TypeVar("Command", bound=Callable[..., Any])


class MethodName(NameType):
    """The name of a registered method.

    The names are looked up only when they are needed, because that imports the user's plugins.
    """

    name = "method"

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        """names: returns the names that are allowed."""
        self._names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name itself. For an unknown name, raises click's error, which lists all names."""
        return click.Choice(list(self._names())).convert(value, param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The names, in the form in which `--help` shows the values of an option."""
        return f"[{'|'.join(self._names())}]"


BASIS_METHOD = MethodName(lambda: BASIS_METHODS)
MERGE_METHOD = MethodName(stored_merges)
SUITE_COUNT = click.IntRange(2, len(task_names()))
"""How many tasks of the embedded suite to use: at least 2, because results are means over tasks."""

EXPERIMENT_FILE = click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
STORE_OPTION = click.option(
    "--store",
    help="Local folder or URL (s3://bucket/prefix) to use instead of the file's `store:`.",
)
AS_JSON_OPTION = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of a table."
)


def local_cluster_options(command: Command) -> Command:
    """`--num-cpus` and `--num-gpus`: the size of a Ray that is started on this machine."""
    gpus = click.option(
        "--num-gpus",
        type=click.IntRange(0),
        help="GPUs of the Ray that is started on this machine if RAY_ADDRESS is not set. "
        "Default: all that Ray detects.",
    )
    cpus = click.option(
        "--num-cpus",
        type=click.IntRange(1),
        help="CPUs of the Ray that is started on this machine if RAY_ADDRESS is not set. "
        "Default: all.",
    )
    return cpus(gpus(command))


def read_experiment(file: Path, store: str | None) -> Experiment:
    """The checked experiment of a file. store: replaces the store that the file names."""
    from raytvb.experiment.parsing import load_experiment

    experiment = load_experiment(file, {"store": store} if store else None)
    from raytvb.storage.store import Store

    Store(experiment.store)  # reports a wrong URL before anything heavy is imported
    return experiment
