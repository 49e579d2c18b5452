"""The keys of everything that an experiment keeps in its store. The README lists them, too."""

from __future__ import annotations

from raytvb.experiment.config import Experiment

EXPERIMENT = "experiment.yaml"
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

VECTOR = "vector.safetensors"
"""Name of the vector file in the folder of a task, and in the folder of its twin."""

HEAD = "head.safetensors"
"""Name of the zero-shot head in the folder of a head; in stores of format 1, in a task's folder."""

MASK = "mask.safetensors"
"""Name of the mask file in a mask's folder."""

COEFFICIENTS = "coefficients.safetensors"
"""Name of the table of coefficients in a basis's folder."""


def vector_prefix(task: str) -> str:
    """Folder of a task's vector."""
    return f"vectors/{task}"


def vector_key(task: str) -> str:
    """Key of a task's vector file."""
    return f"{vector_prefix(task)}/{VECTOR}"


def checkpoint_prefix(task: str) -> str:
    """Folder of the checkpoint of a fine-tune that has not ended."""
    return f"{vector_prefix(task)}/checkpoint"


def basis_vector_prefix(experiment: Experiment, task: str) -> str:
    """Folder of the vector that bases use for a task: its own vector, or the prepared twin."""
    return vector_prefix(task) if experiment.basis.prepare == "none" else f"prepared/{task}"


def basis_vector_key(experiment: Experiment, task: str) -> str:
    """Key of the vector file that bases use for a task."""
    return f"{basis_vector_prefix(experiment, task)}/{VECTOR}"


def head_prefix(task: str) -> str:
    """Folder of the zero-shot head of a task, which may be the control or an unseen task."""
    return f"heads/{task}"


def mask_prefix(mask_id: str) -> str:
    """Folder of a mask; its id is `shared`, or the name of the task that it belongs to."""
    return f"masks/{mask_id}"


def mask_key(mask_id: str) -> str:
    """Key of the mask file."""
    return f"{mask_prefix(mask_id)}/{MASK}"


def basis_prefix(name: str) -> str:
    """Folder of a basis."""
    return f"{BASES}/{name}"


def online_prefix(name: str) -> str:
    """Folder of the state of an online basis."""
    return f"{ONLINE}/{name}"


def online_tables(count: int) -> str:
    """Name of the file with an online basis's small matrices after `count` tasks."""
    return f"after-{count:06d}.safetensors"


def search_prefix(name: str) -> str:
    """Folder of a candidate's search result."""
    return f"{SEARCH}/{name}"


def failed_prefix(task: str) -> str:
    """Folder of the record that says why a task failed."""
    return f"{FAILED}/{task}"
