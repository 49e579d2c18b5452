"""Packs what a job on another machine needs: the experiment file and this raytvb's source. Checks
that the job can also reach its store and data.
"""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment

EXPERIMENT = "experiment.yaml"
"""Name of the experiment file in the upload."""


def check_places(experiment: Experiment) -> list[str]:
    """Warnings about local paths in an experiment that is to run on another machine.

    Raises UserError for a relative path of a store or data folder: on the cluster, it would lie in
    the job's own temporary folder.
    """
    local = _local_places(experiment)
    relative = []
    for name, place in local.items():
        if not Path(place).expanduser().is_absolute():
            relative.append(f"{name}: {place}")
    if relative:
        raise UserError(
            f"{'; '.join(relative)}: a path relative to this machine is not on the cluster; "
            "use a URL that every node reaches, such as s3://bucket/prefix, or an absolute path on "
            "a one-node cluster"
        )
    warnings = []
    for name, place in local.items():
        warnings.append(
            f"{name}: {place} is a path on the cluster's machines, not on this one: right only for "
            "one node or a shared file system"
        )
    return warnings


def _local_places(experiment: Experiment) -> dict[str, str]:
    """The store and the tasks' data, so far as they are paths of a file system."""
    places = {"store": experiment.store}
    for task in experiment.tasks:
        if task.data:
            places[f"data of {task.name}"] = task.data
    local = {}
    for name, place in places.items():
        if "://" not in place or place.startswith("file://"):
            local[name] = place.removeprefix("file://")
    return local


def pack(experiment: Path, folder: Path, *, with_code: bool = True) -> None:
    """Write to `folder` what a job needs: the experiment file as experiment.yaml, and this raytvb's
    source, unless the job is to use the raytvb of the cluster.
    """
    shutil.copyfile(experiment, folder / EXPERIMENT)
    if not with_code:
        return
    package = Path(__file__).parents[1]
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(package, folder / package.name, ignore=ignored)
    _write_metadata(package.name, folder)


def _write_metadata(package: str, folder: Path) -> None:
    """Write the name and version of the source, so that records that are made on the cluster say
    which raytvb made them.
    """
    try:
        version = distribution(package).version
    except PackageNotFoundError:
        return
    metadata = folder / f"{package}-{version}.dist-info"
    metadata.mkdir()
    text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    (metadata / "METADATA").write_text(text)
