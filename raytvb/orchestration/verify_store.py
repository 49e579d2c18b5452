"""Checks a store in Ray tasks: the files are read where the work is, for the driver may be far from
the store and has only one network connection.
"""

from __future__ import annotations

from typing import Any

from raytvb.experiment.config import Experiment
from raytvb.experiment.inventory import missing_things, outlived
from raytvb.orchestration.failures import raise_failed
from raytvb.orchestration.progress import Reporter
from raytvb.orchestration.ray_tasks import collect, ray_task
from raytvb.storage.records import Record
from raytvb.storage.store import Store
from raytvb.storage.verify import Findings, record_keys_of, unclaimed, verify_records

GROUP = 32
"""How many records one task checks."""


def verify_on_ray(store: Store, experiment: Experiment, reporter: Reporter) -> Findings:
    """As `experiment.inventory.verify_store`, in Ray tasks with the experiment's resources.

    Raises UserError if tasks failed.
    """
    sizes = store.sizes()
    keys = record_keys_of(sizes)
    check, pending = ray_task(_verify_group, experiment, gpu=False), dict[Any, str]()
    for start in range(0, len(keys), GROUP):
        group = keys[start : start + GROUP]
        pending[check.remote(store.url, group)] = f"{len(group)} records"
    findings, found = Findings(), dict[str, Record]()
    with reporter.stage("verify", len(pending)) as stage:

        def add(name: str, result: tuple[Findings, dict[str, Record]]) -> None:
            findings.add(result[0])
            found.update(result[1])
            stage.advance(name)

        raise_failed("verify", collect(experiment, pending, add))
    findings.add(unclaimed(store, sizes))
    findings.problems += missing_things(found, sizes) + outlived(found)
    return findings


def _verify_group(url: str, keys: list[str]) -> tuple[Findings, dict[str, Record]]:
    return verify_records(Store(url), keys)
