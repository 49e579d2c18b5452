"""raytvb: hundreds of fine-tunes of one model, made into a small, searchable, mergeable basis.

The pure parts need no Ray and no store: `fisher_scores`, `select_mask`, `fit_basis`, `TaskVector`.
`gram_matrix`, `write_combinations` and `StoredBasis` work on task vector files and bases in a
store. `run(load_experiment("experiment.yaml"))` does the same as `raytvb run experiment.yaml`.
`basis_method` and `merge_method` register your own methods (docs/extending.md). Each name is
imported at its first use, so `raytvb --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raytvb.errors import PartialRunError
    from raytvb.experiment.config import Experiment
    from raytvb.experiment.parsing import load_experiment
    from raytvb.maths.basis_fit import BasisFit, fit_bases, fit_basis
    from raytvb.maths.basis_registry import basis_method
    from raytvb.maths.fisher import fisher_scores
    from raytvb.maths.mask_selection import select_mask
    from raytvb.maths.merge_registry import merge_method
    from raytvb.maths.task_vector import TaskVector
    from raytvb.orchestration.pipeline import run
    from raytvb.storage.basis_writer import write_combinations
    from raytvb.storage.gram_files import gram_matrix
    from raytvb.storage.masks import Mask
    from raytvb.storage.store import Store
    from raytvb.storage.stored_basis import StoredBasis
    from raytvb.storage.vectors import vector_bytes, vector_info

_HOMES = {
    "BasisFit": "maths.basis_fit",
    "Experiment": "experiment.config",
    "Mask": "storage.masks",
    "PartialRunError": "errors",
    "Store": "storage.store",
    "StoredBasis": "storage.stored_basis",
    "TaskVector": "maths.task_vector",
    "basis_method": "maths.basis_registry",
    "fisher_scores": "maths.fisher",
    "fit_bases": "maths.basis_fit",
    "fit_basis": "maths.basis_fit",
    "gram_matrix": "storage.gram_files",
    "load_experiment": "experiment.parsing",
    "merge_method": "maths.merge_registry",
    "run": "orchestration.pipeline",
    "select_mask": "maths.mask_selection",
    "vector_bytes": "storage.vectors",
    "vector_info": "storage.vectors",
    "write_combinations": "storage.basis_writer",
}
__all__ = [
    "BasisFit",
    "Experiment",
    "Mask",
    "PartialRunError",
    "Store",
    "StoredBasis",
    "TaskVector",
    "basis_method",
    "fisher_scores",
    "fit_bases",
    "fit_basis",
    "gram_matrix",
    "load_experiment",
    "merge_method",
    "run",
    "select_mask",
    "vector_bytes",
    "vector_info",
    "write_combinations",
]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytvb' has no attribute {name!r}")
    return getattr(import_module(f"raytvb.{_HOMES[name]}"), name)
