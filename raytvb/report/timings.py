"""Reads how many seconds each stage took.

Nothing depends on these numbers. So a damaged file counts as absent: the next stage that runs
writes it anew, and no run or report ends because of it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from raytvb.experiment.layout import TIMINGS
from raytvb.storage.store import Store

_TIMINGS = TypeAdapter(dict[str, Annotated[float, Field(allow_inf_nan=False)]])


def read_timings(store: Store) -> dict[str, float]:
    """Seconds of each stage, summed over all runs; empty if the file is missing or damaged."""
    data = store.find(TIMINGS)
    if data is None:
        return {}
    try:
        return _TIMINGS.validate_json(data)
    except ValidationError:
        return {}
