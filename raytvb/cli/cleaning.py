"""Commands that remove what a store no longer needs: `rm` and `gc`."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import click

from raytvb.cli.options import open_store, store_argument
from raytvb.errors import UserError, listed

if TYPE_CHECKING:
    from raytvb.experiment.unused import Unused
    from raytvb.storage.contract import JsonObject
    from raytvb.storage.store import Store

YES_OPTION = click.option("--yes", is_flag=True, help="Do not ask before removing.")


@click.command()
@store_argument
@click.option(
    "--task", "tasks", multiple=True, required=True, help="A task to remove. Can be repeated."
)
@YES_OPTION
def rm(store: str, tasks: tuple[str, ...], yes: bool) -> None:
    """Remove tasks that no experiment of a store lists.

    Removes the vector of each task and everything that belongs to it: its prepared twin, mask,
    head, images, checkpoint and results. Bases that were made of its vector are removed, too; the
    next run makes those that an experiment asks for anew. Shows what would be removed, and asks.

    Do not use it while a run is at work. Other stores that take vectors from this one are not
    known here.

    \b
    raytvb rm raytvb-quickstart --task glyphs/greek-blur
    raytvb rm s3://bucket/prefix --task cars --task dtd --yes
    """
    from raytvb.experiment.unused import unused_of_tasks

    target, names = open_store(store), list(dict.fromkeys(tasks))
    _check_tasks(target, names)
    unused = unused_of_tasks(target, names)
    _show(unused)
    _confirm(target, unused, yes)
    remove_unused(target, unused)
    print(_freed(unused))


@click.command()
@store_argument
@YES_OPTION
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object instead of a table. Without --yes, nothing is removed then.",
)
def gc(store: str, yes: bool, as_json: bool) -> None:
    """Remove everything that no experiment of a store uses.

    A store keeps the vectors of tasks that were taken out of an experiment, bases of sizes that no
    experiment has any more, their results, and masks that no vector needs. This command shows what
    would be removed, and why, and asks.

    Do not use it while a run is at work. Other stores that take vectors from this one are not
    known here. Files without a record are left to `raytvb verify --repair`.

    \b
    raytvb gc raytvb-quickstart                shows what is unused, asks, and removes it
    raytvb gc s3://bucket/prefix --json        shows it, and removes nothing
    raytvb gc s3://bucket/prefix --yes
    """
    from raytvb.experiment.unused import find_unused

    target = open_store(store)
    unused = find_unused(target)
    if as_json:
        if yes:
            remove_unused(target, unused)
        print(json.dumps(_as_fields(unused, removed=yes), indent=1))
        return
    _show(unused)
    if not unused.things:
        print("nothing to do: the experiments of this store use everything in it")
        return
    _confirm(target, unused, yes)
    remove_unused(target, unused)
    print(_freed(unused))


def _check_tasks(store: Store, tasks: Sequence[str]) -> None:
    """Raise UserError for tasks that the store does not have, and for those that are in use."""
    from raytvb.experiment.unused import known_tasks, needs_of

    known = known_tasks(store)
    unknown = [task for task in tasks if task not in known]
    needs = needs_of(store, known)
    for task in tasks:
        users = needs.users(task)
        if users:
            names = listed([name or "of this store" for name in users])
            raise UserError(
                f"{task} is used by the experiment {names}: take it out of the file and run that "
                f"first"
            )
    if unknown:
        near = get_close_matches(unknown[0], known, n=5, cutoff=0.5)
        hint = f"; do you mean {listed(near)}?" if near else ""
        raise UserError(f"{store.url} has nothing of the task {listed(unknown)}{hint}")


def _show(unused: Unused) -> None:
    """Print what would be removed, and what cannot be judged."""
    from rich.table import Table

    from raytvb.cli.printing import wide_console
    from raytvb.report.formatting import format_bytes

    for name in unused.unclear:
        print(
            f"note: this raytvb cannot read the experiment {name or 'of this store'}, so bases and "
            f"results stay, and all tasks that it names"
        )
    if not unused.things:
        return
    table = Table("unused", "size", "why", box=None)
    for thing in unused.things:
        table.add_row(thing.prefix, format_bytes(thing.size), thing.reason)
    wide_console(160).print(table, markup=False)


def _confirm(store: Store, unused: Unused, yes: bool) -> None:
    from raytvb.cli.printing import confirm
    from raytvb.report.formatting import format_bytes

    count = f"{len(unused.things)} thing{'s' if len(unused.things) > 1 else ''}"
    confirm(f"Remove {count} ({format_bytes(unused.size)}) from {store.url}?", yes=yes)


def _freed(unused: Unused) -> str:
    from raytvb.report.formatting import format_bytes

    return f"{unused.size:,} bytes freed ({format_bytes(unused.size)})"


def _as_fields(unused: Unused, *, removed: bool) -> JsonObject:
    things: list[JsonObject] = []
    for thing in unused.things:
        things.append({"what": thing.prefix, "bytes": thing.size, "reason": thing.reason})
    fields: JsonObject = {"unused": [*things], "bytes": unused.size, "removed": removed}
    return {**fields, "unclear": [*unused.unclear]}


# Removing -----------------------------------------------------------------------------------------


def remove_unused(store: Store, unused: Unused) -> None:
    """Delete unused things, and all mentions of them.

    What mentions a thing is changed or deleted before it. So a deletion that is stopped leaves
    files without a record at most, and can be repeated.
    """
    from raytvb.storage.records import find, record_key
    from raytvb.storage.replacing import delete_thing

    _forget_rows(store, unused.tasks)
    _forget_results(store, unused.prefixes)
    for thing in unused.things:
        record = find(store, thing.prefix) if thing.alone else None
        if record is None:
            delete_thing(store, thing.prefix)
            continue
        store.delete(record_key(thing.prefix))
        for name in record.files:
            store.delete(f"{thing.prefix}/{name}")


def _forget_rows(store: Store, tasks: Collection[str]) -> None:
    """Take the rows of tasks out of the Gram matrix."""
    from raytvb.storage.gram_state import GramState, GramWriter

    if not set(tasks) & set(GramState.undamaged(store).tasks):
        return
    writer = GramWriter(store)
    state = GramState.undamaged(store)  # as the writer before this one left it
    state.forget(list(tasks))
    writer.save(state)


def _forget_results(store: Store, prefixes: Collection[str]) -> None:
    """Take results out of the parents of the report, which stays."""
    from raytvb.experiment.layout import REPORT
    from raytvb.storage.records import find, record_key
    from raytvb.storage.sealed_json import sealed

    record = find(store, REPORT)
    if record is None or REPORT in prefixes:
        return
    parents = {name: sha for name, sha in record.parents.items() if name not in prefixes}
    if parents != record.parents:
        changed = record.model_copy(update={"parents": parents})
        store.write(record_key(REPORT), sealed(changed.to_json()))
