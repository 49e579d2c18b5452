"""Commands on an experiment file: `plan`, `run`, one command for each stage, and `submit`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raytvb.cli.options import (
    EXPERIMENT_FILE,
    STORE_OPTION,
    consent_options,
    local_cluster_options,
    read_experiment,
)
from raytvb.errors import PartialRunError

if TYPE_CHECKING:
    from raytvb.experiment.changes import Changes
    from raytvb.experiment.config import Experiment
    from raytvb.orchestration.pipeline import Pipeline
    from raytvb.orchestration.progress import Reporter
    from raytvb.storage.store import Store


@dataclass(frozen=True)
class Consent:
    """What a run may do beyond making what is missing."""

    yes: bool = False
    """Whether stored vectors may be replaced without a question."""
    renew_mask: bool = False
    """Whether the shared mask is made anew, and with it all vectors and bases."""


def start_pipeline(
    experiment: Experiment,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    stages: Sequence[str] | None = None,
    consent: Consent = Consent(),
) -> Pipeline:
    """Connect to Ray, or start one on this machine, and check that the experiment can run there.

    First says what the run will make, keep and make again, and asks before it replaces anything.
    stages: default: all.
    """
    from raytvb.experiment.places import check_usable
    from raytvb.orchestration.progress import Reporter
    from raytvb.storage.store import Store

    store, reporter = Store(experiment.store), Reporter()
    check_usable(store)  # before Ray, which takes seconds to start
    changes = _agreed_changes(experiment, stages, consent, reporter)
    address = os.environ.get("RAY_ADDRESS")
    where = f"joining Ray at {address}" if address else "starting Ray"
    reporter.say(
        f"experiment {experiment.name}: {len(experiment.tasks)} tasks, store {store.url}; {where}"
    )
    from raytvb.orchestration.connect import connect
    from raytvb.orchestration.pipeline import Pipeline

    retries = experiment.resources.max_retries
    connect(cpus=num_cpus, gpus=num_gpus, retries=retries, tell=reporter.say)
    return Pipeline(experiment, reporter, changes)


def _agreed_changes(
    experiment: Experiment,
    stages: Sequence[str] | None,
    consent: Consent,
    reporter: Reporter,
) -> Changes:
    """What the run will make, keep and make again, after it was said, and asked where needed."""
    from raytvb.cli.printing import confirm
    from raytvb.orchestration.pipeline import STAGES, planned_changes

    asked = STAGES if stages is None else stages
    changes = planned_changes(experiment, asked, renew_mask=consent.renew_mask)
    for line in changes.lines():
        reporter.say(line)
    question = changes.question()
    if question:
        confirm(f"{question}\nGo on?", yes=consent.yes)
    return changes


def run_everything(pipeline: Pipeline, verify: bool) -> None:
    """Run all stages, then print the results and where the report is.

    Raises PartialRunError after all this if tasks are missing.
    """
    from raytvb.cli.printing import print_results

    partial = None
    try:
        pipeline.run()
    except PartialRunError as error:
        partial = error
    checked = pipeline.verify() if verify else None
    if partial is not None and not partial.has_results:
        raise partial
    print_results(pipeline.store)
    if checked is not None:
        print(f"{checked} stored files verified.", end=" ")
    print_report_place(pipeline.store)
    if partial is not None:
        raise partial


def print_report_place(store: Store) -> None:
    """Print where the report of a store is."""
    from raytvb.experiment.layout import PAGE, REPORT

    print(f"Report: {store.where(f'{REPORT}/{PAGE}')}")


@click.command()
@EXPERIMENT_FILE
@STORE_OPTION
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print only what the data hold, as one JSON object.",
)
def plan(file: Path, store: str | None, as_json: bool) -> None:
    """Check an experiment and its data without running it.

    Prints all settings with their defaults, what the store has already, and an estimate of the
    bytes that a run will store. Then, for each task: how many images of which classes each split
    has, what is left out and why, and what looks wrong. Every image of a task without a vector is
    decoded for this, unless `data.leaks` is `ignore`. Changes nothing.

    \b
    raytvb plan experiment.yaml
    raytvb plan experiment.yaml --json
    """
    import json

    experiment = read_experiment(file, store)
    from raytvb.experiment.yaml_text import dump_yaml
    from raytvb.orchestration.plan import describe
    from raytvb.orchestration.plan_data import plan_data

    fields = experiment.model_dump(mode="json")
    described = describe(experiment)
    if not as_json:
        print(f"{dump_yaml(fields)}\n{described}", flush=True)
    found = plan_data(experiment)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False, indent=1))
    else:
        print("\n".join(found.lines()))
    found.raise_failed(experiment)


@click.command()
@EXPERIMENT_FILE
@STORE_OPTION
@click.option(
    "--verify",
    is_flag=True,
    help="At the end, read every stored file and compare it with its recorded checksum.",
)
@consent_options
@local_cluster_options
def run(
    file: Path,
    store: str | None,
    verify: bool,
    yes: bool,
    renew: str | None,
    num_cpus: int | None,
    num_gpus: int | None,
) -> None:
    """Run all stages of an experiment.

    The stages are finetune, basis, search, evaluate and report. After a stop, run the command
    again: what is in the store already is not made again. The list of tasks may change from run to
    run: only the new tasks are fine-tuned. If the settings or the data of a task have changed, the
    run says so, and asks before it replaces the task's vector.

    \b
    raytvb run experiment.yaml
    raytvb run experiment.yaml --store s3://bucket/prefix --verify
    raytvb run experiment.yaml --yes                 replaces vectors whose settings have changed
    raytvb run experiment.yaml --renew mask          makes the shared mask anew, and all vectors
    RAY_ADDRESS=auto raytvb run experiment.yaml      on the cluster that this machine belongs to
    """
    experiment = read_experiment(file, store)
    consent = Consent(yes, renew_mask=renew is not None)
    run_everything(start_pipeline(experiment, num_cpus, num_gpus, consent=consent), verify)


def _stage_command(stage: str, text: str) -> click.Command:
    @EXPERIMENT_FILE
    @STORE_OPTION
    @local_cluster_options
    def command(
        file: Path,
        store: str | None,
        num_cpus: int | None,
        num_gpus: int | None,
        yes: bool = False,
        renew: str | None = None,
    ) -> None:
        experiment = read_experiment(file, store)
        consent = Consent(yes, renew_mask=renew is not None)
        start_pipeline(experiment, num_cpus, num_gpus, [stage], consent).run([stage])

    if stage == "finetune":
        command = consent_options(command)

    command.__doc__ = f"{text}\n\n\b\nraytvb {stage} experiment.yaml\n"
    return click.command(name=stage)(command)


STAGE_COMMANDS: Sequence[click.Command] = (
    _stage_command("finetune", "One stage: make the missing masks and task vectors."),
    _stage_command("basis", "One stage: build the bases from the stored task vectors."),
    _stage_command(
        "search",
        "One stage: choose a basis and its coefficients.\n\nUses only the validation images.",
    ),
    _stage_command("evaluate", "One stage: measure the choice on the test images."),
)


@click.command()
@EXPERIMENT_FILE
@STORE_OPTION
def report(file: Path, store: str | None) -> None:
    """One stage: write the report, and print its table of results.

    Reads the stored results. Needs no Ray.

    \b
    raytvb report experiment.yaml
    """
    experiment = read_experiment(file, store)
    from raytvb.cli.printing import print_results
    from raytvb.experiment.missing import raise_missing
    from raytvb.experiment.present_experiments import check_model
    from raytvb.report.page import write_report
    from raytvb.storage.store import Store

    target = Store(experiment.store)
    check_model(target, experiment)
    write_report(target, experiment)
    print_results(target)
    print_report_place(target)
    raise_missing(target, experiment)


@click.command()
@EXPERIMENT_FILE
@click.option(
    "--address", required=True, help="URL of the dashboard of the Ray head, http://HOST:8265."
)
@click.option(
    "--no-wait",
    is_flag=True,
    help="Return once the job is submitted, instead of following its log.",
)
@click.option(
    "--no-code",
    is_flag=True,
    help="Use the raytvb of the cluster's image instead of uploading this one.",
)
@consent_options
def submit(
    file: Path, address: str, no_wait: bool, no_code: bool, yes: bool, renew: str | None
) -> None:
    """Run an experiment as a Ray job on a cluster, and show its log.

    Ctrl-C stops the log. The job goes on. A job cannot ask: a run that would replace vectors needs
    --yes.

    \b
    raytvb submit experiment.yaml --address http://127.0.0.1:8265
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token \\
        raytvb submit experiment.yaml --address http://HEAD:8265
    """
    read_experiment(file, None)  # reports a wrong file before Ray is imported
    from raytvb.orchestration.submit import submit as submit_job

    options = [*(["--yes"] if yes else []), *(["--renew", renew] if renew else [])]
    code = submit_job(file, address, follow=not no_wait, with_code=not no_code, options=options)
    if code:
        raise click.exceptions.Exit(code)
