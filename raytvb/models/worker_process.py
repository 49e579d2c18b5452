"""Settings of a worker process, and the device that it computes on."""

from __future__ import annotations

import os

import torch

from raytvb.experiment.config import Experiment
from raytvb.models.open_clip_package import quiet_open_clip


def worker_setup() -> None:
    """Set up a worker process: torch computes with one thread, and open_clip is quiet.

    With one thread, results do not depend on the number of CPUs of a task.
    """
    quiet_open_clip()
    torch.set_num_threads(1)


def device() -> torch.device:
    """The GPU that Ray gave this worker, or the CPU.

    It is also the CPU if Ray counts GPUs that the machine does not have, as in tests.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return torch.device("cuda" if visible and torch.cuda.is_available() else "cpu")


def threads(experiment: Experiment) -> int:
    """Number of threads that decode images. It changes no result."""
    return max(1, int(experiment.resources.cpus_per_task))
