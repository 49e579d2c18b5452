"""The command line. Errors are one message on standard error and exit code 1 or 2; `--debug` shows
the traceback.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from rich.table import Table

from raytvb.cli.options import (
    AS_JSON_OPTION,
    EXPERIMENT_FILE,
    FOLDER_OPTION,
    THREADS_OPTION,
    local_cluster_options,
    read_experiment,
    store_option,
)
from raytvb.cli.tables import print_summary, wide_console
from raytvb.errors import UserError
from raytvb.experiment.base import TINY_MODEL
from raytvb.experiment.config import Experiment, half, quarter
from raytvb.experiment.parsing import load_experiment, parse_experiment
from raytvb.experiment.searching import MERGES
from raytvb.maths.basis_methods import METHODS
from raytvb.storage.store import Store
from raytvb.suite import glyphs


class _Group(click.Group):
    """Lists the commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="raytvb")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Turn hundreds of fine-tunes of one model into a small, searchable, mergeable task vector
    basis, on Ray.

    \b raytvb quickstart                          the whole system on real images, on this machine,
    in minutes raytvb plan experiment.yaml                what would be done, what it needs and
    takes raytvb run experiment.yaml                 all of it; run it again to go on after a stop
    raytvb submit experiment.yaml --address http://127.0.0.1:8265 raytvb merge STORE --add
    glyphs/greek-blur --negate glyphs/latin-fog --out merged/
    """


def _run(
    experiment: Experiment, stages: Sequence[str], num_cpus: int | None, num_gpus: int | None
) -> None:
    from raytvb.orchestration.connect import connect
    from raytvb.orchestration.pipeline import run
    from raytvb.orchestration.progress import Reporter

    # A store that cannot be used is found out before Ray takes its seconds to start.
    Store(experiment.store).check_writable()
    reporter = Reporter()
    address = os.environ.get("RAY_ADDRESS")
    reporter.say(
        f"experiment {experiment.name}: {len(experiment.tasks)} tasks, store {Store(experiment.store).url}; "
        f"{f'joining Ray at {address}' if address else 'starting Ray'}"
    )
    connect(cpus=num_cpus, gpus=num_gpus)
    run(experiment, stages, reporter=reporter)


def _finish(experiment: Experiment) -> None:
    """Check every stored file, then print the results and where the report is."""
    from raytvb.experiment.layout import REPORT, SUMMARY
    from raytvb.storage.verify import verify

    store = Store(experiment.store)
    checked, problems = verify(store)
    if problems:
        raise UserError("stored files are damaged:\n  " + "\n  ".join(problems))
    print_summary(store.read_json(SUMMARY))
    print(f"{checked} stored files verified. Report: {store.where(REPORT)}")


@cli.command()
@click.option(
    "--tasks",
    "count",
    type=click.IntRange(2, len(glyphs.task_names())),
    default=8,
    show_default=True,
    help="How many tasks of the embedded suite.",
)
@click.option(
    "--store",
    default="raytvb-quickstart",
    show_default=True,
    help="Local folder or s3://bucket/prefix for everything that is made.",
)
@local_cluster_options
def quickstart(count: int, store: str, num_cpus: int | None, num_gpus: int | None) -> None:
    """Run the whole system on the embedded suite: needs no network, no GPU and no data.

    \b
    raytvb quickstart                       8 tasks, results in ./raytvb-quickstart
    raytvb quickstart --tasks 16 --store s3://bucket/quickstart
    """
    sizes, names = sorted({quarter(count), half(count)}), list(glyphs.task_names()[:count])
    experiment = parse_experiment(
        {
            "name": "quickstart",
            "store": store,
            "tasks": names,
            "finetune": {"epochs": 7.5, "batch_size": 64},
            "basis": {"method": ["ae", "ae-anchored", "svd"]},
            "search": {"sizes": sizes},
            "evaluate": {
                "unseen": [
                    n for n in ("glyphs/greek-fog", "glyphs/dingbats-photo") if n not in names
                ]
                or None,
                "disentanglement": {"points": 5},
            },
        },
        "quickstart",
    )
    from raytvb.orchestration.pipeline import STAGES

    _run(experiment, STAGES, num_cpus, num_gpus)
    _finish(experiment)


@cli.command()
@EXPERIMENT_FILE
@store_option
def plan(file: Path, store: str | None) -> None:
    """Check an experiment without running it: resolved settings, what is done already, storage
    estimate.

    \b
    raytvb plan experiment.yaml
    """
    from raytvb.orchestration.plan import describe

    experiment = read_experiment(file, store)
    print(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    print(describe(experiment))


@cli.command()
@EXPERIMENT_FILE
@store_option
@local_cluster_options
def run(file: Path, store: str | None, num_cpus: int | None, num_gpus: int | None) -> None:
    """Run all stages of an experiment: fine-tune, basis, search, evaluate, report. Resumes by
    itself.

    \b
    raytvb run experiment.yaml
    raytvb run experiment.yaml --store s3://bucket/prefix
    RAY_ADDRESS=auto raytvb run experiment.yaml      on the cluster this machine belongs to
    """
    from raytvb.orchestration.pipeline import STAGES

    experiment = read_experiment(file, store)
    _run(experiment, STAGES, num_cpus, num_gpus)
    _finish(experiment)


def _stage_command(stage: str, text: str) -> None:
    @EXPERIMENT_FILE
    @store_option
    @local_cluster_options
    def command(file: Path, store: str | None, num_cpus: int | None, num_gpus: int | None) -> None:
        _run(read_experiment(file, store), [stage], num_cpus, num_gpus)

    command.__doc__ = f"{text}\n\n\b\nraytvb {stage} experiment.yaml\n"
    cli.command(name=stage)(command)


_stage_command("finetune", "Only make the masks and the task vectors that are missing.")


_stage_command("basis", "Only build the bases, from vectors that are there.")


_stage_command("search", "Only search coefficients for every basis on validation data.")


_stage_command("evaluate", "Only evaluate on the test split what the search has chosen.")


@cli.command()
@EXPERIMENT_FILE
@store_option
def report(file: Path, store: str | None) -> None:
    """Only write the report from the results in the store, and print the table.

    \b
    raytvb report experiment.yaml
    """
    from raytvb.experiment.freezing import freeze
    from raytvb.experiment.layout import REPORT, SUMMARY
    from raytvb.report.page import write_report

    experiment = read_experiment(file, store)
    target = Store(experiment.store)
    freeze(target, experiment)
    write_report(target, experiment)
    print_summary(target.read_json(SUMMARY))
    print(f"Report: {target.where(REPORT)}")


def _weights(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, float]]:
    parsed = []
    for value in values:
        name, _, weight = value.partition("=")
        try:
            number = float(weight) if weight else 1.0
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise click.BadParameter(f"{value!r}: use NAME or NAME=WEIGHT, with a finite number")
        parsed.append((name, number))
    return parsed


@cli.command()
@click.argument("store")
@click.option(
    "--add",
    multiple=True,
    metavar="TASK[=WEIGHT]",
    callback=_weights,
    help="Add a task; repeatable.",
)
@click.option(
    "--negate",
    multiple=True,
    metavar="TASK[=WEIGHT]",
    callback=_weights,
    help="Subtract one; repeatable.",
)
@click.option("--analogy", nargs=3, metavar="A B C", help="Add A - B + C.")
@click.option(
    "--basis",
    help="Basis to decode from, as in `raytvb ls` (ae-m4), or `full`. Default: the chosen one.",
)
@click.option(
    "--merge",
    "kind",
    type=click.Choice(["decoded", "sum"]),
    default="decoded",
    show_default=True,
    help="sum: the plain sum of a convex basis's vectors, which adds all tasks.",
)
@click.option(
    "--method",
    type=click.Choice(["sum", *MERGES]),
    default="sum",
    show_default=True,
    help="How the tasks' vectors become one, with the papers' settings.",
)
@click.option(
    "--vector",
    "vectors",
    multiple=True,
    metavar="NUMBER[=WEIGHT]",
    callback=_weights,
    help="Add a vector of the basis itself, from 1 on, instead of tasks; repeatable.",
)
@click.option(
    "--coefficient",
    type=float,
    help="Scale of the whole merge. Default: what validation data chose for "
    "adding that many tasks (1 with --vector); the report shows what it chose for forgetting each.",
)
@click.option(
    "--lengths",
    type=click.Choice(["projected", "own"]),
    help="Of the vectors that a basis decodes: as "
    "projected, or those of the task vectors. Default: what validation data chose with the coefficient; "
    "projected with --coefficient.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder to write.",
)
def merge(
    store: str,
    add: list[tuple[str, float]],
    negate: list[tuple[str, float]],
    analogy: tuple[str, str, str] | None,
    basis: str | None,
    kind: Any,
    method: str,
    vectors: list[tuple[str, float]],
    coefficient: float | None,
    lengths: Any,
    out: Path,
) -> None:
    """Write any mix of tasks as an ordinary open_clip folder (load it as `local-dir:OUT`).

    \b raytvb merge raytvb-quickstart --add glyphs/greek-blur --add glyphs/latin-fog --out merged/
    raytvb merge s3://bucket/prefix --negate glyphs/greek-blur --basis full --coefficient 0.5 --out
    forgot/ raytvb merge raytvb-quickstart --analogy glyphs/greek-blur glyphs/latin-blur
    glyphs/latin-fog --out analogy/ raytvb merge raytvb-quickstart --merge sum --basis ae-m4 --out
    all/ raytvb merge raytvb-quickstart --add glyphs/greek-blur --add glyphs/latin-fog --method ties
    --basis full --out ties/ raytvb merge raytvb-quickstart --basis svd-m4 --vector 1=0.8 --vector
    3=-0.2 --out mixed/
    """
    from raytvb.maths import mixes
    from raytvb.merging.merge import merge as merge_tasks
    from raytvb.models.open_clip_package import quiet_open_clip

    tasks = mixes.total(
        *({n: w} for n, w in add),
        *({n: -w} for n, w in negate),
        *([mixes.analogy(*analogy)] if analogy else []),
    )
    given = sum((bool(tasks), bool(vectors), kind == "sum"))
    if given > 1:
        raise UserError(
            "tasks (--add, --negate, --analogy), `--merge sum` and --vector cannot be combined: use one"
        )
    if not given:
        raise UserError(
            "name tasks with --add, --negate or --analogy (`raytvb ls STORE` lists them); or, without "
            "those, add all with `--merge sum`, or vectors of the basis with --vector"
        )
    if tasks and not any(tasks.values()):
        raise UserError("the weights of the tasks cancel out: nothing would be merged")
    if method != "sum" and not tasks:
        raise UserError(
            f"--method {method} merges tasks: name them with --add, --negate or --analogy"
        )
    numbers = dict[int, float]()
    for number, weight in vectors:
        if not number.isdecimal():
            raise UserError(f"--vector {number}: use a number from 1 on")
        numbers[int(number)] = numbers.get(int(number), 0.0) + weight
    if coefficient is not None and not math.isfinite(coefficient):
        raise UserError(f"--coefficient {coefficient}: use a finite number")
    quiet_open_clip()
    done = merge_tasks(
        Store(store),
        tasks,
        out,
        basis=basis,
        coefficient=coefficient,
        kind="vectors" if numbers else kind,
        vectors=numbers,
        method=method,
        lengths=lengths,
    )
    parts = tasks or {f"vector {n}": w for n, w in numbers.items()}
    what = " ".join(
        f"{'-' if w < 0 else '+'}{'' if abs(w) == 1 else f' {abs(w):g}'} {n}"
        for n, w in parts.items()
    )
    what = what.removeprefix("+ ") or "all tasks"
    what += f" by {method}" if method != "sum" else ""
    if basis is None and not done["chosen"]:
        print("no basis has been chosen yet (`raytvb run` does): merged from the full vectors")
    lengths = ", vectors at their tasks' own lengths" if done["own_lengths"] else ""
    print(
        f"{what} from {done['source']}, coefficient {done['coefficient']:.4g}{lengths}, written to {out}"
    )
    print(f"open_clip.create_model('local-dir:{out}')")


@cli.command()
@click.argument("store")
@click.option("--method", type=click.Choice(sorted(METHODS)), default="ae", show_default=True)
@click.option(
    "--size", type=click.IntRange(1), help="Basis size M: shows the error of each task at it."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def spectrum(store: str, method: str, size: int | None, as_json: bool) -> None:
    """What bases of any size would lose, from the task vectors that are there: also while they are
    still being made.

    \b raytvb spectrum raytvb-quickstart                         eigenvalues, and the least error at
    every M raytvb spectrum s3://bucket/prefix --size 16 --method svd --json
    """
    from raytvb.bases.spectrum import describe_tasks, spectrum_of

    found = spectrum_of(Store(store), method, size)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table("M", "eigenvalue, % of the sum", "least error of M vectors", box=None)
    for m, (share, floor) in enumerate(zip(found["share"], found["floor"], strict=True), 1):
        table.add_row(str(m), f"{100 * share:.2f}", f"{floor:.4f}")
    wide_console(80).print(table)
    print(describe_tasks(found))


@cli.command(name="ls")
@click.argument("store")
def list_store(store: str) -> None:
    """List the vectors and bases of a store.

    \b
    raytvb ls raytvb-quickstart
    """
    from raytvb.experiment.layout import OVERLAP
    from raytvb.report.formatting import format_bytes
    from raytvb.storage import records

    target = Store(store)
    keys = target.keys()
    table = Table("what", "size", "details", box=None)
    listed = ("base", "masks", OVERLAP, "vectors", "basis")
    for key in keys:
        if key.endswith(f"/{records.RECORD}") and key.split("/")[0] in listed:
            record = target.read_json(key)
            metrics = {k: v for k, v in record["metrics"].items() if isinstance(v, int | float)}
            details = ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()
            )
            size = sum(f["size"] for f in record["files"].values())
            table.add_row(key.removesuffix(f"/{records.RECORD}"), format_bytes(size), details)
    if not table.row_count:
        raise UserError(f"{target.url} holds no experiment yet")
    wide_console(160).print(table, markup=False)


@cli.command()
@click.argument("store")
def verify(store: str) -> None:
    """Check every file of a store against its recorded checksum.

    \b
    raytvb verify raytvb-quickstart
    """
    from raytvb.storage.verify import verify

    target = Store(store)
    checked, problems = verify(target)
    if problems:
        raise UserError(
            f"{len(problems)} of {checked} files are damaged or missing:\n  "
            + "\n  ".join(problems)
        )
    if not checked:
        raise UserError(f"{target.url} holds no records")
    print(f"{checked} files match their records")


@cli.command()
@EXPERIMENT_FILE
@click.option("--address", required=True, help="Dashboard of the Ray head, http://HOST:8265.")
@click.option(
    "--no-wait", is_flag=True, help="Return when the job is submitted instead of following it."
)
@click.option(
    "--no-code",
    is_flag=True,
    help="Use the raytvb of the cluster's image instead of uploading this one.",
)
def submit(file: Path, address: str, no_wait: bool, no_code: bool) -> None:
    """Run an experiment as a Ray job on a cluster.

    \b raytvb submit experiment.yaml --address http://127.0.0.1:8265 RAY_AUTH_MODE=token
    RAY_AUTH_TOKEN_PATH=~/.ray/auth_token raytvb submit experiment.yaml --address http://HEAD:8265
    """
    from raytvb.orchestration.submit import submit as submit_job

    load_experiment(file)
    code = submit_job(file, address, follow=not no_wait, with_code=not no_code)
    if code:
        raise click.exceptions.Exit(code)


@cli.group()
def bench() -> None:
    """Time our kernels beside plainly written references of the published algorithms, in one
    process.

    \b raytvb bench fisher                        sensitivity scores: seconds an image, memory
    raytvb bench finetune --json               optimizer and whole training steps raytvb bench basis
    --tasks 50              the fit on the Gram matrix raytvb bench gram
    the Gram matrix from files (7 GB of them) raytvb bench arrivals                      what one
    more vector costs when 1,000 are there raytvb bench search                        basis sizes
    and coefficients, from loading to the test (minutes)
    """


def _bench_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option(
            "--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True
        ),
        click.option(
            "--threads",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Threads on the CPU.",
        ),
        click.option(
            "--model",
            default="ViT-B-32",
            show_default=True,
            help=f"Name of an open_clip architecture, with random weights, or {TINY_MODEL}.",
        ),
    ):
        command = option(command)
    return command


@bench.command(name="fisher")
@click.option("--batch-size", type=click.IntRange(2), default=32, show_default=True)
@click.option(
    "--batches", type=click.IntRange(1), default=4, show_default=True, help="That ours is timed on."
)
@click.option(
    "--scored",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Images on which the loops are timed; each image takes the same time.",
)
@_bench_options
def bench_fisher(
    model: str,
    threads: int,
    precision: Any,
    as_json: bool,
    batch_size: int,
    batches: int,
    scored: int,
) -> None:
    """Sensitivity scores against the authors' loop, which goes through the batch's graph for each
    image.

    \b
    raytvb bench fisher
    raytvb bench fisher --model RN50 --batch-size 16 --json
    """
    from raytvb.bench.fisher import bench_fisher

    _print_bench(
        lambda: bench_fisher(
            model,
            batch_size=batch_size,
            batches=batches,
            scored=scored,
            threads=threads,
            precision=precision,
        ),
        as_json,
    )


@bench.command(name="finetune")
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Of the whole steps."
)
@click.option(
    "--density", type=click.FloatRange(0, 1, min_open=True), default=0.1, show_default=True
)
@click.option(
    "--repeats", type=click.IntRange(1), default=7, show_default=True, help="For medians."
)
@_bench_options
def bench_finetune(
    model: str,
    threads: int,
    precision: Any,
    as_json: bool,
    batch_size: int,
    density: float,
    repeats: int,
) -> None:
    """Sparse training against the authors' masked AdamW and torch's fused one on all parameters.

    \b
    raytvb bench finetune
    raytvb bench finetune --model ViT-L-14 --batch-size 32 --precision bf16 --json
    """
    from raytvb.bench.finetune import bench_finetune

    _print_bench(
        lambda: bench_finetune(
            model,
            batch_size=batch_size,
            density=density,
            repeats=repeats,
            threads=threads,
            precision=precision,
        ),
        as_json,
    )


@bench.command(name="basis")
@click.option("--tasks", type=click.IntRange(2, 2000), default=20, show_default=True)
@click.option("--size", type=click.IntRange(1), help="Default: half of the tasks.")
@click.option(
    "--kind",
    type=click.Choice(["clustered", "positive", "orthogonal"]),
    default="clustered",
    show_default=True,
    help="Of the vectors: clusters, a common mean, or noise alone.",
)
@click.option(
    "--scale",
    type=float,
    default=1.0,
    show_default=True,
    help="The Gram matrix is multiplied by it.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--method", type=click.Choice(sorted(METHODS)), default="ae", show_default=True)
@click.option("--curve", is_flag=True, help="Also ours alone for 8 to 2,000 tasks (minutes).")
@THREADS_OPTION
@AS_JSON_OPTION
def bench_basis(as_json: bool, curve: bool, **options: Any) -> None:
    """The fit of a basis against the authors' 6,000 steps of Adam, on the same Gram matrix.

    \b
    raytvb bench basis --tasks 50 --size 25
    raytvb bench basis --tasks 200 --kind positive --scale 1e-8 --json
    """
    from raytvb.bench.basis import bench_basis

    points = (8, 20, 50, 100, 200, 500, 1000, 2000) if curve else ()
    _print_bench(lambda: bench_basis(**options, curve=points), as_json)


@bench.command(name="gram")
@click.option("--tasks", type=click.IntRange(1), default=20, show_default=True)
@click.option(
    "--parameters", type=click.IntRange(8), default=87_849_216, show_default="those of ViT-B/32"
)
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option(
    "--repeats", type=click.IntRange(1), default=3, show_default=True, help="For medians of ours."
)
@click.option(
    "--curve",
    is_flag=True,
    help="Also ours alone for 8 to 2,000 vectors, and 2^16 to 2^24 parameters.",
)
@FOLDER_OPTION
@THREADS_OPTION
@AS_JSON_OPTION
def bench_gram(as_json: bool, **options: Any) -> None:
    """The Gram matrix from vector files on a warm local disk, against loading them all.

    Writes tasks x parameters x 4 bytes of files, and the reference holds as much in memory.

    \b
    raytvb bench gram --folder /mnt/nvme
    raytvb bench gram --parameters 8000000 --dtype bf16 --json
    """
    from raytvb.bench.gram import bench_gram

    _print_bench(lambda: bench_gram(**options), as_json)


@bench.command(name="arrivals")
@click.option("--tasks", type=click.IntRange(2), default=1000, show_default=True)
@click.option(
    "--values",
    type=click.IntRange(8),
    default=47_700,
    show_default=True,
    help="Kept entries of a vector.",
)
@click.option("--cache", type=click.Choice(["memory", "disk"]), default="memory", show_default=True)
@FOLDER_OPTION
@THREADS_OPTION
@AS_JSON_OPTION
def bench_arrivals(as_json: bool, **options: Any) -> None:
    """The incremental Gram matrix: seconds and memory of each arrival, against making it anew.

    \b
    raytvb bench arrivals
    raytvb bench arrivals --tasks 300 --values 1000000 --cache disk --json
    """
    from raytvb.bench.arrivals import bench_arrivals

    _print_bench(lambda: bench_arrivals(**options), as_json)


@bench.command(name="search")
@click.option(
    "--tasks",
    type=click.IntRange(2, len(glyphs.task_names())),
    show_default="16",
    help="How many tasks of the embedded suite.",
)
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(1),
    multiple=True,
    show_default="T/8, T/4, 3T/8, T/2 and 3T/4",
    help="A basis size to search; repeatable.",
)
@click.option("--method", type=click.Choice(sorted(METHODS)), default="ae", show_default=True)
@click.option(
    "--objective",
    type=click.Choice(["all", "subsets"]),
    default="all",
    show_default=True,
    help="Accuracy of all tasks added (the authors'), or the mean over additions of 1, T/4, T/2 and T.",
)
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    show_default="0.1",
    help="Of the task vectors; 1: dense.",
)
@click.option(
    "--store", help="Store of an experiment whose bases are searched, instead of making some."
)
@THREADS_OPTION
@AS_JSON_OPTION
def bench_search(as_json: bool, **options: Any) -> None:
    """The search for a basis size and coefficients against the authors' grid, which loads
    everything for each point.

    Both choose on validation images and then read the test images. Task vectors and bases are made
    first, on a local Ray; that is not timed.

    \b
    raytvb bench search
    raytvb bench search --store raytvb-quickstart --size 2 --size 4 --objective subsets --json
    """
    from raytvb.bench.search import bench_search

    _print_bench(lambda: bench_search(**options), as_json)


def _print_bench(work: Callable[[], dict[str, Any]], as_json: bool) -> None:
    from raytvb.models.open_clip_package import quiet_open_clip

    quiet_open_clip()
    found = work()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table(box=None, show_header=False)

    def rows(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                rows(f"{prefix}{name}.", value)
            elif isinstance(value, list):
                rows(f"{prefix}{name}.", {str(i): v for i, v in enumerate(value)})
            else:
                form = "," if isinstance(value, int) else ".4g" if isinstance(value, float) else ""
                table.add_row(
                    f"{prefix}{name}", "not measured" if value is None else format(value, form)
                )

    rows("", found)
    wide_console(110).print(table, markup=False)


@cli.command(name="tasks")
def list_tasks() -> None:
    """List the tasks of the embedded suite."""
    for name in glyphs.task_names():
        print(f"{name}  ({len(glyphs.class_names(name))} classes)")


def main(args: list[str] | None = None) -> int:
    """Run a command; the exit code, 0 only if all that was asked for is there."""
    arguments = sys.argv[1:] if args is None else args
    try:
        # Commands return nothing; click gives the code of an Exit (of --help, or a job's) as the
        # result.
        return int(cli.main(arguments, prog_name="raytvb", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in arguments or os.environ.get("RAYTVB_DEBUG"):
            raise
        known = isinstance(error, UserError | ValueError | OSError)
        prefix = "" if known else f"{type(error).__name__}: "
        print(
            f"error: {prefix}{error}" + ("" if known else " (raytvb --debug … shows where)"),
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
