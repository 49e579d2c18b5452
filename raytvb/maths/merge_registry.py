"""The merge methods: how T task vectors become one, one parameter at a time.

A method is one function in one file of `merge_methods`:

    @merge_method("mean", summary="…", coefficient="one")
    def task_mean(vectors):
        return merged

It takes the T differences of one parameter to its pretrained weights, (T, *shape) float32 or bf16,
and returns (*shape) float32; other floats are converted to float32. The caller chooses alpha, and
the model is theta_0 + alpha * merged. Merging a whole model thus needs T copies of one parameter in
memory. Beside its input a method holds a few tensors of one parameter's size, in float32 or
float64.

If a method needs more than the vectors of one parameter, it takes that as a keyword argument
without a default, and names the argument in `needs`:

- `thresholds` (T,): for each whole vector, the least magnitude that is kept (`global_thresholds`
  streams the vectors, exactly and in bounded memory);
- `generator`: a seeded torch.Generator, the same for all parameters, which come in a fixed order;
- `fishers` (T, *shape): the diagonal Fisher information of each task. A store does not hold it, so
  only callers in Python can use such methods.

Values are assumed to be finite; only `Thresholds` checks that. A method does not know the names of
parameters. Where a paper treats some parameters by name (text_projection in TSV-M and Iso-C), that
is left to the caller.

Importing this module and all methods is light: see `method_registry`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

from raytvb.maths.method_registry import (
    Method,
    Registry,
    described_type,
    origin_of,
    place_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    MergeFunction = TypeVar("MergeFunction", bound=Callable[..., Tensor])

Need = Literal["thresholds", "generator", "fishers"]
Coefficient = Literal["one", "sum"]


@dataclass(frozen=True)
class MergeMethod(Method):
    """A registered merge method; call it as its function."""

    kind: ClassVar[str] = "merge method"
    function: Callable[..., Tensor]
    """(T, *shape) and the keywords of `needs` → (*shape) float32."""
    coefficient: Coefficient
    """The size of the result. "one": it is made for a coefficient of 1. "sum": it is as large as
    the sum of T vectors, so its best coefficient is nearer 1/T.
    """
    needs: tuple[Need, ...]
    """The keyword arguments that the method needs beyond the vectors of one parameter."""
    matrices: bool
    """Whether the method works on whole matrices, so that its result may be non-zero where all
    vectors are zero. Sparse vectors are filled up with zeros for such a method. Other methods work
    entry by entry.
    """

    def __call__(self, vectors: Tensor, **options: Any) -> Tensor:
        """The merged parameter (*shape) float32.

        Raises MethodError if the function raises anything, and if it returns anything but floats of
        that shape, or values that are not finite for vectors that are.
        """
        import torch

        result = self.run(self.function, vectors, **options)
        expected = f"it must return a tensor of floats {tuple(vectors.shape[1:])}"
        if not isinstance(result, torch.Tensor):
            raise self.fault(f"returned {described_type(result)}", expected)
        if result.shape != vectors.shape[1:]:
            raise self.fault(
                f"returned shape {tuple(result.shape)} for vectors {tuple(vectors.shape)}", expected
            )
        if not result.is_floating_point():
            raise self.fault(f"returned {result.dtype}", expected)
        merged = result.detach().to(vectors.device, torch.float32)
        # From vectors that are not finite themselves, nothing else can be expected.
        if not merged.isfinite().all() and vectors.isfinite().all():
            count = int((~merged.isfinite()).sum())
            raise self.fault(
                f"returned {count} values of {merged.numel()} that are NaN or infinite",
                "correct the method (a division by zero?), or leave it out",
            )
        return merged


MERGE_METHODS: Registry[MergeMethod] = Registry(
    MergeMethod.kind, "raytvb.maths.merge_methods", reserved=("online",)
)


def merge_method(
    name: str,
    *,
    summary: str,
    coefficient: Coefficient,
    needs: tuple[Need, ...] = (),
    matrices: bool = False,
) -> Callable[[MergeFunction], MergeFunction]:
    """Register a function as the merge method `name`; the fields are those of `MergeMethod`.

    Raises ValueError if another definition has the name, if the name is not lower-case words with
    hyphens between them, and for an unknown need or coefficient.
    """
    unknown = set(needs) - set(get_args(Need))
    if unknown or coefficient not in get_args(Coefficient):
        raise ValueError(
            f"merge method {name!r}: needs can be {', '.join(get_args(Need))}, and the coefficient "
            f"{' or '.join(get_args(Coefficient))}; got {needs} and {coefficient!r}"
        )

    def register(function: MergeFunction) -> MergeFunction:
        MERGE_METHODS.add(
            MergeMethod(
                name=name,
                summary=summary,
                place=place_of(function),
                origin=origin_of(function),
                function=function,
                coefficient=coefficient,
                needs=needs,
                matrices=matrices,
            )
        )
        return function

    return register


def stored_merges() -> list[str]:
    """Names of the methods that can merge a store's vectors: they need no Fisher information."""
    return [name for name, method in MERGE_METHODS.items() if "fishers" not in method.needs]


def compared_merges() -> list[str]:
    """Names of the methods that a search can compare with the plain sum."""
    return [name for name in stored_merges() if name != "sum"]
