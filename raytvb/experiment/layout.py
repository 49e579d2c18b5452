"""The keys of everything that an experiment keeps in its store. The README lists them, too."""

from __future__ import annotations

from collections.abc import Iterable

from raytvb.experiment.config import Experiment

EXPERIMENT = "experiment.yaml"
EXPERIMENTS = "experiments"
BASE = "base"
SHARED_MASK = "shared"
OVERLAP = "overlap"
PRECISION = "precision"
SEARCH = "search"
EVALS = "evals"
FAILED = "failed"
BASES = "basis"
ONLINE = "online"
REPORT = "report"
SUMMARY = "summary.json"
"""Name of the summary in the folder of the report."""

PAGE = "index.html"
"""Name of the page in the folder of the report."""

TIMINGS = "timings"

HEAD = "head.safetensors"
"""Name of the zero-shot head in the folder of a head; in stores of format 1, in a task's folder."""

MASK = "mask.safetensors"
"""Name of the mask file in a mask's folder."""

COEFFICIENTS = "coefficients.safetensors"
"""Name of the table of coefficients in a basis's folder."""


def vector_prefix(task: str) -> str:
    """Folder of a task's vector."""
    return f"vectors/{task}"


def checkpoint_prefix(task: str) -> str:
    """Folder of the checkpoint of a fine-tune that has not ended."""
    return f"{vector_prefix(task)}/checkpoint"


def basis_vector_prefix(experiment: Experiment, task: str) -> str:
    """Folder of the vector that bases use for a task: its own vector, or the prepared twin."""
    return vector_prefix(task) if experiment.basis.prepare == "none" else f"prepared/{task}"


def head_prefix(task: str) -> str:
    """Folder of the zero-shot head of a task, which may be the control or an unseen task."""
    return f"heads/{task}"


def mask_prefix(mask_id: str) -> str:
    """Folder of a mask; its id is `shared`, `shared-2` and so on, or the name of a task."""
    return f"masks/{mask_id}"


def basis_prefix(name: str) -> str:
    """Folder of a basis."""
    return f"{BASES}/{name}"


def online_prefix(name: str) -> str:
    """Folder of the state of an online basis."""
    return f"{ONLINE}/{name}"


def online_tables(count: int, version: str = "") -> str:
    """Name of the file with an online basis's small matrices after `count` tasks.

    version: tells these tasks from others; stores of earlier formats have names without it.
    """
    return f"after-{count:06d}{version and '-'}{version}.safetensors"


def find_online_tables(files: Iterable[str], count: int) -> str | None:
    """The name of the file of `online_tables` in a record's files; None if there is none."""
    start = online_tables(count).partition(".")[0]
    for name in files:
        if name.startswith((f"{start}.", f"{start}-")):
            return name
    return None


def search_prefix(name: str) -> str:
    """Folder of a candidate's search result."""
    return f"{SEARCH}/{name}"


def failed_prefix(task: str) -> str:
    """Folder of the record that says why a task failed."""
    return f"{FAILED}/{task}"
