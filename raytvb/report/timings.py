"""Reads and writes how many seconds each stage took.

Nothing depends on these numbers. So a damaged record counts as absent: the next stage that runs
writes it anew, and no run or report ends because of it.
"""

from __future__ import annotations

from pydantic import Field, FiniteFloat

from raytvb.experiment.layout import TIMINGS
from raytvb.storage import records
from raytvb.storage.contract import Contract, parse_json
from raytvb.storage.damage import DamagedError
from raytvb.storage.store import Store

_FIRST_FORMAT_KEY = "report/timings.json"


class Timings(Contract):
    """Metrics of the record of the timings."""

    seconds: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Seconds of each stage, summed over all runs."""


def read_timings(store: Store) -> dict[str, float]:
    """Seconds of each stage, summed over all runs; empty if the record is missing or damaged."""
    try:
        record = records.find(store, TIMINGS)
        if record is not None:
            return record.metrics_as(Timings, store.where(TIMINGS)).seconds
        data = store.find(_FIRST_FORMAT_KEY)
        where = store.where(_FIRST_FORMAT_KEY)
        fields = {} if data is None else parse_json(data, where)
        return Timings.from_json({"seconds": fields}, where).seconds
    except DamagedError:
        return {}


def add_timing(store: Store, stage: str, seconds: float) -> None:
    """Add seconds to those of a stage."""
    total = dict(read_timings(store))
    total[stage] = total.get(stage, 0.0) + seconds
    records.commit(store, TIMINGS, identity={}, metrics=Timings(seconds=total))
