"""What lies where in a store: the keys of everything an experiment keeps; see the README."""

from __future__ import annotations

from raytvb.experiment.config import Experiment
from raytvb.experiment.tasks import TaskConfig

EXPERIMENT = "experiment.yaml"


BASE = "base"


SHARED_MASK = "shared"


GRAM = "gram"


OVERLAP = "overlap"


PRECISION = "precision"


SUMMARY = "report/summary.json"


REPORT = "report/index.html"


def vector_prefix(task: str) -> str:
    """Folder of a task's vector, head and record."""
    return f"vectors/{task}"


def vector_key(task: str) -> str:
    """The vector file itself."""
    return f"{vector_prefix(task)}/vector.safetensors"


def basis_vector_prefix(experiment: Experiment, task: str) -> str:
    """Folder of what bases are made of for a task: its vector, or the prepared twin of that."""
    return vector_prefix(task) if experiment.basis.prepare == "none" else f"prepared/{task}"


def basis_vector_key(experiment: Experiment, task: str) -> str:
    """The vector file that bases are made of."""
    return f"{basis_vector_prefix(experiment, task)}/vector.safetensors"


def mask_prefix(mask_id: str) -> str:
    """Folder of a mask; its id is `shared` or the task's name."""
    return f"masks/{mask_id}"


def basis_prefix(name: str) -> str:
    """Folder of a basis."""
    return f"basis/{name}"


def online_prefix(name: str) -> str:
    """Folder of the state of an online basis."""
    return f"online/{name}"


def online_tables(count: int) -> str:
    """The file of an online basis's small matrices after `count` tasks."""
    return f"after-{count:06d}.safetensors"


def head_key(experiment: Experiment, task: TaskConfig) -> str:
    """Zero-shot head of a task, or of the control or an unseen task."""
    if task.name in experiment.task_names:
        return f"{vector_prefix(task.name)}/head.safetensors"
    return f"{BASE}/heads/{task.name}.safetensors"


def checkpoint_prefix(task: str) -> str:
    """Folder of a fine-tune that has not ended."""
    return f"{vector_prefix(task)}/checkpoint"


SEARCH = "search"


def search_prefix(name: str) -> str:
    """Folder of a candidate's search result."""
    return f"{SEARCH}/{name}"


TIMINGS = "report/timings.json"
