"""The basis methods: how T task vectors become M basis vectors and a table of coefficients.

A method is one function in one file of `basis_methods`:

    @basis_method("svd", summary="…", cost="…")
    def svd(vectors, size, generator):
        return B_TM, W_MT

`vectors` is a `GramFactor`: all that a method knows of the T task vectors is their Gram matrix G
and what follows from it. `size` is M, at most the rank of G. Every random draw comes from
`generator`. The result is B (T, M) and W (M, T), both float64: basis vector m is Σ_t B[t, m] τ_t,
and task t comes back as Σ_m W[m, t] s_m. For a given B the best W is `vectors.weights(B)`.

Importing this module and all methods is light: see `method_registry`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from raytvb.maths.method_registry import Method, Registry, origin_of, place_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raytvb.maths.gram_factor import GramFactor
    from raytvb.maths.online_refit import Atoms

    Fit = Callable[[GramFactor, int, torch.Generator], tuple[Tensor, Tensor]]
    Refit = Callable[[Atoms, int], Tensor]
    FitFunction = TypeVar("FitFunction", bound=Fit)


@dataclass(frozen=True)
class BasisMethod(Method):
    """A registered basis method."""

    kind: ClassVar[str] = "basis method"
    fit: Fit
    """(vectors, size, generator) → B (T, M), W (M, T), as at the top of the module."""
    cost: str
    """How the time of a fit grows with T tasks and M basis vectors, beyond the eigenvectors of the
    Gram matrix, which every fit needs: O(T³).
    """
    convex: bool
    """Whether every basis vector is a convex combination of task vectors. If so, the plain sum of
    the basis vectors means something.
    """
    extra: int
    """How many vectors beyond the rank of the Gram matrix an exact basis may need: 1 for a method
    that fixes a column of B, else 0.
    """
    online: Refit | None
    """The method's online form: (atoms, size) → the mix B′ (K, at most size) with which the atoms
    [S N] become the new basis, see `online_refit`. None if the method has no online form.
    """


BASIS_METHODS: Registry[BasisMethod] = Registry(
    BasisMethod.kind, "raytvb.maths.basis_methods", reserved=("random-own", "random-lstsq")
)


def basis_method(
    name: str,
    *,
    summary: str,
    cost: str,
    convex: bool = False,
    extra: int = 0,
    online: Refit | None = None,
) -> Callable[[FitFunction], FitFunction]:
    """Register a function as the basis method `name`; the fields are those of `BasisMethod`.

    Raises ValueError if another definition has the name, or if the name is not lower-case words
    with hyphens between them.
    """

    def register(function: FitFunction) -> FitFunction:
        BASIS_METHODS.add(
            BasisMethod(
                name=name,
                summary=summary,
                place=place_of(function),
                origin=origin_of(function),
                fit=function,
                cost=cost,
                convex=convex,
                extra=extra,
                online=online,
            )
        )
        return function

    return register


def online_methods() -> list[str]:
    """Names of the methods that have an online form."""
    return [name for name, method in BASIS_METHODS.items() if method.online is not None]


def convex_methods() -> list[str]:
    """Names of the methods whose basis vectors are convex combinations of task vectors."""
    return [name for name, method in BASIS_METHODS.items() if method.convex]
