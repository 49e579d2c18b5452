"""The command line. `raytvb = raytvb.cli.main:main` is its entry point.

Each file holds one group of commands: `run` (an experiment and its stages), `quickstart` (the
embedded suite), `merge`, `store_commands` (a look into a store), `cleaning` (what a store no longer
needs), `methods` and `bench`. `options` has the options that several commands share, and `printing`
has the tables that they print. A command imports what it needs when it is called, because torch
alone takes seconds to import. So `--help`, or the error for a mistake in an experiment file,
appears at once.

An error prints one message on standard error, and the exit code is 1 (2 for wrong options, 3 if
some tasks failed and everything else is done).
`--debug` shows the traceback. After Ctrl-C and SIGTERM the exit code is 130 (see `signals`).
"""

from __future__ import annotations

import os
import sys

import click

from raytvb.cli.bench import bench
from raytvb.cli.cleaning import gc, rm
from raytvb.cli.merge import merge
from raytvb.cli.methods import list_methods
from raytvb.cli.options import refuse_blanks
from raytvb.cli.quickstart import list_tasks, quickstart
from raytvb.cli.run import STAGE_COMMANDS, plan, report, run, submit
from raytvb.cli.signals import INTERRUPTED, STOPPED, handle_signals
from raytvb.cli.store_commands import list_store, spectrum, verify
from raytvb.errors import PartialRunError, UserError

PARTIAL = 3
"""Exit code if tasks failed, and everything else is done."""


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

    \b
    raytvb quickstart             run the whole system on real images, on this machine, in minutes
    raytvb plan experiment.yaml   show what a run would do, and what is done already
    raytvb run experiment.yaml    run all stages; after a stop, run it again to go on
    raytvb submit experiment.yaml --address http://127.0.0.1:8265
    raytvb merge STORE --add glyphs/greek-blur --negate glyphs/latin-fog --out merged/
    raytvb gc STORE               remove what no experiment of a store uses any more
    """


for _command in (
    quickstart,
    plan,
    run,
    *STAGE_COMMANDS,
    report,
    merge,
    spectrum,
    list_store,
    verify,
    rm,
    gc,
    submit,
    bench,
    list_tasks,
    list_methods,
):
    cli.add_command(_command)
refuse_blanks(cli)


def main(args: list[str] | None = None) -> int:
    """Run a command. Returns the exit code, which is 0 only if the command did all of its work.

    args: None, if this process runs nothing but the command. Then signals end it in an orderly way.
    """
    arguments = sys.argv[1:] if args is None else args
    try:
        if args is None:
            handle_signals()
        # Commands return None. Where one raises click's Exit (--help does, and `submit` for a job
        # that failed), click returns the exit code.
        return int(cli.main(arguments, prog_name="raytvb", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        if args is None:
            _shut_ray_down()
        print(STOPPED, file=sys.stderr)
        return INTERRUPTED
    except PartialRunError as error:
        print(f"incomplete: {error}", file=sys.stderr)
        return PARTIAL
    except Exception as error:
        if "--debug" in arguments or os.environ.get("RAYTVB_DEBUG"):
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        return 1


def _shut_ray_down() -> None:
    """Leave Ray, or end the Ray that this process started, if there is one."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


def _message(error: Exception) -> str:
    """The text of an error for users. For an unforeseen error: its type, and how to see more."""
    if isinstance(error, OSError) and error.errno is not None:
        from raytvb.storage.store_errors import os_message

        return os_message(error)
    if isinstance(error, UserError | ValueError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error} (raytvb --debug … shows where)"


if __name__ == "__main__":
    sys.exit(main())
