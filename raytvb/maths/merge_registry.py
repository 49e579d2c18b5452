"""The merge methods: how T task vectors become one, a parameter at a time.

A method is one function in one file of `merge_methods`:

    @merge_method("mean", summary="…", coefficient="one")
    def task_mean(vectors):
        return merged

It takes the T differences of one parameter to its pretrained weights, (T, *shape) float32 or bf16,
and gives (*shape) float32. The model is then theta_0 + alpha * merged, with alpha the caller's. So
a whole model is merged with T times one parameter in memory; beside its input a method holds a few
tensors of one parameter's size, in float32 or float64.

What a method needs beyond one parameter it gets as a keyword argument without a default, and
registers as `needs`:

- `thresholds` (T,): the least magnitude that stays of each whole vector (`global_thresholds`
  streams the vectors, exactly and in bounded memory);
- `generator`: a seeded torch.Generator, the same for all parameters, which come in a fixed order;
- `fishers` (T, *shape): the diagonal Fisher information of each task. A store has none, so such
  methods are for callers in Python only.

Values are taken to be finite; only `Thresholds` checks that. Names of parameters are unknown here:
papers that treat some parameters by name (text_projection in TSV-M and Iso-C) leave that to the
caller.

Importing this module, and all methods, is light: see `method_registry`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from raytvb.maths.method_registry import Method, Registry, place_of

if TYPE_CHECKING:
    from torch import Tensor

    MergeFunction = TypeVar("MergeFunction", bound=Callable[..., Tensor])

Need = Literal["thresholds", "generator", "fishers"]
Coefficient = Literal["one", "sum"]


@dataclass(frozen=True)
class MergeMethod(Method):
    """A registered merge method; call it as its function."""

    function: Callable[..., Tensor]
    """(T, *shape) and the keywords of `needs` → (*shape) float32."""
    coefficient: Coefficient
    """The size of the result: "one", made for a coefficient of 1, or "sum", as large as the sum of
    T vectors, whose best coefficient is nearer 1/T.
    """
    needs: tuple[Need, ...]
    """Keywords that it needs beyond one parameter."""
    matrices: bool
    """It sees whole matrices, and its result is not zero where all vectors are: sparse vectors are
    filled with zeros for it. Other methods go entry by entry.
    """

    def __call__(self, vectors: Tensor, **options: Any) -> Tensor:
        """The merged parameter. Raises ValueError where the function gives another shape."""
        merged = self.function(vectors, **options)
        if merged.shape != vectors.shape[1:]:
            raise ValueError(
                f"merge method {self.name!r} ({self.place}) made {tuple(merged.shape)} of "
                f"{tuple(vectors.shape)}"
            )
        return merged


MERGE_METHODS: Registry[MergeMethod] = Registry("merge method", "raytvb.maths.merge_methods")


def merge_method(
    name: str,
    *,
    summary: str,
    coefficient: Coefficient,
    needs: tuple[Need, ...] = (),
    matrices: bool = False,
) -> Callable[[MergeFunction], MergeFunction]:
    """Register a function as the merge method `name`; the fields are those of `MergeMethod`.

    Raises ValueError where the name is taken or is no name, and for a need or a coefficient that
    there is none of.
    """
    unknown = set(needs) - set(get_args(Need))
    if unknown or coefficient not in get_args(Coefficient):
        raise ValueError(
            f"merge method {name!r}: needs are of {', '.join(get_args(Need))}, the coefficient is "
            f"one of {', '.join(get_args(Coefficient))}; given: {needs} and {coefficient!r}"
        )

    def register(function: MergeFunction) -> MergeFunction:
        MERGE_METHODS.add(
            MergeMethod(
                name=name,
                summary=summary,
                place=place_of(function),
                function=function,
                coefficient=coefficient,
                needs=needs,
                matrices=matrices,
            )
        )
        return function

    return register


def stored_merges() -> list[str]:
    """Names of the methods that need nothing but task vectors: what a store can be merged by."""
    return [name for name, method in MERGE_METHODS.items() if "fishers" not in method.needs]


def compared_merges() -> list[str]:
    """Names of the methods that a search can compare with the plain sum."""
    return [name for name in stored_merges() if name != "sum"]
