"""Names of evaluations in the store, below `evals/`. The additions of the seeded subsets have the
name of their candidate.
"""

from __future__ import annotations

SINGLE_MODELS = "models"


def additions_name(candidate: str) -> str:
    """Name of the evaluation of one candidate on the additions that the experiment lists."""
    return f"additions/{candidate}"


def negation_name(candidate: str, task: str) -> str:
    """Name of the evaluation that forgets one task."""
    return f"negation-{candidate}/{task}"


def online_name(candidate: str) -> str:
    """Name of the evaluation of an online basis after each arrival."""
    return f"online/{candidate}"


def unseen_name(task: str) -> str:
    """Name of the evaluation that learns a task without a vector."""
    return f"unseen/{task}"


def pair_name(candidate: str, pair: tuple[str, str]) -> str:
    """Name of the disentanglement of two tasks. Slashes in the tasks' own names become dashes."""
    first, second = (task.replace("/", "-") for task in pair)
    return f"disentanglement/{candidate}/{first}+{second}"
