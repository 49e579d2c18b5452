"""Compares stored files with their recorded checksums. Ray tasks read the files, for the driver
may be far from the store and has only one network connection.
"""

from __future__ import annotations

from typing import Any

from raytvb.errors import UserError
from raytvb.orchestration.ray_tasks import collect, raise_failed, ray_task
from raytvb.orchestration.run_context import RunContext
from raytvb.storage.records import record_keys
from raytvb.storage.store import Store
from raytvb.storage.verify import verify_records

GROUP = 64
"""How many records one task checks."""


def verify_on_ray(context: RunContext) -> int:
    """Check every recorded file. Returns how many there are.

    Raises UserError that names the damaged files, if there are any.
    """
    keys = record_keys(context.store)
    verify, pending = ray_task(_verify_group, context.experiment, gpu=False), dict[Any, str]()
    for start in range(0, len(keys), GROUP):
        group = keys[start : start + GROUP]
        pending[verify.remote(context.store.url, group)] = f"{len(group)} records"
    checked, problems = 0, list[str]()

    with context.reporter.stage("verify", len(pending)) as stage:

        def add(name: str, result: tuple[int, list[str]]) -> None:
            nonlocal checked
            checked += result[0]
            problems.extend(result[1])
            stage.advance(name)

        raise_failed("verify", collect(pending, add))
    if problems:
        raise UserError("the store does not match its records:\n  " + "\n  ".join(sorted(problems)))
    return checked


def _verify_group(url: str, keys: list[str]) -> tuple[int, list[str]]:
    return verify_records(Store(url), keys)
