"""What a search chose, and what the search cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytvb.maths.counts import Count, mean
from raytvb.storage.contract import Contract, JsonObject


class SearchOutcome(Contract):
    """The choice and the cost of one search of the benchmark."""

    algorithm: str
    size: int | None
    """Size of the chosen basis; None if no basis is better than the pretrained model."""
    coefficient: dict[int, float]
    """The chosen coefficient, by number of tasks added."""
    validation_accuracy: float
    candidates: int
    """How many coefficients the search tried."""
    evaluations: int
    images: int
    """How many validation images went through the image tower."""
    seconds: float
    """Processor seconds until the choice is made. Other work on the machine would change the wall
    time of the two searches by unequal amounts.
    """
    test_accuracy: float
    test_images: int
    test_seconds: float

    def to_json(self) -> JsonObject:
        """The fields, with the choice as one object. A single coefficient is a plain number."""
        fields = super().to_json()
        coefficient, size = fields.pop("coefficient"), fields.pop("size")
        if len(self.coefficient) == 1:
            (coefficient,) = self.coefficient.values()
        fields["chosen"] = {"size": size, "coefficient": coefficient}
        return fields


def mean_accuracy(counts: Mapping[int, Sequence[Count]]) -> float:
    """The mean over numbers of tasks of the mean accuracy over tasks."""
    return mean([accuracy_of(group) for group in counts.values()])


def accuracy_of(counts: Sequence[Count]) -> float:
    """The mean accuracy over tasks."""
    return mean([count.accuracy for count in counts])


def total_images(counts: Mapping[int, Sequence[Count]]) -> int:
    """The total number of images."""
    total = 0
    for group in counts.values():
        total += sum(count.total for count in group)
    return total
