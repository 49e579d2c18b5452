"""Merges: coefficients first, then models that open_clip loads."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from experiments import TASKS
from safetensors.torch import load_file
from torch import Tensor

from raytvb.cli.main import main
from raytvb.experiment.stored import load_coefficients
from raytvb.finetuning.masks import load_mask
from raytvb.maths import mixes
from raytvb.maths.basis_fit import fit_basis
from raytvb.maths.merge_registry import MERGE_METHODS, compared_merges
from raytvb.storage.store import Store
from raytvb.storage.stored_basis import StoredBasis


def test_weights_add_negate_and_make_analogies() -> None:
    assert mixes.vector_of(["a", "b", "c"], {"c": 2.0, "a": -1.0}).tolist() == [-1.0, 0.0, 2.0]
    with pytest.raises(ValueError, match="no task vector of d, e; there are a, b"):
        mixes.vector_of(["a", "b"], {"d": 1.0, "a": 1.0, "e": 1.0})


def test_a_decoded_merge_is_the_same_merge_of_the_decoded_vectors() -> None:
    V = torch.randn(60, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fit, x = fit_basis(V.T @ V, 3), mixes.vector_of("abcdefg", {"a": 1.0, "c": -1.0, "g": 1.0})
    torch.testing.assert_close(V @ fit.B @ mixes.decoded(fit.W, x), (V @ fit.B @ fit.W) @ x)
    torch.testing.assert_close(V @ fit.B @ mixes.summed(3), (V @ fit.B).sum(1))


pytestmark = pytest.mark.ray


def merge(store: Store, out: Path, *options: str) -> None:
    """Run `raytvb merge`, which must succeed."""
    assert main(["merge", store.url, *options, "--out", str(out)]) == 0


def test_a_merge_is_an_ordinary_open_clip_model(
    finished: tuple[Path, Store], tmp_path: Path
) -> None:
    _, store = finished
    out = tmp_path / "merged"
    mix = ["--add", TASKS[0], "--negate", f"{TASKS[1]}=0.5"]
    merge(store, out, *mix, "--basis", "full", "--coefficient", "0.7")
    merged = open_clip.create_model(f"local-dir:{out}").state_dict()
    base = load_file(store.path("base/model.safetensors"))
    mask = load_mask(store, "masks/shared/mask.safetensors").tensors()
    vectors = [load_file(store.path(f"vectors/{t}/vector.safetensors")) for t in TASKS[:2]]
    for name, value in base.items():
        expected = value.double()
        if name in mask:
            expected = expected.clone()
            expected[mask[name]] += (
                0.7 * vectors[0][name].double() - 0.35 * vectors[1][name].double()
            )
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-6, rtol=1e-6)


def test_merged_models_classify_from_any_folder(
    finished: tuple[Path, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "merged"
    options = ["--basis", "full", "--coefficient", "0.4"]
    merge(finished[1], out, "--add", TASKS[0], "--add", f"{TASKS[0]}=0.5", *options)
    monkeypatch.chdir(tmp_path)
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(["a picture of a greek letter alpha."])
    assert int((tokens != 0).sum()) > 3
    twice = open_clip.create_model(f"local-dir:{out}").state_dict()
    merge(finished[1], out, "--add", f"{TASKS[0]}=1.5", *options, "--overwrite")
    once = open_clip.create_model(f"local-dir:{out}").state_dict()
    assert all(torch.equal(t, once[n]) for n, t in twice.items())


@pytest.mark.parametrize(
    "options",
    [
        ["--add", f"{TASKS[0]}=nan"],
        ["--add", f"{TASKS[0]}=inf"],
        ["--add", TASKS[0], "--coefficient", "nan"],
        ["--add", "nope"],
        [],
    ],
)
def test_merges_that_make_no_sense_are_refused(
    finished: tuple[Path, Store],
    tmp_path: Path,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["merge", finished[1].url, *options, "--out", str(tmp_path / "out")]) != 0
    assert not (tmp_path / "out").exists() and "rror" in capsys.readouterr().err


def difference(store: Store, out: Path) -> Tensor:
    """What a merged model adds to the pretrained one, on the kept entries in their order (K,)
    float64.
    """
    base, merged = (
        load_file(store.path("base/model.safetensors")),
        load_file(out / "model.safetensors"),
    )
    mask = load_mask(store, "masks/shared/mask.safetensors").tensors()
    assert all(torch.equal(merged[n][~mask[n]], base[n][~mask[n]]) for n in mask)
    return torch.cat([(merged[n].double() - base[n].double())[mask[n]] for n in sorted(mask)])


def basis_vectors(store: Store, name: str) -> Tensor:
    return torch.cat(
        [rows for _, rows in StoredBasis(store, f"basis/{name}").blocks()], dim=1
    ).T.double()


def test_an_analogy_is_decoded_from_the_basis(finished: tuple[Path, Store], tmp_path: Path) -> None:
    _, store = finished
    options = ["--basis", "svd-m2", "--coefficient", "0.5"]
    merge(store, tmp_path / "out", "--analogy", *TASKS, *options)
    W = load_coefficients(store, "svd-m2")[1]
    expected = 0.5 * basis_vectors(store, "svd-m2") @ (W[:, 0] - W[:, 1] + W[:, 2])
    torch.testing.assert_close(difference(store, tmp_path / "out"), expected, rtol=0, atol=1e-6)


def test_the_plain_sum_and_single_basis_vectors(
    finished: tuple[Path, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = finished
    merge(store, tmp_path / "a", "--merge", "sum", "--basis", "ae-anchored-m2")
    S = basis_vectors(store, "ae-anchored-m2")
    chosen = store.read_json("search/ae-anchored-m2-sum/record.json")["metrics"]["coefficient"]
    expected = chosen["3"] * S.sum(1)
    torch.testing.assert_close(difference(store, tmp_path / "a"), expected, rtol=0, atol=1e-6)
    assert "all tasks from ae-anchored-m2-sum" in capsys.readouterr().out
    vectors = ["--vector", "2=0.75", "--vector", "1=-0.5"]
    merge(store, tmp_path / "b", "--basis", "ae-anchored-m2", *vectors)
    expected = 0.75 * S[:, 1] - 0.5 * S[:, 0]
    torch.testing.assert_close(difference(store, tmp_path / "b"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", compared_merges())
def test_methods_of_the_literature_on_kept_entries(
    finished: tuple[Path, Store], tmp_path: Path, method: str
) -> None:
    """The merge equals the method on whole tensors, computed here, with the default or the given
    coefficient.
    """
    _, store = finished
    options = [
        "--add",
        TASKS[0],
        "--add",
        f"{TASKS[1]}=0.5",
        "--negate",
        TASKS[2],
        "--basis",
        "full",
    ]
    given = [] if MERGE_METHODS[method].coefficient == "one" else ["--coefficient", "0.5"]
    merge(store, tmp_path / "out", *options, "--method", method, *given)
    alpha = 1.0 if MERGE_METHODS[method].coefficient == "one" else 0.5
    base, merged = (
        load_file(store.path("base/model.safetensors")),
        load_file(tmp_path / "out/model.safetensors"),
    )
    mask = load_mask(store, "masks/shared/mask.safetensors").tensors()
    loaded = [load_file(store.path(f"vectors/{t}/vector.safetensors")) for t in TASKS]
    rows = {
        n: torch.stack([w * v[n] for w, v in zip((1.0, 0.5, -1.0), loaded, strict=True)])
        for n in sorted(mask)
    }
    generator = torch.Generator().manual_seed(0)
    flat = torch.cat(list(rows.values()), dim=1).abs()
    extra: dict[str, dict[str, Any]] = {
        "dare": {"generator": generator},
        "ties": {
            "thresholds": flat.sort(dim=1, descending=True).values[
                :, round(0.2 * flat.shape[1]) - 1
            ]
        },
    }
    for name, kept in mask.items():
        if MERGE_METHODS[method].matrices:
            whole = torch.zeros(3, *kept.shape)
            whole[:, kept] = rows[name]
            change = MERGE_METHODS[method](whole)
        else:
            change = torch.zeros(kept.shape)
            change[kept] = MERGE_METHODS[method](rows[name], **extra.get(method, {}))
        if (
            method == "iso-c" and kept.ndim == 2
        ):  # if the sum has a lower rank, the remaining directions are arbitrary
            left, right = (torch.linalg.svdvals(d) for d in (merged[name] - base[name], change))
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
        else:
            close = 1e-4 if method == "tsv-m" else 1e-6
            torch.testing.assert_close(
                merged[name], base[name] + alpha * change, rtol=0, atol=close
            )
    assert any(not torch.equal(merged[n], base[n]) for n in mask)
    same = [n for n in base if n not in mask]
    assert same and all(torch.equal(merged[n], base[n]) for n in same)


def test_a_method_on_vectors_that_a_basis_gives_back(
    finished: tuple[Path, Store], tmp_path: Path
) -> None:
    _, store = finished
    mix = ["--add", TASKS[0], "--add", TASKS[2]]
    merge(store, tmp_path / "out", *mix, "--basis", "svd-m2", "--method", "mean")
    W = load_coefficients(store, "svd-m2")[1]
    expected = basis_vectors(store, "svd-m2") @ (W[:, 0] + W[:, 2]) / 2
    torch.testing.assert_close(difference(store, tmp_path / "out"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "ties", "--merge", "sum", "--basis", "ae-anchored-m1"], "merges tasks"),
        (["--add", TASKS[0], "--negate", TASKS[0]], "cancel out"),
        (["--merge", "sum", "--basis", "svd-m2"], "no convex combinations"),
        (["--merge", "sum", "--basis", "full"], "name one with --basis"),
        (["--merge", "sum", "--add", TASKS[0]], "cannot be combined"),
        (["--vector", "3", "--basis", "svd-m2"], "has the vectors 1 to 2, not 3"),
        (["--vector", "x", "--basis", "svd-m2"], "use a whole number, 1 or more"),
        (["--vector", "1", "--add", TASKS[0]], "cannot be combined"),
        (
            ["--add", TASKS[0], "--basis", "svd-m9"],
            "it has ae-anchored-m1, ae-anchored-m2, svd-m1, svd-m2",
        ),
        (["--analogy", TASKS[0], "nope", TASKS[1]], "no task vector of nope"),
        (["--add", TASKS[0], "--basis", "full", "--negate", "other"], "no task vector of other"),
    ],
)
def test_merges_that_cannot_be(
    finished: tuple[Path, Store],
    tmp_path: Path,
    options: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["merge", finished[1].url, *options, "--out", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_spectrum_is_that_of_the_vectors(
    finished: tuple[Path, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = finished
    assert main(["spectrum", store.url, "--method", "svd", "--size", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    V = torch.stack(
        [
            torch.cat(
                [
                    t.reshape(-1)
                    for _, t in sorted(
                        load_file(store.path(f"vectors/{task}/vector.safetensors")).items()
                    )
                ]
            )
            for task in found["tasks"]
        ],
        dim=1,
    ).double()
    values = torch.linalg.svdvals(V) ** 2
    assert found["share"] == pytest.approx((values / values.sum()).tolist(), rel=1e-5)
    assert found["floor"][1] == pytest.approx(float(values[2] / values.sum()), rel=1e-4)
    assert found["fit"]["loss"] == pytest.approx(found["floor"][1], rel=1e-6)
    assert set(found["fit"]["per_task"]) == set(TASKS)
    assert main(["spectrum", store.url]) == 0
    assert "task vectors so far: 3" in capsys.readouterr().out
    assert main(["spectrum", str(tmp_path)]) == 1
    assert "has no Gram matrix yet" in capsys.readouterr().err
