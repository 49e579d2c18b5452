"""Options and arguments that several commands share.

This module must be quick to import, for every `--help` imports it. It takes the names of methods
and of the embedded tasks from modules that import no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from raytvb.errors import UserError
from raytvb.maths.basis_registry import BASIS_METHODS
from raytvb.maths.merge_registry import stored_merges
from raytvb.suite.task_names import task_names

if TYPE_CHECKING:
    from raytvb.experiment.config import Experiment
    from raytvb.storage.store import Store

    NameType: TypeAlias = click.ParamType[str]
    AnyType: TypeAlias = click.ParamType[Any]
else:
    NameType = AnyType = click.ParamType  # older versions of click take no type argument

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


class NotBlank(AnyType):
    """Text, or a path, with something in it. A script whose variable is not set passes ''."""

    def __init__(self, inner: AnyType) -> None:
        """inner: what a value that is not blank is converted by."""
        self.name = inner.name
        self._inner = inner

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What the inner type makes of the value. Raises click's error for a blank one."""
        if not os.fspath(value).strip():
            self.fail("it is blank: give a value", param, ctx)
        return self._inner.convert(value, param, ctx)


def refuse_blanks(command: click.Command) -> None:
    """Let no option or argument of a command, or of those below it, be blank text."""
    for param in command.params:
        if isinstance(param.type, click.types.StringParamType | click.Path):
            param.type = NotBlank(param.type)
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        refuse_blanks(inner)


BASIS_METHOD = MethodName(lambda: BASIS_METHODS)
MERGE_METHOD = MethodName(stored_merges)
SUITE_COUNT = click.IntRange(2, len(task_names()))
"""How many tasks of the embedded suite to use: at least 2, because results are means over tasks."""

# `load_experiment` says what is wrong with a path, and what to do.
EXPERIMENT_FILE = click.argument("file", type=click.Path(path_type=Path))
STORE_OPTION = click.option(
    "--store",
    help="Local folder or URL (s3://bucket/prefix) to use instead of the file's `store:`.",
)
AS_JSON_OPTION = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of a table."
)


def store_argument(command: Command) -> Command:
    """`STORE`, the store that a command looks into, and `--anonymous`."""
    anonymous = click.option(
        "--anonymous",
        is_flag=True,
        expose_value=False,
        callback=_set_anonymous,
        help="Send requests to S3 without credentials, for a store in a public bucket.",
    )
    return click.argument("store")(anonymous(command))


def _set_anonymous(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    from raytvb.storage.filesystems import set_anonymous

    set_anonymous(value)


def open_store(url: str) -> Store:
    """The store that a command looks into.

    Raises StoreError for what is no store's URL and, within about 20 seconds, for a server that
    does not answer.
    """
    from raytvb.storage.addresses import check_shared
    from raytvb.storage.store import Store

    check_shared(url)
    store = Store(url)
    if not store.is_local:
        store.check_reachable()
    return store


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


def consent_options(command: Command) -> Command:
    """`--yes` and `--renew`: what a run may replace."""
    yes = click.option(
        "--yes",
        is_flag=True,
        help="Do not ask before vectors are replaced whose settings or data have changed.",
    )
    renew = click.option(
        "--renew",
        type=click.Choice(["mask"]),
        help="Make the shared mask anew from the scores of the present tasks, and all vectors and "
        "bases with it. Asks first.",
    )
    return yes(renew(command))


def read_experiment(file: Path, store: str | None) -> Experiment:
    """The checked experiment of a file. store: replaces the store that the file names."""
    from raytvb.experiment.machine_folders import check_machine_folders
    from raytvb.experiment.parsing import load_experiment

    if store is not None:
        check_store_option(store)
    check_machine_folders()
    experiment = load_experiment(file, None if store is None else {"store": store})
    from raytvb.storage.filesystems import set_anonymous

    set_anonymous(experiment.resources.anonymous)
    return experiment


def check_store_option(store: str) -> None:
    """Raise UserError, which names the option, for a `--store` that a run could not write."""
    from raytvb.storage.addresses import check_shared
    from raytvb.storage.store_errors import StoreError

    try:
        check_shared(store, written=True)
    except StoreError as error:
        raise UserError(f"--store: {error}") from None
