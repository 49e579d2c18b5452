"""Stores of every format can still be read: two tiny stores of each, written by the first version
that had the format.

`stores/format-<n>.tar.xz` has two finished stores without their caches of images, the experiment
files they were made with, and `merges.safetensors`: the changed tensors of ten models that the same
version merged from them, as `<store>/<merge>/<tensor>`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from raytvb.cli.main import main
from raytvb.storage.format_version import FORMAT

ARCHIVES = sorted((Path(__file__).parent / "stores").glob("format-*.tar.xz"))
GREEK, LATIN, CLOCK, FOG = (
    "glyphs/greek-blur",
    "glyphs/latin-fog",
    "glyphs/clock-blur",
    "glyphs/greek-fog",
)
MERGES: dict[str, tuple[str, ...]] = {
    "shared/chosen": ("--add", GREEK, "--add", LATIN),
    "shared/full": (
        *("--add", GREEK, "--add", LATIN, "--add", CLOCK, "--add", FOG),
        *("--basis", "full", "--coefficient", "0.5"),
    ),
    "shared/negated": ("--negate", GREEK, "--basis", "full", "--coefficient", "0.7"),
    "shared/anchored": (
        *("--add", GREEK, "--add", CLOCK, "--basis", "ae-anchored-m2"),
        *("--coefficient", "0.4", "--lengths", "own"),
    ),
    "shared/online": ("--add", LATIN, "--basis", "svd-m2-online", "--coefficient", "0.9"),
    "shared/sum": ("--merge", "sum", "--basis", "ae-anchored-m2"),
    "shared/ties": ("--add", GREEK, "--add", LATIN, "--method", "ties", "--basis", "full"),
    "shared/vector": ("--basis", "svd-m2", "--vector", "1=0.8", "--vector", "2=-0.2"),
    "own/full": ("--add", GREEK, "--add", LATIN, "--basis", "full", "--coefficient", "0.5"),
    "own/basis": ("--add", GREEK, "--negate", FOG, "--basis", "svd-m2", "--coefficient", "0.6"),
}


def name_of(archive: Path) -> str:
    return archive.name.partition(".")[0]


def test_every_format_has_an_archive() -> None:
    assert [name_of(file) for file in ARCHIVES] == [f"format-{n}" for n in range(1, FORMAT + 1)]


@pytest.fixture(scope="module", params=ARCHIVES, ids=name_of)
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder / name_of(request.param)


@pytest.fixture
def stores(unpacked: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(unpacked, tmp_path / "stores"))


@pytest.fixture(scope="module")
def expected(unpacked: Path) -> dict[str, Tensor]:
    return load_file(unpacked / "merges.safetensors")


def changed_tensors(expected: dict[str, Tensor], merge: str) -> dict[str, Tensor]:
    prefix = f"{merge}/"
    return {k.removeprefix(prefix): t for k, t in expected.items() if k.startswith(prefix)}


def check_merge(stores: Path, merge: str, out: Path, tensors: dict[str, Tensor]) -> None:
    """The merge gives the expected tensors, and the pretrained ones elsewhere."""
    store = merge.split("/")[0]
    assert main(["merge", str(stores / store), *MERGES[merge], "--out", str(out)]) == 0
    merged = load_file(out / "model.safetensors")
    base = load_file(stores / store / "base" / "model.safetensors")
    assert tensors and merged.keys() == base.keys()
    for name, pretrained in base.items():
        torch.testing.assert_close(merged[name], tensors.get(name, pretrained), rtol=0, atol=2e-6)


CHANGING = ("splits/", "report/", "search/tune-", "timings/")
"""Caches, the report, and what tells times."""


def contents(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and checksum of every file that a run must leave as it is."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith(CHANGING):
            yield name, hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("store", ["shared", "own"])
def test_an_old_store_is_listed_and_verified(
    unpacked: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dict(contents(unpacked / store))
    assert main(["verify", str(unpacked / store)]) == 0
    assert main(["ls", str(unpacked / store)]) == 0
    printed = capsys.readouterr().out
    assert GREEK in printed and "svd-m2" in printed
    assert dict(contents(unpacked / store)) == before


@pytest.mark.parametrize("merge", MERGES)
def test_an_old_store_merges_to_the_same_tensors(
    unpacked: Path, expected: dict[str, Tensor], merge: str, tmp_path: Path
) -> None:
    check_merge(unpacked, merge, tmp_path / "out", changed_tensors(expected, merge))


@pytest.mark.ray
@pytest.mark.parametrize("store", ["shared", "own"])
def test_running_an_old_experiment_again_makes_nothing_anew(
    ray_cluster: None, stores: Path, store: str
) -> None:
    before = dict(contents(stores / store))
    summary = json.loads((stores / store / "report" / "summary.json").read_text())
    url = str(stores / store)
    assert main(["run", str(stores / f"{store}.yaml"), "--store", url]) == 0
    after = dict(contents(stores / store))
    assert {name: after.get(name) for name in before} == before
    assert after.keys() - before.keys() <= NEW_FILES
    again = json.loads((stores / store / "report" / "summary.json").read_text())
    for changing in ("provenance", "seconds"):
        del summary[changing], again[changing]
    assert nearly(again) == nearly(summary)


NEW_FILES = {"record.json"}
"""What a run may add to a store of format 1: the store's own record."""


def nearly(value: object) -> object:
    """Round numbers to nine digits, since another machine adds in another order."""
    if isinstance(value, dict):
        return {k: nearly(v) for k, v in value.items()}
    if isinstance(value, list):
        return [nearly(v) for v in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


@pytest.mark.slow
@pytest.mark.ray
def test_what_is_missing_from_an_old_store_is_made_again(
    ray_cluster: None, stores: Path, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    store = stores / "shared"
    before = dict(contents(store))
    for folder in ("basis/svd-m2", "gram", "search/svd-m2", "evals/additions"):
        shutil.rmtree(store / folder)
    assert main(["run", str(stores / "shared.yaml"), "--store", str(store)]) == 0
    after = dict(contents(store))
    kept = [n for n in before if n.startswith(("vectors/", "masks/", "base/", "online/"))]
    assert {n: after[n] for n in kept} == {n: before[n] for n in kept}
    assert main(["verify", str(store)]) == 0
    for merge in ("shared/chosen", "shared/anchored", "shared/online"):
        check_merge(stores, merge, tmp_path / merge, changed_tensors(expected, merge))


@pytest.mark.parametrize("command", ["ls", "verify", "spectrum", "report", "merge", "run"])
def test_a_newer_store_is_refused_with_the_way_out(
    stores: Path, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (stores / "shared").rglob("record.json"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps({**record, "format": 99}))
    before = dict(contents(stores / "shared"))
    url = str(stores / "shared")
    arguments = {
        "merge": ["merge", url, "--add", GREEK, "--out", str(tmp_path / "out")],
        "run": ["run", str(stores / "shared.yaml"), "--store", url],
        "report": ["report", str(stores / "shared.yaml"), "--store", url],
    }.get(command, [command, url])
    assert main(arguments) == 1
    message = capsys.readouterr()
    assert "format 99" in message.err + message.out and "pgrade raytvb" in message.err + message.out
    assert not (tmp_path / "out").exists()
    assert dict(contents(stores / "shared")) == before
