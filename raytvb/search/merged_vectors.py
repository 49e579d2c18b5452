"""Applies merge methods of the literature to stored vectors, one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.maths.merge_registry import MERGE_METHODS, MergeMethod
from raytvb.maths.method_registry import MethodError
from raytvb.maths.thresholds import global_thresholds
from raytvb.storage.vector_set import Coordinates, VectorSet


def method_direction(vectors: Coordinates, tasks: Tensor, method: str, seed: int = 0) -> Tensor:
    """method(tau_1, ..., tau_n) float32, with tau_i = sum_f tasks[f, i] * vectors[f].

    Args:
        vectors: the F stored vectors.
        tasks: (F, n) float64.
        method: a merge method that needs no Fishers (`merge_registry.stored_merges`); it runs with
            the papers' settings.
        seed: seed of a method that needs a generator.

    A method that works entry by entry sees only the kept entries of sparse vectors, and the result
    has the coordinates of the vectors, (count,). A method that works on matrices sees and fills
    whole parameters, and the result has all of them, (D,), in the order of their sorted names.
    Raises ValueError for a method that needs what a store does not have, MethodError that names the
    parameter if the method fails, and NotFiniteError if some tau_i is not finite.
    Memory: the result, and one parameter of the n task vectors and of the F stored vectors. Vectors
    of a `VectorSet` that have no weight are not read.
    """
    mixed = _MixedVectors(*_used(vectors, tasks))
    merge = MERGE_METHODS.lookup(method)
    options = _options(merge, mixed, seed)
    thresholds = options.get("thresholds")
    filled = mixed.kept if merge.matrices else None
    total = vectors.count
    if filled is not None:
        total = sum(prod(shape) for shape in vectors.parameters.values())
    direction = torch.empty(total)
    first = 0
    for name, rows in mixed.parameters():
        whole = rows if filled is None else _whole(rows, filled[name])
        if isinstance(thresholds, Tensor):
            options["thresholds"] = thresholds.clone()  # whatever the method does to them
        try:
            merged = merge(whole, **options).reshape(-1)
        except MethodError as error:
            raise MethodError(f"{name}: {error}") from error
        direction[first : first + len(merged)] = merged
        first += len(merged)
    return direction


class NotFiniteError(VectorError):
    """Task vectors that have, with their weights, NaN or infinite values."""


class _MixedVectors:
    """The n task vectors tau_i = sum_f tasks[f, i] * vectors[f], read one parameter at a time."""

    def __init__(self, vectors: Coordinates, tasks: Tensor) -> None:
        """tasks: (F, n) float64."""
        self._vectors = vectors
        self._factors = tasks.T.to(torch.float32).contiguous()
        self._scales = self._factors.diagonal()[:, None]
        self._is_diagonal = torch.equal(self._factors, self._scales[:, 0].diag())
        self.kept = None if vectors.mask is None else vectors.mask.load().tensors()
        """Kept entries by parameter, bool; None if every entry is a coordinate."""

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The name and values of each parameter: (n, *shape), or (n, kept) if there is a mask.

        Raises NotFiniteError that names the first parameter with values that are not finite.
        """
        first = 0
        for name, shape in self._vectors.parameters.items():
            count = prod(shape) if self.kept is None else int(self.kept[name].sum())
            rows = self._mix(self._vectors.read_all(first, count))
            if not bool(rows.isfinite().all()):
                raise NotFiniteError(
                    f"the task vectors with their weights have NaN or infinite values in {name}",
                    "use smaller weights",
                )
            yield name, rows.view(len(rows), *shape) if self.kept is None else rows
            first += count

    def values(self) -> Iterator[Tensor]:
        """Like `parameters`, without the names."""
        for _, rows in self.parameters():
            yield rows

    def _mix(self, rows: Tensor) -> Tensor:
        # Diagonal factors only scale the stored vectors, which takes no n^2 products.
        return rows * self._scales if self._is_diagonal else self._factors @ rows


def _options(
    method: MergeMethod, mixed: _MixedVectors, seed: int
) -> dict[str, Tensor | torch.Generator]:
    """What the method needs beyond one parameter."""
    options: dict[str, Tensor | torch.Generator] = {}
    for need in method.needs:
        match need:
            case "thresholds":
                options[need] = global_thresholds(mixed.values)
            case "generator":
                options[need] = torch.Generator().manual_seed(seed)
            case "fishers":
                raise ValueError(
                    f"merge method {method.name!r} needs the Fisher information of each task, "
                    f"which a store does not have"
                )
    return options


def _used(vectors: Coordinates, tasks: Tensor) -> tuple[Coordinates, Tensor]:
    """The vectors that have weight in some task, with their weights.

    Keeps all vectors if a part of them cannot be read by itself.
    """
    used = tasks.any(dim=1).nonzero()[:, 0].tolist()
    if not isinstance(vectors, VectorSet) or len(used) in (0, len(tasks)):
        return vectors, tasks
    return vectors.subset(used), tasks[used]


def _whole(rows: Tensor, kept: Tensor) -> Tensor:
    """The kept entries (n, k) in their places, with zeros elsewhere: (n, *shape).

    kept: bool, of that shape.
    """
    whole = torch.zeros(len(rows), kept.numel())
    whole[:, kept.reshape(-1)] = rows
    return whole.view(len(rows), *kept.shape)
