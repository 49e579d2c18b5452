"""A user's own methods: the code of docs/extending.md, word for word, and the registries."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import TASKS, write_experiment
from torch import Tensor
from vector_files import open_set, put_set

import raytvb
from raytvb.cli.main import main
from raytvb.errors import UserError
from raytvb.experiment.parsing import load_experiment
from raytvb.maths.basis_registry import BASIS_METHODS, basis_method, convex_methods, online_methods
from raytvb.maths.gram_factor import GramFactor
from raytvb.maths.merge_registry import MERGE_METHODS, merge_method, stored_merges
from raytvb.plugins import PLUGINS
from raytvb.search.merged_vectors import method_direction
from raytvb.storage.store import Store

GUIDE = Path(__file__).parent.parent / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
MODULE = "my_methods"
WITH_OURS = {"basis": {"method": ["svd", "longest"]}, "search": {"sizes": [1], "merges": "median"}}


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test registers are removed after the test."""
    for registry in (BASIS_METHODS, MERGE_METHODS):
        monkeypatch.setattr(registry, "_entries", dict(registry._loaded()))


def load_plugins_again(monkeypatch: pytest.MonkeyPatch, modules: str) -> None:
    """The next access to a registry behaves like the first one in a process with these plugins."""
    monkeypatch.setenv(PLUGINS, modules)
    for registry in (BASIS_METHODS, MERGE_METHODS):
        monkeypatch.setattr(registry, "_complete", False)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_registries: None) -> Iterator[Path]:
    """The folder of the guide's module. RAYTVB_PLUGINS names this module."""
    folder = tmp_path / "plugin"
    folder.mkdir()
    (folder / f"{MODULE}.py").write_text("\n\n".join(BLOCKS), encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    load_plugins_again(monkeypatch, f" {MODULE} ,")
    yield folder
    sys.modules.pop(MODULE, None)


def imported_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has imported after the code."""
    listing = (
        "\nimport json, sys\nprint(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code + listing], capture_output=True, text=True, check=True
    )
    return set(json.loads(found.stdout.splitlines()[-1]))


def test_the_names_of_all_methods_are_known_without_torch() -> None:
    code = (
        "from raytvb.maths.basis_registry import BASIS_METHODS\n"
        "from raytvb.maths.merge_registry import MERGE_METHODS\n"
        "assert 'svd' in BASIS_METHODS and 'ties' in MERGE_METHODS\n"
        "assert all(m.summary for m in [*BASIS_METHODS.values(), *MERGE_METHODS.values()])"
    )
    assert not imported_after(code) & {"torch", "numpy", "scipy", "sklearn", "optuna", "ray"}


def test_the_built_in_methods_are_there() -> None:
    assert list(BASIS_METHODS) == [
        "ae",
        "ae-adam",
        "ae-anchored",
        "greedy",
        "kmeans",
        "pca",
        "random-projection",
        "random-subset",
        "spectral",
        "svd",
    ]
    assert list(MERGE_METHODS) == [
        "breadcrumbs",
        "consensus",
        "dare",
        "fisher",
        "iso-c",
        "mean",
        "sum",
        "tall",
        "ties",
        "tsv-m",
    ]
    assert online_methods() == ["ae", "ae-anchored", "svd"]
    assert set(convex_methods()) == set(BASIS_METHODS) - {"pca", "random-projection", "svd"}
    assert set(stored_merges()) == set(MERGE_METHODS) - {"fisher"}


def test_the_guide_has_one_example_of_each_kind() -> None:
    assert len(BLOCKS) == 2
    assert "@basis_method" in BLOCKS[0] and "@merge_method" in BLOCKS[1]


def test_the_guides_basis_method_fits_bases(plugin: Path) -> None:
    V = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    V[:, [1, 4]] *= 3
    fit = raytvb.fit_basis(V.T @ V, 2, method="longest")
    assert set(fit.B.nonzero()[:, 0].tolist()) == {1, 4} and fit.convex
    assert fit.loss == pytest.approx(
        float((V @ fit.B @ fit.W - V).square().sum() / V.square().sum())
    )
    assert BASIS_METHODS["longest"].convex


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_the_guides_merge_method_merges_stored_vectors(
    plugin: Path, tmp_path: Path, kind: str
) -> None:
    keys, V = put_set(Store(str(tmp_path)), kind, count=4)
    vectors = open_set(Store(str(tmp_path)), keys)
    direction = method_direction(vectors, torch.eye(4).double(), "median")
    ordered = V.float().sort(dim=1).values
    expected = (ordered[:, 1] + ordered[:, 2]) / 2
    if vectors.mask is not None:
        expected = expected[vectors.mask.load().bits]
    torch.testing.assert_close(direction, expected)


def test_an_experiment_file_may_name_them(plugin: Path, tmp_path: Path) -> None:
    experiment = load_experiment(write_experiment(tmp_path, str(tmp_path / "store"), **WITH_OURS))
    assert experiment.basis.method == ("svd", "longest") and experiment.search.merges == ("median",)


def test_the_command_line_lists_them(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--help"]) == 0
    assert "|median|" in capsys.readouterr().out
    assert main(["spectrum", "--help"]) == 0
    assert "|longest|" in capsys.readouterr().out
    assert main(["merge", "store", "--out", "out", "--method", "nothing"]) == 2
    assert "'median'" in capsys.readouterr().err


def test_a_plugin_that_cannot_be_imported_is_named(
    own_registries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_plugins_again(monkeypatch, "no_such_module")
    for _ in range(2):
        with pytest.raises(UserError, match="RAYTVB_PLUGINS names the module no_such_module"):
            BASIS_METHODS.lookup("svd")


def first(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return vectors.subset(range(size))


def test_a_name_can_be_registered_once(own_registries: None) -> None:
    register = basis_method("first", summary="the first M", cost="none")
    assert register(first) is first
    register(first)  # the same definition again

    def other(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return first(vectors, size, generator)

    with pytest.raises(ValueError, match="two definitions of the basis method 'first': ") as error:
        register(other)
    for function in (first, other):
        code = function.__code__
        assert f"{code.co_filename}:{code.co_firstlineno}" in str(error.value)
    assert BASIS_METHODS["first"].fit is first
    with pytest.raises(ValueError, match=r"two definitions of the merge method 'ties'.*ties\.py:"):
        merge_method("ties", summary="", coefficient="one")(lambda vectors: vectors[0])


@pytest.mark.parametrize("name", ["", "Mine", "my method", "a/b", "mine-", "my--own", "my_own"])
def test_a_name_must_fit_into_keys_and_options(own_registries: None, name: str) -> None:
    with pytest.raises(ValueError, match="a name is lower-case letters and digits"):
        basis_method(name, summary="", cost="")(first)


def test_fields_that_mean_nothing_are_refused() -> None:
    options: dict[str, Any]
    for options in ({"coefficient": "two"}, {"coefficient": "one", "needs": ("luck",)}):
        with pytest.raises(ValueError, match="needs can be thresholds, generator, fishers"):
            merge_method("mine", summary="", **options)


def test_results_of_another_shape_or_dtype_are_refused(own_registries: None) -> None:
    G = torch.eye(4, dtype=torch.float64)
    merge_method("flat", summary="", coefficient="one")(lambda vectors: vectors)
    message = r"'flat' \(.*test_extending.py:\d+\) returned shape \(2, 3\) for"
    with pytest.raises(ValueError, match=message):
        MERGE_METHODS["flat"](torch.ones(2, 3))
    basis_method("wide", summary="", cost="")(lambda v, size, g: first(v, size + 1, g))
    with pytest.raises(ValueError, match=r"'wide' .* gave B \(4, 3\) and W \(3, 4\) for 4 vectors"):
        raytvb.fit_basis(G, 2, method="wide")

    @basis_method("single", summary="", cost="")
    def single(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        B, W = first(vectors, size, generator)
        return B.float(), W.float()

    with pytest.raises(ValueError, match=r"'single' .* both must be float64"):
        raytvb.fit_basis(G, 2, method="single")


@pytest.mark.ray
def test_a_run_uses_them_in_its_workers(plugin: Path, tmp_path: Path, suite_cache: str) -> None:
    """All stages run in a separate process, which knows of the module only from its environment."""
    store = tmp_path / "store"
    file = write_experiment(tmp_path, str(store), **WITH_OURS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(plugin), PLUGINS: MODULE, "RAYTVB_CACHE": suite_cache}
    command = [sys.executable, "-m", "raytvb", "run", str(file), "--num-cpus", "2"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    addition = json.loads((store / "report" / "summary.json").read_text())["addition"]
    assert {"longest-m1", "longest-m2", "full-median", "longest-m1-median"} <= addition.keys()
    assert set(addition["longest-m2"]["per_task"]) == set(TASKS)
