"""What a worker process sets once, and the device it works on."""

from __future__ import annotations

import os

import torch

from raytvb.experiment.config import Experiment
from raytvb.models.open_clip_package import quiet_open_clip


def worker_setup() -> None:
    """Once a worker process: one thread (results do not depend on what a task asks for), no
    model-loading chatter.
    """
    quiet_open_clip()
    torch.set_num_threads(1)


def device() -> torch.device:
    """The GPU that Ray gave this worker, or the CPU, also where the GPUs Ray counts are not
    there.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return torch.device("cuda" if given and torch.cuda.is_available() else "cpu")


def threads(experiment: Experiment) -> int:
    """Threads that decode images; how many changes no result."""
    return max(1, int(experiment.resources.cpus_per_task))
