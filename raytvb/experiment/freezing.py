"""The experiment that a store was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE, EXPERIMENT
from raytvb.storage import records
from raytvb.storage.store import Store

ASKED = (
    "search",
    "evaluate",
)  # may change while a store lives: what depends on them says so itself


def freeze(store: Store, experiment: Experiment) -> None:
    """Write what was asked into a new store; check it against what an existing store holds.

    What is asked of the vectors may change later: more basis methods, another search, other
    evaluations. A store in which nothing but the pretrained model was made so far is given to the
    new experiment. Raises UserError where the store belongs to another experiment; the message
    shows the fields that differ.
    """
    asked = experiment.identity()
    stored = yaml.safe_load(store.read(EXPERIMENT)) if store.exists(EXPERIMENT) else None
    differing = [] if stored is None else records.differences(_frozen(stored), _frozen(asked))
    if differing and not any(
        k.endswith(f"/{records.RECORD}") and not k.startswith((f"{BASE}/", "splits/"))
        for k in store.keys()
    ):
        for made in (BASE, "vectors", "splits"):  # the heads of its tasks are there
            store.delete(made)
        differing = []
    if differing:
        raise UserError(
            f"{store.url} belongs to another experiment:\n  "
            + "\n  ".join(differing)
            + "\nUse another store, or the experiment file that it was made with."
        )
    if stored != asked:
        store.write(EXPERIMENT, yaml.safe_dump(asked, sort_keys=False, allow_unicode=True).encode())


def _frozen(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an experiment that its store was made for."""
    kept = {k: v for k, v in identity.items() if k not in ASKED}
    return kept | {
        "basis": {"prepare": "none"}
        | {k: v for k, v in identity.get("basis", {}).items() if k != "method"}
    }
