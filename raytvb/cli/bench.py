"""`raytvb bench`: times our implementations beside plain versions of published algorithms.

`bench_chaos` has the benchmark of faults, and `bench_growth` that of a store that grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from raytvb.cli.bench_chaos import chaos
from raytvb.cli.bench_growth import growth
from raytvb.cli.options import AS_JSON_OPTION, BASIS_METHOD, SUITE_COUNT, Command

if TYPE_CHECKING:
    from raytvb.bench.measure import Precision, Result


def _number(name: str, default: int, text: str, least: int = 1) -> Callable[[Command], Command]:
    """An option that takes a whole number."""
    number = click.IntRange(least)
    return click.option(name, type=number, default=default, show_default=True, help=text)


THREADS_OPTION = _number("--threads", 1, "CPU threads that both sides may use.")


def _outside_stores(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The value of an option for a folder. Raises UserError for a folder in a store."""
    if value is None:
        return None
    from raytvb.experiment.places import output_folder

    return str(output_folder(value))


FOLDER_OPTION = click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False),
    callback=_outside_stores,
    help="Folder for the vector files, which are removed at the end. Default: the system's "
    "temporary folder.",
)
DENSITY = click.FloatRange(0, 1, min_open=True)
CURVE_TASKS = (8, 20, 50, 100, 200, 500, 1000, 2000)


@click.group()
def bench() -> None:
    """Time our implementations beside published algorithms, and show what a run survives.

    raytvb has a plain version of every published algorithm. Both sides get the same input in the
    same process. In the output, `ratio` is the time of the published algorithm divided by ours.
    `chaos` compares nothing with an algorithm: it kills processes of a real run. `growth` compares
    one more task with the whole run before it.

    \b
    raytvb bench fisher               sensitivity scores of all parameters
    raytvb bench finetune --json      the optimizer, and whole training steps
    raytvb bench basis --tasks 50     the fit of a basis to the Gram matrix
    raytvb bench gram                 the Gram matrix from vector files (7 GB of files)
    raytvb bench arrivals             the Gram matrix while 1,000 vectors arrive one by one
    raytvb bench search               the choice of basis size and coefficients (takes minutes)
    raytvb bench chaos                what a run survives: kills, and a store that fails (minutes)
    raytvb bench growth               what one more task costs in a finished store (minutes)
    """


def _model_options(command: Command) -> Command:
    """The options of benchmarks that run an image model."""
    for option in (
        AS_JSON_OPTION,
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16"]),
            default="fp32",
            show_default=True,
            help="Number format of the forward and backward passes.",
        ),
        THREADS_OPTION,
        click.option(
            "--model",
            default="ViT-B-32",
            show_default=True,
            help="Name of an open_clip architecture, which gets random weights, or glyphs-tiny, "
            "the embedded model.",
        ),
    ):
        command = option(command)
    return command


@bench.command()
@_number("--batch-size", 32, "Images in a batch.", least=2)
@_number("--batches", 4, "Number of batches that our implementation is timed on.")
@_number(
    "--scored",
    4,
    "Number of images that the published algorithm is timed on. It takes the same time for every "
    "image, and minutes for a whole batch.",
)
@_model_options
def fisher(
    model: str,
    threads: int,
    precision: Precision,
    as_json: bool,
    batch_size: int,
    batches: int,
    scored: int,
) -> None:
    """Sensitivity scores: seconds and memory for each image.

    The scores are the diagonal Fisher information of all parameters. We make one backward pass for
    a batch. The published code of TaLoS makes one backward pass for each image, through the graph
    of the whole batch.

    \b
    raytvb bench fisher
    raytvb bench fisher --model RN50 --batch-size 16 --json
    """
    from raytvb.bench.fisher import bench_fisher

    _quiet()
    result = bench_fisher(
        model,
        batch_size=batch_size,
        batches=batches,
        scored=scored,
        threads=threads,
        precision=precision,
    )
    _print(result, as_json)


@bench.command()
@_number(
    "--batch-size",
    8,
    "Images in a batch of the whole training steps. The optimizer alone needs no images.",
)
@click.option(
    "--density",
    type=DENSITY,
    default=0.1,
    show_default=True,
    help="Share of the parameters that is trained.",
)
@_number("--repeats", 7, "How often each step is timed; the medians are printed.")
@_model_options
def finetune(
    model: str,
    threads: int,
    precision: Precision,
    as_json: bool,
    batch_size: int,
    density: float,
    repeats: int,
) -> None:
    """Sparse training: the optimizer's step, and whole training steps.

    Our optimizer keeps moments only of the trained entries. It is compared with the masked AdamW of
    the published code of TaLoS, which keeps moments of all entries, and with torch's fused AdamW on
    all parameters.

    \b
    raytvb bench finetune
    raytvb bench finetune --model ViT-L-14 --batch-size 32 --precision bf16 --json
    """
    from raytvb.bench.finetune import bench_finetune

    _quiet()
    result = bench_finetune(
        model,
        batch_size=batch_size,
        density=density,
        repeats=repeats,
        threads=threads,
        precision=precision,
    )
    _print(result, as_json)


