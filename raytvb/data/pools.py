"""Which named parts of the data are train, val and test."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from raytvb.data.image_source import ALIASES, SPLITS, USUAL_POOLS
from raytvb.errors import UserError
from raytvb.experiment.sections.tasks import TaskConfig

_WORDS = USUAL_POOLS | {"trainset", "testset", "valset", "devset", "traindata", "testdata"}


def keys_by_pool(
    task: TaskConfig, keys: Sequence[str], pool_of: Callable[[str], str]
) -> dict[str, list[str]]:
    """Keys by the name of their pool, which `pool_of` derives from a key.

    Usual names become lower case. If no pool has a usual name or a name from the task's `splits`,
    all keys are in one pool, ''. Raises UserError if a usual name is written in two ways.
    """
    pools: dict[str, list[str]] = {}
    spelled: dict[str, str] = {}
    for key in keys:
        name = pool_of(key)
        if name.lower() in USUAL_POOLS:
            first = spelled.setdefault(name.lower(), name)
            if first != name:
                raise UserError(
                    f"task {task.name}: the data have both {first} and {name} ({key}): which is "
                    f"the split? Move one of them away, or rename it"
                )
            name = name.lower()
        pools.setdefault(name, []).append(key)
    named = {task.splits.train, task.splits.val, task.splits.test}
    if pools.keys() & (USUAL_POOLS | named):
        return pools
    return {"": list(keys)}


def split_pools(task: TaskConfig, pools: Sequence[str], where: str) -> dict[str, str]:
    """The pool of each split that is a whole pool. Other splits are left out: those without a pool,
    and those that are shares.

    The task's `splits` decide; else the pools with the usual names are taken. pools: '' alone for
    data without named splits. where: the place of the data, for messages. Raises UserError for a
    name that the data do not have.
    """
    named = _given_pools(task, pools, where)
    found = dict(named)
    for split in SPLITS:
        if getattr(task.splits, split) is not None:
            continue
        for alias in ALIASES[split]:
            if alias in pools and alias not in named.values():
                found[split] = alias
                break
    if tuple(pools) == ("",):
        found["train"] = ""
    return found


def _given_pools(task: TaskConfig, pools: Sequence[str], where: str) -> dict[str, str]:
    """The pools that the task names for its splits. Upper case in usual names does not matter."""
    named: dict[str, str] = {}
    unknown = []
    for split in SPLITS:
        pool = getattr(task.splits, split)
        if not isinstance(pool, str):
            continue
        if pool not in pools:
            pool = pool.lower()
        if pool in pools:
            named[split] = pool
        else:
            unknown.append(f"splits.{split}: {getattr(task.splits, split)}")
    if unknown:
        there = ", ".join(filter(None, pools)) or "no named splits"
        raise UserError(
            f"task {task.name}: {', '.join(unknown)}: {where} has {there} (a share of train "
            f"is a number, such as 0.1)"
        )
    return named


def means_split(name: str) -> bool:
    """Whether a name has the word for a split in it: seg_train, Test_set, cifar10-val."""
    return bool(_words(name) & _WORDS)


def splits_hint(names: Iterable[str]) -> str:
    """What to write as `splits` if these names mean splits."""
    train = test = "NAME"
    for name in sorted(names, reverse=True):
        for word in _words(name) & _WORDS:
            if word.startswith("train"):
                train = name
            elif word.startswith("test"):
                test = name
    return f"`splits: {{train: {train}, test: {test}}}`"


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z]+", name.lower()))
