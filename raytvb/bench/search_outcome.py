"""What a search chose, and what that took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytvb.maths.counts import Count, mean
from raytvb.storage.contract import Contract, JsonObject


class SearchOutcome(Contract):
    """One search of the benchmark."""

    algorithm: str
    size: int | None
    """Number of vectors of the chosen basis; None where no basis is better than the pretrained
    model.
    """
    coefficient: dict[int, float]
    """The chosen coefficient, by number of tasks added."""
    validation_accuracy: float
    candidates: int
    """Coefficients that were looked at."""
    evaluations: int
    images: int
    """Validation images that went through the tower."""
    seconds: float
    """Of the processor, until the choice is made: other work on the machine would not change wall
    time in equal parts.
    """
    test_accuracy: float
    test_images: int
    test_seconds: float

    def to_json(self) -> JsonObject:
        """With the choice as one object; one number where there is one coefficient only."""
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
    """The number of images that were counted."""
    total = 0
    for group in counts.values():
        total += sum(count.total for count in group)
    return total
