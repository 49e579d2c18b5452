"""Commands on the embedded suite: `quickstart` runs the whole system on it, `tasks` lists it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from raytvb.cli.options import SUITE_COUNT, check_store_option, local_cluster_options

if TYPE_CHECKING:
    from raytvb.experiment.config import Experiment

UNSEEN = ("glyphs/greek-fog", "glyphs/dingbats-photo")
"""Tasks that are evaluated without a vector, unless `--tasks` is large enough to include them."""


def quickstart_experiment(count: int, store: str) -> Experiment:
    """The experiment of the quickstart: the first `count` tasks of the embedded suite."""
    from raytvb.experiment.config import half, quarter
    from raytvb.experiment.parsing import parse_experiment
    from raytvb.suite.task_names import task_names

    tasks = list(task_names()[:count])
    unseen = [name for name in UNSEEN if name not in tasks]
    fields = {
        "name": "quickstart",
        "store": store,
        "tasks": tasks,
        "finetune": {"epochs": 7.5, "batch_size": 64},
        "basis": {"method": ["ae", "ae-anchored", "svd"]},
        "search": {"sizes": sorted({quarter(count), half(count)})},
        "evaluate": {"unseen": unseen or None, "disentanglement": {"points": 5}},
    }
    return parse_experiment(fields, "quickstart")


@click.command()
@click.option(
    "--tasks",
    "count",
    type=SUITE_COUNT,
    default=8,
    show_default=True,
    help="How many tasks of the embedded suite to use.",
)
@click.option(
    "--store",
    default="raytvb-quickstart",
    show_default=True,
    help="Local folder or s3://bucket/prefix for everything that the run makes.",
)
@local_cluster_options
def quickstart(count: int, store: str, num_cpus: int | None, num_gpus: int | None) -> None:
    """Run the whole system on the embedded suite of images.

    Needs no network, no GPU and no data. At the end, it compares every stored file with its
    checksum.

    \b
    raytvb quickstart                       8 tasks, results in ./raytvb-quickstart
    raytvb quickstart --tasks 16 --store s3://bucket/quickstart
    """
    check_store_option(store)
    experiment = quickstart_experiment(count, store)
    from raytvb.cli.run import run_everything, start_pipeline

    run_everything(start_pipeline(experiment, num_cpus, num_gpus), verify=True)


@click.command(name="tasks")
def list_tasks() -> None:
    """List the tasks of the embedded suite.

    An experiment may use these tasks by name, without `data:`.

    \b
    raytvb tasks
    """
    from raytvb.suite.task_names import class_names, task_names

    for name in task_names():
        print(f"{name}  ({len(class_names(name))} classes)")
