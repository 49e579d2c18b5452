"""What a merge writes, and where no command may write: nothing that exists is destroyed, and no
value that is not finite is written. The store is one of the first format, so no Ray is needed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from raytvb.cli.main import main
from raytvb.errors import UserError, VectorError
from raytvb.experiment.layout import vector_prefix
from raytvb.experiment.places import check_new_store, is_store, output_folder
from raytvb.experiment.sections.model import ModelConfig
from raytvb.maths.merge_registry import MERGE_METHODS, merge_method
from raytvb.merging.addends import BasisVectors, Tasks
from raytvb.merging.merge import merge, merged_state
from raytvb.models.open_clip_models import load_encoder, load_folder
from raytvb.storage.records import read_file
from raytvb.storage.store import Store
from raytvb.storage.vector_set import VectorSet
from raytvb.storage.vectors import VECTOR

ARCHIVE = Path(__file__).parent / "stores" / "format-1.tar.xz"
GREEK, LATIN = "glyphs/greek-blur", "glyphs/latin-fog"
MIX = ("--add", GREEK, "--basis", "full", "--coefficient", "0.5")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A finished store, which a test may change."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "format-1" / "shared"


def contents(folder: Path) -> dict[str, bytes]:
    """All files in a folder and below, by their paths."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


# Places -------------------------------------------------------------------------------------------


INSIDE: dict[str, Callable[[Path], str]] = {
    "store": str,
    "base": lambda store: f"{store}/base",
    "new": lambda store: f"{store}/merged/one",
    "URL": lambda store: f"file://{store}/base",
    "relative": lambda store: os.path.relpath(store / "vectors"),
    "dots": lambda store: f"{store}/base/../../{store.name}/base",
    "link": lambda store: f"{store.parent}/link/base",
    "link to base": lambda store: f"{store.parent}/base",
}


