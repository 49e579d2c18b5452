"""The packages that a command imports: `--help`, a mistake or a look into a store must not wait for
torch or Ray.

Every command runs in a fresh interpreter, and the packages in `sys.modules` are counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raytvb.storage import records
from raytvb.storage.store import Store

COUNT = """
import json, sys
at_start = set(sys.modules)  # with what the environment itself imports
from raytvb.cli.main import main
status = main(sys.argv[1:])
modules = set(sys.modules) - at_start
packages = {name.partition('.')[0] for name in modules} - sys.stdlib_module_names
own = {name for name in modules if name.startswith('raytvb.')}
print(json.dumps([status, sorted(packages), sorted(own)]))
"""

OPTIONS = {"click", "colorama", "raytvb"}
CHECKED = OPTIONS | {
    "annotated_types",
    "cython_runtime",
    "pydantic",
    "pydantic_core",
    "typing_extensions",
    "typing_inspection",
    "yaml",
}
HEAVY = {
    "PIL",
    "aiohttp",
    "matplotlib",
    "numpy",
    "open_clip",
    "optuna",
    "pandas",
    "pyarrow",
    "ray",
    "s3fs",
    "scipy",
    "sklearn",
    "torch",
    "torchvision",
}
COMMANDS = (
    "quickstart",
    "plan",
    "run",
    "finetune",
    "basis",
    "search",
    "evaluate",
    "report",
    "merge",
    "spectrum",
    "ls",
    "verify",
    "rm",
    "gc",
    "submit",
    "bench",
    "tasks",
    "methods",
)
BENCHMARKS = ("fisher", "finetune", "basis", "gram", "arrivals", "search", "chaos", "growth")


def packages_after(*arguments: str, status: int = 0) -> tuple[set[str], set[str]]:
    """Packages, and raytvb's own modules, that a command has imported; private names are parts of
    others.
    """
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    code, packages, own = json.loads(done.stdout.splitlines()[-1])
    assert code == status, done.stderr
    public = {name for name in packages if not name.startswith("_")}
    return public, set(own)


def write_file(folder: Path, **fields: object) -> Path:
    file = folder / "experiment.yaml"
    tasks = ["glyphs/greek-blur", "glyphs/latin-fog"]
    file.write_text(yaml.safe_dump({"store": str(folder / "store"), "tasks": tasks, **fields}))
    return file


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("--help",),
        ("tasks",),
        *((command, "--help") for command in COMMANDS),
        *(("bench", benchmark, "--help") for benchmark in BENCHMARKS),
    ],
    ids=" ".join,
)
def test_a_question_is_answered_by_the_options_alone(arguments: tuple[str, ...]) -> None:
    packages, own = packages_after(*arguments)
    assert packages <= OPTIONS
    rooms = {name.split(".")[1] for name in own}
    assert rooms <= {"cli", "errors", "maths", "plugins", "suite"}


def test_every_command_is_asked() -> None:
    from raytvb.cli.bench import bench
    from raytvb.cli.main import cli

    assert tuple(cli.commands) == COMMANDS and tuple(bench.commands) == BENCHMARKS


@pytest.mark.parametrize("command", ["run", "plan", "finetune", "report"])
def test_a_mistake_in_an_experiment_is_told_before_anything_else_is_imported(
    command: str, tmp_path: Path
) -> None:
    file = write_file(tmp_path, tasks=["glyphs/greek-blur", "glyphs/latin-fgo"])
    packages, _ = packages_after(command, str(file), status=1)
    assert packages <= CHECKED
    assert not (tmp_path / "store").exists()


def test_submit_tells_a_mistake_as_early(tmp_path: Path) -> None:
    file = write_file(tmp_path, finetune={"epochs": -1})
    packages, _ = packages_after("submit", str(file), "--address", "http://x", status=1)
    assert packages <= CHECKED


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_looking_into_a_local_store_needs_no_maths_and_no_ray(command: str, tmp_path: Path) -> None:
    files = {"vector.safetensors": b"data"}
    records.commit(Store(str(tmp_path)), "masks/a", identity={"a": 1}, files=files)
    packages, own = packages_after(command, str(tmp_path))
    assert not packages & HEAVY
    rooms = {name.split(".")[1] for name in own}
    assert not rooms & {"orchestration", "models", "finetuning", "bases", "search", "evaluation"}
