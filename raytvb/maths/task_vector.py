"""A task vector: the difference that fine-tuning made, as named tensors.

    tau = theta_fine_tuned - theta_pretrained
    theta_new = theta_pretrained + alpha * (tau_a + tau_b - tau_c)

Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from raytvb.maths.finite import listed, not_finite


def check_same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """Raise ValueError if names or shapes differ. The message lists every missing name and every
    shape that differs.
    """
    problems = [f"missing on the right: {n}" for n in sorted(left.keys() - right.keys())]
    problems += [f"missing on the left: {n}" for n in sorted(right.keys() - left.keys())]
    for name in sorted(left.keys() & right.keys()):
        ours, theirs = tuple(left[name].shape), tuple(right[name].shape)
        if ours != theirs:
            problems.append(f"shape of {name}: {ours} and {theirs}")
    if problems:
        raise ValueError("the two sets of tensors do not match: " + "; ".join(problems))


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """after - before, with 0 where both are the same, also where both are infinite."""
    difference = after - before
    if bool(difference.isfinite().all()):
        return difference
    return difference.masked_fill(before == after, 0.0)


@dataclass(frozen=True)
class TaskVector:
    """The difference of two models, as named tensors.

    Every operation raises ValueError where names or shapes do not match.
    """

    tensors: Mapping[str, Tensor]
    """Name of the parameter -> difference, of the parameter's shape."""

    @classmethod
    def from_state_dicts(
        cls, pretrained: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor]
    ) -> TaskVector:
        """tau = fine_tuned - pretrained over all floating tensors; integer buffers are left out.

        Entries that are infinite in both, as in a buffer with an attention mask, have the
        difference 0. Raises ValueError that names the tensors whose difference is not finite.
        """
        check_same_tensors(pretrained, fine_tuned)
        tensors: dict[str, Tensor] = {}
        for name, before in pretrained.items():
            if before.is_floating_point():
                tensors[name] = _difference(before, fine_tuned[name])
        bad = not_finite(tensors)
        if bad:
            raise ValueError(
                f"the difference of the two models has NaN or infinite values in {listed(bad)}: "
                f"use checkpoints whose weights are finite"
            )
        return cls(tensors)

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
        products = list[float]()
        for name, tensor in self.tensors.items():
            left, right = tensor.double().flatten(), other.tensors[name].double().flatten()
            products.append(float(left @ right))
        return math.fsum(products)

    def norm(self) -> float:
        """Euclidean norm over all entries."""
        return math.sqrt(self.dot(self))

    def apply(
        self, pretrained: Mapping[str, Tensor], coefficient: float = 1.0
    ) -> dict[str, Tensor]:
        """theta_0 + coefficient * tau as a new state dict.

        Tensors that the vector does not have are copied unchanged. Raises ValueError where the
        vector has a name that `pretrained` does not have, or another shape, and ValueError that
        names the tensors in which finite weights would become NaN or infinite.
        """
        moved = {n: pretrained[n] for n in self.tensors if n in pretrained}
        check_same_tensors(self.tensors, moved)
        state = {n: p.clone() for n, p in pretrained.items() if n not in moved}
        for name, parameter in moved.items():
            state[name] = parameter + coefficient * self.tensors[name].to(parameter)
        bad: list[str] = []
        for name in not_finite({name: state[name] for name in moved}):
            if bool((moved[name].isfinite() & ~state[name].isfinite()).any()):
                bad.append(name)
        if bad:
            raise ValueError(
                f"the result would have NaN or infinite values in {listed(bad)}: use a smaller "
                f"coefficient, or a vector whose values are finite"
            )
        return {name: state[name] for name in pretrained}
