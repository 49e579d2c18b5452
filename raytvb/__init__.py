"""raytvb: hundreds of fine-tunes of one model, turned into a small, searchable, mergeable task vector basis, on Ray.

The pure parts need no Ray and no store: `fisher_scores`, `select_mask`, `gram_matrix`, `fit_basis`, `TaskVector`;
`write_combinations` and `StoredBasis` write and read bases of vector files.
`run(load_experiment("experiment.yaml"))` is `raytvb run experiment.yaml`.
All are imported at first use, so that `raytvb --help` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytvb.basis import BasisFit, fit_bases, fit_basis
    from raytvb.basis_files import StoredBasis, write_combinations
    from raytvb.config import Experiment, load_experiment
    from raytvb.fisher import fisher_scores
    from raytvb.gram import gram_matrix
    from raytvb.masks import Mask
    from raytvb.pipeline import run
    from raytvb.store import Store
    from raytvb.talos import select_mask
    from raytvb.task_vector import TaskVector
    from raytvb.vectors import vector_bytes, vector_info

_HOMES = {"BasisFit": "basis", "Experiment": "config", "Mask": "masks", "Store": "store", "StoredBasis": "basis_files",
          "TaskVector": "task_vector", "fisher_scores": "fisher", "fit_bases": "basis", "fit_basis": "basis",
          "gram_matrix": "gram", "load_experiment": "config", "run": "pipeline", "select_mask": "talos",
          "vector_bytes": "vectors", "vector_info": "vectors", "write_combinations": "basis_files"}
__all__ = ["BasisFit", "Experiment", "Mask", "Store", "StoredBasis", "TaskVector", "fisher_scores", "fit_bases",
           "fit_basis", "gram_matrix", "load_experiment", "run", "select_mask", "vector_bytes", "vector_info",
           "write_combinations"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytvb' has no attribute {name!r}")
    return getattr(import_module(f"raytvb.{_HOMES[name]}"), name)
