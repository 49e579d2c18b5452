"""The section `basis` of an experiment file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from raytvb.errors import listed
from raytvb.experiment.fields import Count, Flag, Frozen, one_or_many
from raytvb.maths.basis_registry import BASIS_METHODS, online_methods


def _each_once(given: object) -> object:
    """One name or several, without repetitions."""
    names = one_or_many(given)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return names
    return tuple(dict.fromkeys(names))


class BasisConfig(Frozen):
    """Which bases are built."""

    method: Annotated[tuple[str, ...], BeforeValidator(_each_once)] = Field(
        ("ae",), description="One basis method or several."
    )
    prepare: Literal["none", "trimmed", "dropped", "sparsified"] = Field(
        "none",
        description=(
            "What bases are made of. none: the task vectors. trimmed: only their largest entries, "
            "as in TIES. dropped: only a random part of their entries, as in DARE. sparsified: "
            "their entries without both tails, as in Breadcrumbs."
        ),
    )
    online: Flag = Field(
        False,
        description=(
            "Also build bases that see each vector once and need bounded memory. Only some methods "
            "have such an online form."
        ),
    )
    buffer: Count = Field(
        1,
        description=(
            "How many task vectors an online basis takes in at a time. It holds these and its M "
            "basis vectors in memory."
        ),
    )

    @model_validator(mode="after")
    def _known(self) -> BasisConfig:
        unknown = [name for name in self.method if name not in BASIS_METHODS]
        if unknown or not self.method:
            raise ValueError(
                f"unknown basis method {listed(unknown) or '(none given)'}; allowed: "
                f"{', '.join(BASIS_METHODS)}"
            )
        if self.online and not set(self.method) & set(online_methods()):
            raise ValueError(
                f"online: none of the methods {', '.join(self.method)} can be online; "
                f"those that can: {', '.join(online_methods())}"
            )
        return self
