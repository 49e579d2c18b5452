"""What bases of any size would lose, from the Gram matrix as far as it has grown."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from raytvb.errors import UserError
from raytvb.maths.basis_fit import fit_basis, task_errors
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store


def spectrum_of(store: Store, method: str = "ae", size: int | None = None) -> dict[str, Any]:
    """Eigenvalues of the Gram matrix as shares of their sum, the least relative error at each M,
    the fit at `size`.

    Raises UserError where no vector has been taken in yet.
    """
    state = GramState.read(store)
    if not state.tasks:
        raise UserError(
            f"{store.url} has no Gram matrix yet: `raytvb run` or `raytvb basis` makes it, vector by "
            f"vector"
        )
    values = torch.linalg.eigvalsh(state.gram).flip(0).clamp(min=0)
    share = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    found: dict[str, Any] = {
        "tasks": state.tasks,
        "share": share.tolist(),
        "floor": (1 - share.cumsum(0)).clamp(min=0).tolist(),
    }
    if size is not None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            fit = fit_basis(state.gram, size, method=method)
        errors = task_errors(state.gram, fit).tolist()
        found["fit"] = {
            "method": method,
            "size": fit.size,
            "loss": fit.loss,
            "floor": fit.floor,
            "per_task": dict(zip(state.tasks, errors, strict=True)),
            "notes": [str(w.message) for w in caught],
        }
    return found


def describe_tasks(found: dict[str, Any]) -> str:
    """The fit in lines."""
    fit = found.get("fit")
    if fit is None:
        return f"task vectors so far: {len(found['tasks'])}"
    lines = [
        *(f"note: {n}" for n in fit["notes"]),
        f"{fit['method']} with {fit['size']} vectors: relative error {fit['loss']:.4f} (least {fit['floor']:.4f})",
    ]
    return "\n".join(lines + [f"  {task}  {error:.4f}" for task, error in fit["per_task"].items()])
