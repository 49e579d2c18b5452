"""A task vector: the difference that fine-tuning made, as named tensors.

    tau = theta_fine_tuned - theta_pretrained;   theta_new = theta_pretrained + alpha * (tau_a +
    tau_b - tau_c)

Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


def check_same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """Raise ValueError that lists every name missing on either side and every shape that
    differs.
    """
    problems = [f"missing on the right: {n}" for n in sorted(left.keys() - right.keys())]
    problems += [f"missing on the left: {n}" for n in sorted(right.keys() - left.keys())]
    problems += [
        f"shape of {n}: {tuple(left[n].shape)} and {tuple(right[n].shape)}"
        for n in sorted(left.keys() & right.keys())
        if left[n].shape != right[n].shape
    ]
    if problems:
        raise ValueError("the two sets of tensors do not match: " + "; ".join(problems))


@dataclass(frozen=True)
class TaskVector:
    """Named tensors of a parameter difference; every operation is strict about names and shapes
    (ValueError).
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def from_state_dicts(
        cls, pretrained: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor]
    ) -> TaskVector:
        """tau = fine_tuned - pretrained over all floating tensors; integer buffers are left out."""
        check_same_tensors(pretrained, fine_tuned)
        return cls({n: fine_tuned[n] - p for n, p in pretrained.items() if p.is_floating_point()})

    def __add__(self, other: TaskVector) -> TaskVector:
        check_same_tensors(self.tensors, other.tensors)
        return TaskVector({n: t + other.tensors[n] for n, t in self.tensors.items()})

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + (-1.0) * other

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector({n: t * factor for n, t in self.tensors.items()})

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def dot(self, other: TaskVector) -> float:
        """Inner product over all entries, accumulated in float64."""
        check_same_tensors(self.tensors, other.tensors)
        return math.fsum(
            float(t.double().flatten() @ other.tensors[n].double().flatten())
            for n, t in self.tensors.items()
        )

    def norm(self) -> float:
        """Euclidean norm over all entries."""
        return math.sqrt(self.dot(self))

    def apply(
        self, pretrained: Mapping[str, Tensor], coefficient: float = 1.0
    ) -> dict[str, Tensor]:
        """theta_0 + coefficient * tau as a new state dict; tensors the vector does not have are
        copied unchanged.

        Raises ValueError where the vector has a name that `pretrained` has not, or another shape.
        """
        known = {n: pretrained[n] for n in self.tensors if n in pretrained}
        check_same_tensors(self.tensors, known)
        return {
            n: p + coefficient * self.tensors[n].to(p) if n in self.tensors else p.clone()
            for n, p in pretrained.items()
        }
