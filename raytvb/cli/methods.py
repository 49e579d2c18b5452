"""`raytvb methods`: lists the basis methods and the merge methods."""

from __future__ import annotations

import click

from raytvb.maths.basis_registry import BASIS_METHODS, BasisMethod
from raytvb.maths.merge_registry import MERGE_METHODS, MergeMethod


@click.command(name="methods")
def list_methods() -> None:
    """List the basis methods and the merge methods.

    An experiment names them in `basis: {method: …}` and `search: {merges: …}`. The list includes
    your own methods, from the modules that RAYTVB_PLUGINS names.

    \b
    raytvb methods
    """
    # Both are looked up before anything is printed: a module of RAYTVB_PLUGINS may be wrong.
    basis_methods, merge_methods = list(BASIS_METHODS.values()), list(MERGE_METHODS.values())
    print("Basis methods: T task vectors become M basis vectors")
    for basis in basis_methods:
        print(f"  {basis.name:<18} {basis.summary}{_basis_notes(basis)}")
        print(f"  {'':<18} time: {basis.cost}")
    print("\nMerge methods: T task vectors become one")
    for merge in merge_methods:
        print(f"  {merge.name:<18} {merge.summary}{_merge_notes(merge)}")


def _basis_notes(method: BasisMethod) -> str:
    notes = []
    if method.convex:
        notes.append("convex")
    if method.online is not None:
        notes.append("also online")
    return f" [{', '.join(notes)}]" if notes else ""


def _merge_notes(method: MergeMethod) -> str:
    return " [in Python only: stores keep no Fishers]" if "fishers" in method.needs else ""