@bench.command()
@click.option(
    "--tasks",
    type=click.IntRange(2, 2000),
    default=20,
    show_default=True,
    help="Number of random task vectors T.",
)
@click.option(
    "--size", type=click.IntRange(1), help="Number of basis vectors M. Default: half of the tasks."
)
@click.option(
    "--kind",
    type=click.Choice(["clustered", "positive", "orthogonal"]),
    default="clustered",
    show_default=True,
    help="How the random task vectors lie. clustered: around T/5 centres. positive: around one "
    "common mean. orthogonal: independent noise.",
)
@click.option(
    "--scale",
    type=float,
    default=1.0,
    show_default=True,
    help="Factor on the Gram matrix. The quality of a good fit does not depend on it.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the random task vectors."
)
@click.option(
    "--method",
    type=BASIS_METHOD,
    default="ae",
    show_default=True,
    help="Basis method of our fit.",
)
@click.option(
    "--curve",
    is_flag=True,
    help="Also time our fits alone, for 8 to 2,000 tasks (takes minutes).",
)
@THREADS_OPTION
@AS_JSON_OPTION
def basis(as_json: bool, curve: bool, **options: Any) -> None:
    """The fit of M basis vectors to T task vectors.

    Measures seconds and the share of the task vectors that the basis loses. Both sides start from
    the same Gram matrix. The published fit makes 6,000 steps of Adam.

    \b
    raytvb bench basis --tasks 50 --size 25
    raytvb bench basis --tasks 200 --kind positive --scale 1e-8 --json
    """
    from raytvb.bench.basis import bench_basis

    _print(bench_basis(**options, curve=CURVE_TASKS if curve else ()), as_json)


@bench.command()
@_number("--tasks", 20, "Number of random task vectors T.")
@click.option(
    "--parameters",
    type=click.IntRange(8),
    default=87_849_216,
    show_default="as many as ViT-B/32 has",
    help="Number of values in each vector.",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Number format of the vector files.",
)
@_number(
    "--repeats",
    3,
    "How often our way is timed; the median is printed. The published way runs once.",
)
@click.option(
    "--curve",
    is_flag=True,
    help="Also time our way alone, for 8 to 2,000 vectors and for 2^16 to 2^24 parameters.",
)
@FOLDER_OPTION
@THREADS_OPTION
@AS_JSON_OPTION
def gram(as_json: bool, **options: Any) -> None:
    """The Gram matrix of vector files on a local disk.

    Measures seconds and memory, with the files in the disk's cache. We read blocks of all files.
    The published way loads all files first. The command writes tasks x parameters x 4 bytes of
    files (2 bytes for bf16), and the published way holds twice as much in memory.

    \b
    raytvb bench gram --folder /mnt/nvme
    raytvb bench gram --parameters 8000000 --dtype bf16 --json
    """
    from raytvb.bench.gram import bench_gram

    _print(bench_gram(**options), as_json)


@bench.command()
@_number("--tasks", 1000, "Number of random task vectors that arrive.", least=2)
@_number(
    "--values",
    47_700,
    "Number of stored values in each vector: its trained parameters.",
    least=8,
)
@click.option(
    "--cache",
    type=click.Choice(["memory", "disk"]),
    default="memory",
    show_default=True,
    help="Where the values of earlier vectors are kept. The same as `resources.cache` in an "
    "experiment.",
)
@FOLDER_OPTION
@THREADS_OPTION
@AS_JSON_OPTION
def arrivals(as_json: bool, **options: Any) -> None:
    """The Gram matrix while task vectors arrive one by one.

    Measures seconds and memory of each arrival. We add one row to the matrix for each arrival. The
    reference computes the whole matrix again.

    \b
    raytvb bench arrivals
    raytvb bench arrivals --tasks 300 --values 1000000 --cache disk --json
    """
    from raytvb.bench.arrivals import bench_arrivals

    _print(bench_arrivals(**options), as_json)


@bench.command()
@click.option(
    "--tasks",
    type=SUITE_COUNT,
    show_default="16",
    help="How many tasks of the embedded suite to use.",
)
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(1),
    multiple=True,
    show_default="T/8, T/4, 3T/8, T/2 and 3T/4",
    help="A number of basis vectors that the search may choose; repeatable.",
)
@click.option(
    "--method",
    type=BASIS_METHOD,
    default="ae",
    show_default=True,
    help="Basis method of all bases.",
)
@click.option(
    "--objective",
    type=click.Choice(["all", "subsets"]),
    default="all",
    show_default=True,
    help="What the search maximises on validation images. all: the accuracy after all tasks are "
    "added, as in the published code. subsets: the mean accuracy after 1, T/4, T/2 and T tasks are "
    "added.",
)
@click.option(
    "--density",
    type=DENSITY,
    show_default="0.1",
    help="Share of the parameters that the task vectors change; 1 for dense vectors.",
)
@click.option(
    "--store",
    help="Store of an experiment whose bases are searched. Default: first make task vectors and "
    "bases with a Ray on this machine, which is not timed.",
)
@THREADS_OPTION
@AS_JSON_OPTION
def search(as_json: bool, sizes: Sequence[int], **options: Any) -> None:
    """The choice of a basis size and its coefficients.

    Measures processor seconds, images and accuracy. Both sides choose on validation images and then
    read the test images once. The published search measures 21 coefficients for every size, and
    loads the model and the images again for each of them.

    \b
    raytvb bench search
    raytvb bench search --store raytvb-quickstart --size 2 --size 4 --objective subsets --json
    """
    from raytvb.bench.search import bench_search

    _quiet()
    _print(bench_search(sizes=sizes, **options), as_json)


def _quiet() -> None:
    from raytvb.models.open_clip_package import quiet_open_clip

    quiet_open_clip()


def _print(result: Result, as_json: bool) -> None:
    """Print a result as one JSON object, or as a table of all its fields."""
    from raytvb.cli.printing import print_result

    print_result(result.to_json(), as_json)


bench.add_command(chaos)
bench.add_command(growth)
