"""The k-th largest magnitude of whole vectors that are given one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from raytvb.maths.mask_selection import kept_count

_NOT_FINITE = 0x7F800000  # bits of infinity in float32; those of NaN are above


def check_vectors(vectors: Tensor) -> Tensor:
    """The vectors themselves. Raises ValueError unless they are floats (T, *shape) with T >= 1."""
    if vectors.ndim == 0 or len(vectors) == 0 or not vectors.is_floating_point():
        raise ValueError(
            f"expected T >= 1 vectors (T, *shape) of floats, not {tuple(vectors.shape)} "
            f"{vectors.dtype}"
        )
    return vectors


class Thresholds:
    """The k-th largest magnitude of each of T vectors, with k = round(density * D).

    The caller adds one parameter of all vectors at a time. The result is exact: magnitudes in
    float32 are ordered as their bits are. The first pass counts the upper 16 bits of the entries.
    The second pass counts the lower 16 bits of those entries that share the upper bits of the k-th
    largest. In bf16 the lower bits are zero, and one pass is enough. Memory: at most T * 2 MB for
    the counts, and a few rows of one parameter, independent of D.

        thresholds = Thresholds(0.2)
        while thresholds.values is None:
            for vectors in parameters():
                thresholds.add(vectors)
            thresholds.end_pass()
    """

    def __init__(self, density: float = 0.2) -> None:
        """Raises ValueError for a density outside (0, 1]."""
        kept_count(1, density)
        self.density = density
        self.values: Tensor | None = None  # (T,) float32, once the last pass has ended
        self._counts: Tensor | None = None  # (T, 2^15 or 2^16) int64, of the current pass
        self._upper: Tensor | None = None  # (T,) int64, after the first pass
        # (T,), after the first pass: the rank of the k-th largest in its bin, and the bin's size.
        self._rank = self._inside = torch.empty(0)
        self._halves = True  # only bf16 has been seen

    def add(self, vectors: Tensor) -> None:
        """Count one parameter, (T, *shape) float32 or bf16.

        Raises ValueError for another T than before, and for NaN and infinity.
        """
        bins = 2**15 if self._upper is None else 2**16
        if self._counts is None:
            self._counts = torch.zeros(
                len(check_vectors(vectors)), bins, dtype=torch.int64, device=vectors.device
            )
        if len(vectors) != len(self._counts):
            raise ValueError(
                f"a parameter of {len(vectors)} vectors after one of {len(self._counts)}"
            )
        self._halves &= vectors.dtype == torch.bfloat16
        for t, row in enumerate(vectors):
            bits = row.float().abs().reshape(-1).view(torch.int32)
            if (bits >= _NOT_FINITE).any():
                raise ValueError(f"vector {t} has NaN or infinite values")
            upper = bits >> 16
            bits = upper if self._upper is None else bits[upper == self._upper[t]] & 0xFFFF
            self._counts[t] += torch.bincount(bits, minlength=bins)

    def end_pass(self) -> None:
        """End a pass over all parameters. Then `values` is set, or a second pass is needed.

        Raises ValueError if no parameters were added, or if the second pass differs from the first.
        """
        counts, self._counts = self._counts, None
        if counts is None or not counts.any():
            raise ValueError("no vectors passed: both passes need all parameters")
        if self._upper is None:
            totals = counts.sum(1)
            ranks = [kept_count(int(total), self.density) for total in totals]
            self._upper, self._rank, self._inside = _locate(
                counts, torch.tensor(ranks, device=counts.device)
            )
            if self._halves:
                self.values = (self._upper << 16).int().view(torch.float32)
        else:
            if not torch.equal(counts.sum(1), self._inside):
                raise ValueError("the second pass had other values than the first")
            lower = _locate(counts, self._rank)[0]
            self.values = (self._upper << 16 | lower).int().view(torch.float32)


def _locate(counts: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rank-th largest entry (1 is the largest) lies in counts (T, bins).

    Returns its bin, its rank within the bin, and the bin's size, three tensors (T,).
    """
    reached = counts.flip(1).cumsum(1).flip(1)  # entries in this bin or above
    bins = (reached >= ranks[:, None]).sum(1) - 1
    inside = counts.gather(1, bins[:, None])[:, 0]
    above = reached.gather(1, bins[:, None])[:, 0] - inside
    return bins, ranks - above, inside


def global_thresholds(parameters: Callable[[], Iterable[Tensor]], density: float = 0.2) -> Tensor:
    """The thresholds (T,) float32 of whole vectors, as in `Thresholds`.

    parameters: called once or twice, once for each pass; each time it returns all parameters
    (T, *shape) of the vectors. Raises ValueError as `Thresholds`.
    """
    thresholds = Thresholds(density)
    while thresholds.values is None:
        for vectors in parameters():
            thresholds.add(vectors)
        thresholds.end_pass()
    return thresholds.values
