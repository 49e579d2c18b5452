"""`raytvb bench growth`: what one more task costs."""

from __future__ import annotations

import click

from raytvb.cli.options import AS_JSON_OPTION
from raytvb.suite.task_names import task_names


@click.command()
@click.option(
    "--tasks",
    type=click.IntRange(2, len(task_names()) - 1),
    default=200,
    show_default=True,
    help="Number of tasks of the embedded suite before the addition.",
)
@AS_JSON_OPTION
def growth(tasks: int, as_json: bool) -> None:
    """One more task in a finished store.

    Measures the seconds of a run of the embedded suite with small settings, up to offline and
    online bases. Then one task is added to the experiment, and it runs again. `rest` has the
    seconds of that second run without the training of the new task and the start of Ray. `share` is
    `rest` divided by the seconds of the first run without the start of Ray.

    Also checks that the earlier vectors keep their bits, and that all bases have the same bits as
    those that are made of all vectors in an empty store. The exit code is 1 if they do not.

    \b
    raytvb bench growth --json
    raytvb bench growth --tasks 20
    """
    from raytvb.bench.growth import bench_growth
    from raytvb.cli.printing import print_result

    result = bench_growth(tasks)
    print_result(result.to_json(), as_json)
    if not result.is_sound:
        raise click.exceptions.Exit(1)