@pytest.mark.parametrize("place", INSIDE)
def test_a_merge_never_writes_into_a_store(
    store: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (store.parent / "link").symlink_to(store)
    (store.parent / "base").symlink_to(store / "base")
    before, out = contents(store), INSIDE[place](store)
    for flags in ([], ["--overwrite"]):
        assert main(["merge", str(store), *MIX, "--out", out, *flags]) == 1
        words = f"lies in the store {store}, which only runs may change: name a folder outside"
        assert words in capsys.readouterr().err
    assert contents(store) == before


def test_another_store_than_the_one_that_is_merged_is_safe(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = store.parent / "own"
    before = contents(other)
    assert main(["merge", str(store), *MIX, "--out", str(other / "base")]) == 1
    assert f"lies in the store {other}" in capsys.readouterr().err
    assert contents(other) == before


@pytest.mark.parametrize("out", ["s3://bucket/merged", "s3:/bucket/merged", "hf://a/b", "no://x"])
def test_a_merge_is_written_to_this_machine(
    store: Path, capsys: pytest.CaptureFixture[str], out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    before = sorted(os.listdir())
    assert main(["merge", str(store), *MIX, "--out", out]) == 1
    assert f"{out} must be a folder of this machine" in capsys.readouterr().err
    assert sorted(os.listdir()) == before


def test_a_store_is_known_by_what_a_run_has_written(store: Path, tmp_path: Path) -> None:
    """The user's own experiment file makes no store of the folder that it lies in."""
    assert is_store(Store(str(store))) and not is_store(Store(str(store / "base")))
    shutil.rmtree(store / "base")  # a run that has just begun
    assert is_store(Store(str(store)))
    home = tmp_path / "home"
    home.mkdir()
    frozen = yaml.safe_load((store / "experiment.yaml").read_text())
    documents: list[object] = [{**frozen, "store": "here"}, {"tasks": [GREEK]}, [], "text"]
    for fields in documents:
        (home / "experiment.yaml").write_text(yaml.safe_dump(fields))
        assert not is_store(Store(str(home)))
        assert output_folder(home / "merged") == home / "merged"
    (home / "experiment.yaml").write_bytes(b"\xff: {")
    assert output_folder(home / "merged") == home / "merged"


@pytest.mark.parametrize("command", ["run", "plan", "finetune", "quickstart"])
def test_no_store_is_made_inside_another_one(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before, inner = contents(store), store / "base" / "inner"
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump({"tasks": [GREEK, LATIN], "store": str(inner)}))
    arguments = ["--store", str(inner)] if command == "quickstart" else [str(file)]
    assert main([command, *arguments]) == 1
    assert f"{inner} would lie in the store {store}" in capsys.readouterr().err
    assert contents(store) == before and not inner.exists()


def test_a_store_that_lies_in_another_one_already_is_used(store: Path, tmp_path: Path) -> None:
    inner = store / "inner"
    shutil.copytree(store.parent / "own", inner)
    check_new_store(Store(str(inner)))
    check_new_store(Store(str(store)))
    with pytest.raises(UserError, match=f"would lie in the store {inner}"):
        check_new_store(Store(str(inner / "third")))


@pytest.mark.s3
def test_no_store_is_made_inside_another_one_in_a_bucket(s3_environment: str) -> None:
    Store(f"{s3_environment}/runs/one").write("base/record.json", b"{}")
    for inside in ("runs/one/base", "runs/one/base/deep", "runs/one/x"):
        with pytest.raises(UserError, match=f"would lie in the store {s3_environment}/runs/one"):
            check_new_store(Store(f"{s3_environment}/{inside}"))
    for outside in ("runs/one", "runs/two", "runs", "runs/one-more"):
        check_new_store(Store(f"{s3_environment}/{outside}"))


def test_a_benchmark_keeps_its_files_out_of_stores(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(store)
    small = ["--tasks", "2", "--parameters", "800", "--folder", str(store / "vectors")]
    assert main(["bench", "gram", *small]) == 1
    assert f"lies in the store {store}" in capsys.readouterr().err
    assert contents(store) == before


# What is there already ----------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_left_alone(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        assert main(["merge", str(store), *MIX, "--out", str(out), *flags]) == 1
        assert contents(out) == {"thesis.tex": b"years of work"}
    assert "holds more than a model (thesis.tex)" in capsys.readouterr().err
    (out / "thesis.tex").rename(tmp_path / "thesis.tex")
    thesis = str(tmp_path / "thesis.tex")
    assert main(["merge", str(store), *MIX, "--out", thesis, "--overwrite"]) == 1
    assert "is a file: name a folder that does not exist yet" in capsys.readouterr().err
    assert Path(thesis).read_text() == "years of work"


def test_a_model_is_replaced_if_that_is_asked_for(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is free
    assert main(["merge", str(store), *MIX, "--out", str(out)]) == 0
    first = contents(out)
    other = ("--negate", LATIN, "--basis", "full", "--coefficient", "0.5")
    assert main(["merge", str(store), *other, "--out", str(out)]) == 1
    assert "is not empty: name another folder, or replace the model" in capsys.readouterr().err
    assert contents(out) == first
    assert main(["merge", str(store), *other, "--out", str(out), "--overwrite"]) == 0
    second = contents(out)
    assert second.keys() == first.keys()
    assert second["model.safetensors"] != first["model.safetensors"]
    (out / "trained.pt").write_bytes(b"1")
    assert main(["merge", str(store), *MIX, "--out", str(out), "--overwrite"]) == 1
    assert "holds more than a model (trained.pt)" in capsys.readouterr().err
    assert contents(out) == {**second, "trained.pt": b"1"}
    assert not list(tmp_path.glob(".raytvb*"))


def test_a_link_to_a_folder_stays_a_link(store: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    for flags in ([], ["--overwrite"]):
        assert main(["merge", str(store), *MIX, "--out", str(tmp_path / "link"), *flags]) == 0
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "place" / "model.safetensors").exists()
        load_folder(tmp_path / "link")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("step", ["read", "weights", "rename"])
def test_a_merge_that_fails_half_way_leaves_what_was_there(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, exists: bool
) -> None:
    out = tmp_path / "out"
    if exists:
        assert main(["merge", str(store), "--negate", LATIN, "--out", str(out)]) == 0
    before = contents(out)

    def half(state: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half of the weights")
        raise OSError("no space left on device")

    rename, count = Path.rename, [0]

    def refused_once(self: Path, target: Path) -> Path:
        if target == out and not count[0]:
            count[0] += 1
            raise OSError("input/output error")
        return rename(self, target)

    def lost(*arguments: Any) -> bytes:
        count[0] += 1
        if count[0] == 2:
            raise OSError("connection lost")
        return read_file(*arguments)

    with monkeypatch.context() as patch:
        match step:
            case "read":
                patch.setattr("raytvb.merging.folder.read_file", lost)
            case "weights":
                patch.setattr("raytvb.merging.folder.save_file", half)
            case _:
                patch.setattr(Path, "rename", refused_once)
        assert main(["merge", str(store), *MIX, "--out", str(out), "--overwrite"]) == 1
    assert contents(out) == before and out.exists() == exists
    assert not list(tmp_path.glob(".raytvb*"))
    assert main(["merge", str(store), *MIX, "--out", str(out), "--overwrite"]) == 0


KILLED = """
import os, signal, sys
import raytvb.merging.folder as folder
from raytvb.cli.main import main

def half(state, path):
    path.write_bytes(b"half of the weights")
    os.kill(os.getpid(), signal.SIGKILL)

folder.save_file = half
main(["merge", *sys.argv[1:]])
"""


def test_a_merge_that_is_killed_keeps_the_older_model(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(store), *MIX, "--out", str(out)]) == 0
    before = contents(out)
    arguments = [str(store), "--negate", LATIN, "--out", str(out), "--overwrite"]
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert contents(out) == before
    load_folder(out)


# Values -------------------------------------------------------------------------------------------

TOO_LARGE: dict[str, tuple[str, ...]] = {
    "a weight": ("--add", f"{GREEK}=1e200", "--basis", "full"),
    "a weight of a basis": ("--add", f"{GREEK}=1e200", "--basis", "svd-m2"),
    "a negative weight": ("--negate", f"{GREEK}=1e300", "--basis", "full"),
    "the coefficient": ("--add", GREEK, "--coefficient", "1e308"),
    "weight and coefficient": ("--add", f"{GREEK}=1e30", "--coefficient", "1e30"),
    "a sum": ("--add", f"{GREEK}=3e38", "--add", f"{LATIN}=3e38", "--coefficient", "1000"),
    "a basis vector": ("--vector", "1=1e300", "--basis", "svd-m2"),
    "a basis sum": ("--merge", "sum", "--basis", "ae-anchored-m2", "--coefficient", "1e300"),
    "a method": ("--add", f"{GREEK}=1e200", "--method", "ties", "--basis", "full"),
    "a method's coefficient": (
        *("--add", GREEK, "--add", LATIN, "--method", "mean", "--basis", "full"),
        *("--coefficient", "1e300"),
    ),
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_a_merge_that_would_not_be_finite_names_the_tensors_and_writes_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(store), *TOO_LARGE[what], "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert "NaN or infinite values in visual.proj" in message and "use smaller weights" in message
    assert not out.exists() and not list(tmp_path.glob(".raytvb*"))


REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "nan": (("--add", f"{GREEK}=nan"), 2, "finite number"),
    "inf": (("--add", f"{GREEK}=inf"), 2, "finite number"),
    "1e400": (("--negate", f"{GREEK}=1e400"), 2, "finite number"),
    "vector": (("--vector", "1=-1e400", "--basis", "svd-m2"), 2, "finite number"),
    "sum": (("--add", f"{GREEK}=1e308", "--add", f"{GREEK}=1e308"), 1, "add up to inf"),
    "coefficient": (("--add", GREEK, "--coefficient", "1e400"), 1, "use a finite number"),
    "coefficient nan": (("--add", GREEK, "--coefficient", "nan"), 1, "use a finite number"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_numbers_that_are_not_finite_are_refused_as_arguments(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    arguments, code, words = REFUSED[what]
    assert main(["merge", str(store), *arguments, "--out", str(tmp_path / "out")]) == code
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_the_library_refuses_them_too(store: Path, tmp_path: Path, number: float) -> None:
    target, out = Store(str(store)), tmp_path / "out"
    with pytest.raises(VectorError, match=f"the weight of {GREEK} is {number}; use a finite"):
        merge(target, Tasks({GREEK: number}), out)
    with pytest.raises(VectorError, match=f"the weight of 2 is {number}"):
        merge(target, BasisVectors({2: number}), out, basis="svd-m2")
    with pytest.raises(VectorError, match=f"the coefficient is {number}"):
        merge(target, Tasks({GREEK: 1.0}), out, coefficient=number)
    assert not out.exists()


def test_a_large_merge_that_is_finite_is_written(store: Path, tmp_path: Path) -> None:
    large = ("--add", f"{GREEK}=1e30", "--basis", "full", "--coefficient", "1")
    assert main(["merge", str(store), *large, "--out", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert float(merged["visual.proj"].abs().max()) > 1e20
    assert all(bool(tensor.isfinite().all()) for tensor in merged.values())


def test_a_method_of_the_users_that_returns_nan_is_named_with_the_tensor(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @merge_method("careless", summary="divides by zero", coefficient="one")
    def careless(vectors: Tensor) -> Tensor:
        return vectors.sum(0) / 0.0

    try:
        careless_mix = ("--add", GREEK, "--method", "careless", "--basis", "full")
        assert main(["merge", str(store), *careless_mix, "--out", str(tmp_path / "out")]) == 1
    finally:
        del MERGE_METHODS._entries["careless"]
    message = capsys.readouterr().err
    assert "visual." in message and "merge method 'careless'" in message
    assert "NaN or infinite" in message and not (tmp_path / "out").exists()


def test_a_vector_with_nan_is_named(store: Path) -> None:
    """The store's own vectors are compared with their records; this one has none."""
    target, key = Store(str(store)), f"{vector_prefix(GREEK)}/{VECTOR}"
    values = load_file(target.path(key))
    values["visual.proj"][5] = float("nan")
    from raytvb.storage.vectors import VectorFile, vector_bytes

    info = VectorFile(target, key).info
    copied = "vectors/glyphs/copied/vector.safetensors"
    target.write(copied, vector_bytes(values, info))
    base = load_file(target.path("base/model.safetensors"))
    vectors = VectorSet([VectorFile(target, copied)])
    with pytest.raises(VectorError, match=r"copied/vector.safetensors has NaN .* in visual.proj; "):
        merged_state(base, vectors, torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_are_checked_as_they_are_stored(
    store: Path, dtype: torch.dtype
) -> None:
    """1e6 times a value of a vector is too large for float16, and for no other dtype."""
    target = Store(str(store))
    base = load_file(target.path("base/model.safetensors"))
    state = {name: tensor.to(dtype) for name, tensor in base.items()}
    state["mask"] = torch.full((3, 3), -torch.inf, dtype=dtype)  # as attention masks are
    vectors = VectorSet.open(target, [f"{vector_prefix(GREEK)}/{VECTOR}"])
    weights = torch.tensor([1e8], dtype=torch.float64)
    if dtype == torch.float16:
        with pytest.raises(VectorError, match="merged model would have NaN or infinite values in"):
            merged_state(state, vectors, weights)
    else:
        merged = merged_state(state, vectors, weights)
        assert merged["visual.proj"].dtype == dtype and torch.equal(merged["mask"], state["mask"])
        assert bool(merged["visual.proj"].isfinite().all())


def model_with(store: Path, folder: Path, **values: float) -> str:
    """The store's pretrained model with one entry of some tensors replaced. Returns its name."""
    shutil.copytree(store / "base", folder)
    state = load_file(folder / "model.safetensors")
    for name, value in values.items():
        state[name].view(-1)[-1] = value
    save_file(state, folder / "model.safetensors")
    return f"local-dir:{folder}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_pretrained_model_that_is_not_finite_is_refused_by_name(
    store: Path, tmp_path: Path, value: float
) -> None:
    names: dict[str, Any] = {"visual.proj": value, "token_embedding.weight": value}
    name = model_with(store, tmp_path / "bad", **names)
    words = "has NaN or infinite values in token_embedding.weight, visual.proj: use a checkpoint"
    with pytest.raises(UserError, match=words):
        load_encoder(ModelConfig(name=name))
    good = load_encoder(ModelConfig(name=model_with(store, tmp_path / "good")))
    assert any(bool(buffer.isinf().any()) for _, buffer in good.model.named_buffers())
