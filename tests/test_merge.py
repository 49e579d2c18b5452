"""Merges: coefficients first, then models that open_clip loads."""

import json
from pathlib import Path

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
from raytvb.maths.merge_methods import MERGE, UNSCALED
from raytvb.merging.merge import METHODS
from raytvb.storage.store import Store
from raytvb.storage.stored_basis import StoredBasis


def test_weights_add_negate_and_make_analogies() -> None:
    assert mixes.analogy("a", "b", "c") == {"a": 1.0, "b": -1.0, "c": 1.0}
    assert mixes.analogy("a", "b", "a") == {"a": 2.0, "b": -1.0}
    assert mixes.total({"x": 1.0}, {"y": 0.5}, {"x": -0.25}) == {"x": 0.75, "y": 0.5}
    assert mixes.vector_of(["a", "b", "c"], {"c": 2.0, "a": -1.0}).tolist() == [-1.0, 0.0, 2.0]
    with pytest.raises(ValueError, match="no task vector of d, e; there are a, b"):
        mixes.vector_of(["a", "b"], {"d": 1.0, "a": 1.0, "e": 1.0})


def test_a_decoded_merge_is_the_same_merge_of_the_decoded_vectors() -> None:
    V = torch.randn(60, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fit, x = fit_basis(V.T @ V, 3), mixes.vector_of("abcdefg", mixes.analogy("a", "c", "g"))
    torch.testing.assert_close(V @ fit.B @ mixes.decoded(fit.W, x), (V @ fit.B @ fit.W) @ x)
    torch.testing.assert_close(V @ fit.B @ mixes.summed(3), (V @ fit.B).sum(1))


pytestmark = pytest.mark.ray


def test_a_merge_is_an_ordinary_open_clip_model(finished: tuple[Path, Store], tmp_path: Path):
    _, store = finished
    out = tmp_path / "merged"
    assert (
        main(
            [
                "merge",
                store.url,
                "--add",
                TASKS[0],
                "--negate",
                f"{TASKS[1]}=0.5",
                "--basis",
                "full",
                "--coefficient",
                "0.7",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    merged = open_clip.create_model(f"local-dir:{out}").state_dict()
    base = load_file(store.path("base/model.safetensors"))
    from raytvb.finetuning.masks import load_mask

    mask = load_mask(store, "shared").tensors()
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
):
    out = tmp_path / "merged"
    assert (
        main(
            [
                "merge",
                finished[1].url,
                "--add",
                TASKS[0],
                "--add",
                f"{TASKS[0]}=0.5",
                "--basis",
                "full",
                "--coefficient",
                "0.4",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    monkeypatch.chdir(tmp_path)
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(["a picture of a greek letter alpha."])
    assert int((tokens != 0).sum()) > 3
    twice = open_clip.create_model(f"local-dir:{out}").state_dict()
    assert (
        main(
            [
                "merge",
                finished[1].url,
                "--add",
                f"{TASKS[0]}=1.5",
                "--basis",
                "full",
                "--coefficient",
                "0.4",
                "--out",
                str(out),
            ]
        )
        == 0
    )
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
):
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
    mask = load_mask(store, "shared").tensors()
    assert all(torch.equal(merged[n][~mask[n]], base[n][~mask[n]]) for n in mask)
    return torch.cat([(merged[n].double() - base[n].double())[mask[n]] for n in sorted(mask)])


def basis_vectors(store: Store, name: str) -> Tensor:
    return torch.cat(
        [rows for _, rows in StoredBasis(store, f"basis/{name}").blocks()], dim=1
    ).T.double()


def test_an_analogy_is_decoded_from_the_basis(finished: tuple[Path, Store], tmp_path: Path):
    _, store = finished
    assert (
        main(
            [
                "merge",
                store.url,
                "--analogy",
                *TASKS,
                "--basis",
                "svd-m2",
                "--coefficient",
                "0.5",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    W = load_coefficients(store, "svd-m2")[1]
    expected = 0.5 * basis_vectors(store, "svd-m2") @ (W[:, 0] - W[:, 1] + W[:, 2])
    torch.testing.assert_close(difference(store, tmp_path / "out"), expected, rtol=0, atol=1e-6)


def test_the_plain_sum_and_single_basis_vectors(
    finished: tuple[Path, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _, store = finished
    assert (
        main(
            [
                "merge",
                store.url,
                "--merge",
                "sum",
                "--basis",
                "ae-anchored-m2",
                "--out",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    S = basis_vectors(store, "ae-anchored-m2")
    searched = store.read_json("search/ae-anchored-m2-sum/record.json")["metrics"]["coefficient"][
        "3"
    ]
    torch.testing.assert_close(
        difference(store, tmp_path / "a"), searched * S.sum(1), rtol=0, atol=1e-6
    )
    assert "all tasks from ae-anchored-m2-sum" in capsys.readouterr().out
    assert (
        main(
            [
                "merge",
                store.url,
                "--basis",
                "ae-anchored-m2",
                "--vector",
                "2=0.75",
                "--vector",
                "1=-0.5",
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 0
    )
    torch.testing.assert_close(
        difference(store, tmp_path / "b"), 0.75 * S[:, 1] - 0.5 * S[:, 0], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("method", [m for m in METHODS if m != "sum"])
def test_methods_of_the_literature_on_kept_entries(
    finished: tuple[Path, Store], tmp_path: Path, method: str
):
    """Against the method on whole tensors, made here, with the coefficient that is the default or
    given.
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
    given = [] if method in UNSCALED else ["--coefficient", "0.5"]
    assert (
        main(
            [
                "merge",
                store.url,
                *options,
                "--method",
                method,
                *given,
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    alpha = 1.0 if method in UNSCALED else 0.5
    base, merged = (
        load_file(store.path("base/model.safetensors")),
        load_file(tmp_path / "out/model.safetensors"),
    )
    mask = load_mask(store, "shared").tensors()
    loaded = [load_file(store.path(f"vectors/{t}/vector.safetensors")) for t in TASKS]
    rows = {
        n: torch.stack([w * v[n] for w, v in zip((1.0, 0.5, -1.0), loaded, strict=True)])
        for n in sorted(mask)
    }
    generator = torch.Generator().manual_seed(0)
    flat = torch.cat(list(rows.values()), dim=1).abs()
    extra = {
        "dare": {"generator": generator},
        "ties": {
            "thresholds": flat.sort(dim=1, descending=True).values[
                :, round(0.2 * flat.shape[1]) - 1
            ]
        },
    }
    for name, kept in mask.items():
        if method in ("tsv-m", "iso-c"):
            whole = torch.zeros(3, *kept.shape)
            whole[:, kept] = rows[name]
            change = MERGE[method](whole)
        else:
            change = torch.zeros(kept.shape)
            change[kept] = MERGE[method](rows[name], **extra.get(method, {}))
        if method == "iso-c" and kept.ndim == 2:  # of a sum of lower rank any directions are right
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


def test_a_method_on_vectors_that_a_basis_gives_back(finished: tuple[Path, Store], tmp_path: Path):
    _, store = finished
    assert (
        main(
            [
                "merge",
                store.url,
                "--add",
                TASKS[0],
                "--add",
                TASKS[2],
                "--basis",
                "svd-m2",
                "--method",
                "mean",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
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
        (["--vector", "x", "--basis", "svd-m2"], "use a number from 1 on"),
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
):
    assert main(["merge", finished[1].url, *options, "--out", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_spectrum_is_that_of_the_vectors(
    finished: tuple[Path, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
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
