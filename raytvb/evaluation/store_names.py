"""Names of evaluations in the store, below `evals/`. Additions of the seeded subsets have the name
of their candidate.
"""

from __future__ import annotations

SINGLE_MODELS = "models"


def additions_name(candidate: str) -> str:
    """Name of the additions that the experiment lists, from one candidate."""
    return f"additions/{candidate}"


def negation_name(candidate: str, task: str) -> str:
    """Name of forgetting one task."""
    return f"negation-{candidate}/{task}"


def online_name(candidate: str) -> str:
    """Name of the arrivals of an online basis."""
    return f"online/{candidate}"


def unseen_name(task: str) -> str:
    """Name of learning a task without a vector."""
    return f"unseen/{task}"


def pair_name(candidate: str, pair: tuple[str, str]) -> str:
    """Name of the disentanglement of two tasks. Slashes in the tasks' own names become dashes."""
    first, second = (task.replace("/", "-") for task in pair)
    return f"disentanglement/{candidate}/{first}+{second}"
