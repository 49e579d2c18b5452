"""A user's own methods: the code of docs/extending.md, word for word, and the registries."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experiments import TASKS, copy_store, write_experiment
from torch import Tensor
from vector_files import open_set, put_set

import raytvb
from raytvb.cli.main import main
from raytvb.errors import UserError
from raytvb.experiment.parsing import load_experiment
from raytvb.experiment.present_versions import PresentVersions
from raytvb.maths import online_basis
from raytvb.maths.basis_registry import BASIS_METHODS, basis_method, convex_methods, online_methods
from raytvb.maths.gram_factor import GramFactor
from raytvb.maths.merge_registry import MERGE_METHODS, merge_method, stored_merges
from raytvb.maths.method_registry import MethodError, origin_of, place_of
from raytvb.orchestration import tune_trial
from raytvb.plugins import PLUGINS
from raytvb.search.merged_vectors import method_direction
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError

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


def test_names_that_results_of_a_search_have_are_refused(own_registries: None) -> None:
    """`svd-m4-online` is the online basis; a merge method `online` would be called the same."""
    for name in ("online", "online-ties"):
        with pytest.raises(ValueError, match=rf"merge method '{name}' .* begin with 'online'"):
            merge_method(name, summary="", coefficient="one")(lambda vectors: vectors[0])
    with pytest.raises(ValueError, match=r"basis method 'random-own' .* begin with 'random-own'"):
        basis_method("random-own", summary="", cost="")(BASIS_METHODS["svd"].fit)
    merge_method("onlines", summary="", coefficient="one")(lambda vectors: vectors[0])


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
    with pytest.raises(ValueError, match=r"'wide' .* returned B of shape \(4, 3\); B must be"):
        raytvb.fit_basis(G, 2, method="wide")

    @basis_method("single", summary="", cost="")
    def single(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        B, W = first(vectors, size, generator)
        return B.float(), W.float()

    with pytest.raises(ValueError, match=r"'single' .* returned B as torch.float32"):
        raytvb.fit_basis(G, 2, method="single")


# What a user's function may do wrong --------------------------------------------------------------


def raises(error: BaseException) -> Callable[..., Any]:
    def function(*args: Any, **options: Any) -> Any:
        raise error

    return function


class OddError(Exception):
    """An exception that only the user's module knows."""


ERRORS = [KeyError("x"), RuntimeError("no"), OddError("odd"), SystemExit(3), AssertionError()]


def eye(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.eye(4, size, dtype=torch.float64), torch.eye(size, 4, dtype=torch.float64)


def changed_mix(change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """A method that returns a changed B."""

    def function(vectors: GramFactor, size: int, generator: torch.Generator) -> Any:
        B, W = eye(vectors, size, generator)
        return change(B), W

    return function


def scaled_second(B: Tensor) -> Tensor:
    B[:, 1] *= 1.5
    return B


def sign_second(B: Tensor) -> Tensor:
    B[:, 1] = torch.tensor([-0.5, 1.5, 0.0, 0.0])
    return B


WRONG_BASES: list[tuple[Callable[..., Any], str]] = [
    (lambda v, m, g: None, r"returned None; it must return a pair of tensors, B \(4, 2\)"),
    (lambda v, m, g: eye(v, m, g)[0], "returned a value of type Tensor; it must return a pair"),
    (lambda v, m, g: (*eye(v, m, g), 1), "returned 3 values; it must return a pair"),
    (lambda v, m: eye(v, m, torch.Generator()), "cannot be called: too many positional arguments"),
    (
        changed_mix(lambda B: B.numpy()),
        "returned a numpy array, not a tensor .* as B; B must be a float",
    ),
    (changed_mix(lambda B: B.tolist()), "returned a value of type list as B"),
    (
        changed_mix(lambda B: B.T),
        r"returned B of shape \(2, 4\); B must be a float64 tensor \(4, 2\)",
    ),
    (changed_mix(lambda B: B.float()), r"returned B as torch.float32 on cpu"),
    (changed_mix(lambda B: B.to_sparse()), r"returned B as sparse torch.float64 on cpu"),
    (changed_mix(lambda B: B / 0), "returned B with 8 entries of 8 that are NaN or infinite"),
    (lambda v, m, g: (eye(v, m, g)[0], eye(v, m, g)[1] * torch.nan), "returned W with 8 entries"),
    (
        changed_mix(scaled_second),
        "column 1 of its B .* has the least entry 0 and the sum 1.5; every",
    ),
    (
        changed_mix(sign_second),
        "column 1 of its B .* has the least entry -0.5 and the sum 1; every",
    ),
    *((raises(error), f"raised {type(error).__name__}") for error in ERRORS),
]


@pytest.mark.parametrize(("function", "message"), WRONG_BASES)
def test_a_wrong_basis_method_ends_in_one_clear_error(
    own_registries: None, function: Callable[..., Any], message: str
) -> None:
    basis_method("wrong", summary="", cost="", convex=True)(function)
    place = re.escape(f"basis method 'wrong' ({place_of(function)}) ")
    with pytest.raises(MethodError, match=place + ".*" + message):
        raytvb.fit_basis(torch.eye(4), 2, method="wrong")


def test_an_error_names_the_line_of_the_method_that_raised_it(own_registries: None) -> None:
    def late(vectors: GramFactor, size: int, generator: torch.Generator) -> Any:
        return torch.ones(2, 3) @ torch.ones(2, 3)  # raised inside torch, for this line

    line = late.__code__.co_firstlineno + 1
    basis_method("late", summary="", cost="")(late)
    with pytest.raises(MethodError, match=rf"raised RuntimeError: .* \[.*extending.py:{line}\]; c"):
        raytvb.fit_basis(torch.eye(4), 2, method="late")


def changes_matrix(vectors: GramFactor) -> None:
    vectors.G_TT[0, 1] += 1


def changes_numpy(vectors: GramFactor) -> None:
    vectors.F_RT.numpy()[0, 0] = 7


def rebinds(vectors: GramFactor) -> None:
    vectors.energy_R = vectors.energy_R.float()


def shortens(vectors: GramFactor) -> None:
    vectors.pivots.pop()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (changes_matrix, "G_TT"),
        (changes_numpy, "F_RT"),
        (rebinds, "energy_R"),
        (shortens, "pivots"),
    ],
)
def test_a_basis_method_cannot_change_what_it_is_given(
    own_registries: None, change: Callable[[GramFactor], None], name: str
) -> None:
    calls = []

    @basis_method("careless", summary="", cost="")
    def careless(
        vectors: GramFactor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        assert vectors.pivots
        calls.append(size)
        if len(calls) == 2:
            change(vectors)
        return eye(vectors, size, generator)

    message = f"changed {name} of the vectors it was given; work on a copy"
    with pytest.raises(MethodError, match=message):
        raytvb.fit_bases(torch.eye(4), [2, 3], method="careless")


def test_a_wrong_online_form_is_named(own_registries: None) -> None:
    state = online_basis.start("ae", 2)
    answers: list[Any] = [None, torch.ones(3, 2), torch.ones(3, 3).double(), torch.nan]
    answers += [
        raises(OddError("odd")),
        torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, -1.0]]).double(),
    ]
    messages = ["returned None", "returned torch.float32", r"of shape \(3, 3\)", "NaN", "OddError"]
    messages += ["registered as convex, but .* the share -1 of a task"]
    for answer, message in zip(answers, messages, strict=True):

        def refit(atoms: Any, size: int, answer: Any = answer) -> Any:
            if answer is torch.nan:
                return torch.full((3, 2), torch.nan).double()
            return answer() if callable(answer) and not isinstance(answer, Tensor) else answer

        name = f"online-{messages.index(message)}"
        basis_method(name, summary="", cost="", convex=True, online=refit)(eye)
        own = replace(state, method=name)
        with pytest.raises(MethodError, match=f"basis method '{name}' .*{message}"):
            online_basis.advance(own, torch.eye(3).double())


WRONG_MERGES: list[tuple[Callable[..., Any], str]] = [
    (lambda v: None, r"returned None; it must return a tensor of floats \(3,\)"),
    (lambda v: v[0].numpy(), "returned a numpy array, not a tensor"),
    (lambda v: v, r"returned shape \(2, 3\) for vectors \(2, 3\)"),
    (lambda v: v[0].long(), "returned torch.int64; it must return a tensor of floats"),
    (lambda v: v[0] > 0, "returned torch.bool"),
    (lambda v: v[0] / torch.tensor([1.0, 0.0, 0.0]), "returned 2 values of 3 that are NaN or inf"),
    (lambda v: v[0].double() * 1e300, "returned 3 values of 3"),
    (lambda v, *, thresholds: v[0], "cannot be called: missing a required .*'thresholds'"),
    *((raises(error), f"raised {type(error).__name__}") for error in ERRORS),
]


@pytest.mark.parametrize(("function", "message"), WRONG_MERGES)
def test_a_wrong_merge_method_ends_in_one_clear_error(
    own_registries: None, function: Callable[..., Any], message: str
) -> None:
    merge_method("wrong", summary="", coefficient="one")(function)
    place = re.escape(f"merge method 'wrong' ({place_of(function)}) ")
    with pytest.raises(MethodError, match=place + message):
        MERGE_METHODS["wrong"](torch.ones(2, 3))


def test_a_function_without_the_keyword_it_registered_is_named(own_registries: None) -> None:
    merge_method("deaf", summary="", coefficient="one", needs=("generator",))(lambda v: v[0])
    message = "'deaf' .* cannot be called: .*'generator'; its function must take 1 .* generator"
    with pytest.raises(MethodError, match=message):
        MERGE_METHODS["deaf"](torch.ones(2, 3), generator=torch.Generator())


def test_a_merge_may_return_any_floats_and_what_its_vectors_are(own_registries: None) -> None:
    kinds = [torch.float64, torch.bfloat16, torch.float16, torch.float32]
    for kind in kinds:
        name = str(kind).removeprefix("torch.")
        merge_method(name, summary="", coefficient="one")(lambda v, k=kind: v.mean(0).to(k))
        found = MERGE_METHODS[name](torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        assert found.dtype == torch.float32 and found.tolist() == [2.0, 3.0]
    # Vectors that are not finite are the candidate's fault, not the method's.
    assert MERGE_METHODS["mean"](torch.full((2, 1), torch.inf)).isinf().all()


def test_ctrl_c_in_a_method_is_no_fault_of_the_method(own_registries: None) -> None:
    merge_method("slow", summary="", coefficient="one")(raises(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        MERGE_METHODS["slow"](torch.ones(2, 3))


# Modules that cannot be imported, and names that are taken ----------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_library", r"imports another module that .*'no_such_library'.*bad\.py:1\]"),
        ("x = 1\nx = = 1", r"is not valid Python: invalid syntax \[.*bad\.py:2\]$"),
        ("\nint('x')", r"import fails: ValueError: invalid literal.*\[.*bad\.py:2\]$"),
        ("raise SystemExit('bye')", r"import fails: SystemExit: bye \[.*bad\.py:1\]$"),
    ],
)
def test_the_error_of_a_module_says_what_is_wrong_with_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_registries: None,
    code: str,
    message: str,
) -> None:
    (tmp_path / "bad.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugins_again(monkeypatch, "bad")
    with pytest.raises(UserError, match="names the module bad, .*" + message) as error:
        MERGE_METHODS.lookup("sum")
    assert ("Install" in str(error.value)) == ("no_such_library" in code)


def test_a_file_name_is_no_module_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_registries: None
) -> None:
    load_plugins_again(monkeypatch, "my_methods.py")
    with pytest.raises(UserError, match=r"write the module's name, without `\.py`"):
        MERGE_METHODS.lookup("sum")


DUPLICATES = {
    "svd": "from raytvb import basis_method\n@basis_method('svd', summary='', cost='')\n"
    "def f(vectors, size, generator): ...\n",
    "ties": "from raytvb import merge_method\n"
    "@merge_method('ties', summary='', coefficient='one')\ndef f(vectors): ...\n",
}


@pytest.mark.parametrize("first_used", ["basis", "merge"])
@pytest.mark.parametrize("name", list(DUPLICATES))
def test_the_name_of_a_built_in_method_is_taken_whichever_registry_is_used_first(
    tmp_path: Path, name: str, first_used: str
) -> None:
    (tmp_path / "bad_dup.py").write_text(DUPLICATES[name], encoding="utf-8")
    code = (
        f"from raytvb.maths.{first_used}_registry import {first_used.upper()}_METHODS as methods\n"
        f"from raytvb.errors import UserError\n"
        f"try:\n    methods.lookup('x')\n"
        f"except UserError as error:\n    print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), PLUGINS: "bad_dup"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    kind = "basis" if name == "svd" else "merge"
    assert re.fullmatch(
        rf"RAYTVB_PLUGINS names the module bad_dup, whose import fails: ValueError: two "
        rf"definitions of the {kind} method '{name}': .*{name}\.py:\d+ and .*bad_dup\.py:\d+ "
        rf"\[.*bad_dup\.py:\d+\]\n",
        found.stdout,
    ), found.stdout + found.stderr


def test_the_list_of_methods_prints_nothing_before_an_error(
    own_registries: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PLUGINS, "no_such_module")
    monkeypatch.setattr(MERGE_METHODS, "_complete", False)  # the basis methods are loaded already
    assert main(["methods"]) == 1
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("error: RAYTVB_PLUGINS names the module")


def cell(number: int, factor: int, module: str = "__main__") -> None:
    """Run a cell of a notebook that registers a method."""
    code = (
        "\n" * number + "@merge_method('mine', summary='', coefficient='one')\n"
        f"def mine(vectors): return {factor} * vectors[0]"
    )
    names = {"merge_method": merge_method, "__name__": module}
    exec(compile(code, f"/tmp/ipykernel_1/{number}.py", "exec"), names)


def test_a_cell_that_was_edited_replaces_its_method(own_registries: None) -> None:
    for number in (1, 2):
        cell(number, factor=number)
        assert MERGE_METHODS["mine"](torch.ones(2, 3)).tolist() == [number] * 3
    with pytest.raises(ValueError, match="two definitions of the merge method 'mine'"):
        cell(3, factor=3, module="elsewhere")


class FirstVector:
    def __call__(self, vectors: Tensor) -> Tensor:
        return vectors[0]


def test_the_place_of_functions_that_are_not_plain() -> None:
    here = f"{first.__code__.co_filename}:"
    line = f"{here}{first.__code__.co_firstlineno}"
    assert place_of(partial(partial(first), size=2)) == line
    assert place_of(torch.no_grad()(first)) == line
    assert place_of(FirstVector()) == f"{here}{FirstVector.__call__.__code__.co_firstlineno}"
    assert origin_of(FirstVector()) == f"{__name__}.FirstVector"
    assert "sum" in place_of(torch.sum) and "max" in place_of(max)


def test_methods_may_be_partials_and_objects(own_registries: None) -> None:
    merge_method("object", summary="", coefficient="one")(FirstVector())
    basis_method("partial", summary="", cost="")(partial(first))
    assert MERGE_METHODS["object"](torch.ones(2, 3)).tolist() == [1.0] * 3
    assert raytvb.fit_basis(torch.eye(4), 2, method="partial").size == 2


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_uses_them_in_its_workers(
    plugin: Path, finished: tuple[Path, Store], tmp_path: Path, suite_cache: str
) -> None:
    """The stages after the fine-tunes run in a separate process, which knows of the module only
    from its environment.
    """
    store = tmp_path / "store"
    copy_store(finished[1], store, "basis/", "search/", "evals/", "report/")
    file = write_experiment(tmp_path, str(store), **WITH_OURS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(plugin), PLUGINS: MODULE, "RAYTVB_CACHE": suite_cache}
    command = [sys.executable, "-m", "raytvb", "run", str(file), "--num-cpus", "2"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    addition = json.loads((store / "report" / "summary.json").read_text())["addition"]
    assert {"longest-m1", "longest-m2", "full-median", "longest-m1-median"} <= addition.keys()
    assert set(addition["longest-m2"]["per_task"]) == set(TASKS)


@pytest.mark.parametrize(
    ("error", "is_final"),
    [
        (UserError("wrong"), True),
        (MethodError("wrong"), True),
        (TypeError("wrong"), True),
        (IndexError("wrong"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True),
        (OddError("of some library"), True),
        (StoreKeyError("no such key"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (MemoryError(), False),
        (ConnectionError("reset"), False),
    ],
)
def test_a_trial_is_repeated_only_for_errors_that_may_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, is_final: bool
) -> None:
    class Rounds:
        results = ()

        def __init__(self, *args: Any) -> None:
            pass

        measure_next = raises(error)

    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(tune_trial, "Rounds", Rounds)
    monkeypatch.setattr("ray.tune.report", reports.append)
    service: Any = SimpleNamespace(
        experiment=load_experiment(write_experiment(tmp_path, str(tmp_path / "store"))),
        present=PresentVersions({}, {}, {}, {}, dated=True),
    )
    candidates: list[Any] = [None]
    if not is_final:
        with pytest.raises(type(error)):
            tune_trial.run_trial({"index": 0}, service, candidates, [1])
        return
    tune_trial.run_trial({"index": 0}, service, candidates, [1])
    reason = reports[0]["error"]
    if isinstance(error, UserError | ValueError):
        assert reason == "wrong"
    else:
        assert re.fullmatch(rf"{type(error).__name__}: {error} \[.*extending\.py:\d+\]", reason)


FAILING = """
from pathlib import Path
from raytvb import merge_method

@merge_method("failing", summary="", coefficient="one")
def failing(vectors):
    with Path(__file__).with_name("calls").open("a") as calls:
        calls.write("x")
    raise RuntimeError("cannot be merged")
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_failing_method_is_called_once_and_ends_in_one_message(
    finished: tuple[Path, Store], tmp_path: Path, suite_cache: str
) -> None:
    copy_store(finished[1], tmp_path / "store", "search/", "evals/", "report/")
    (tmp_path / f"{MODULE}.py").write_text(FAILING, encoding="utf-8")
    search = {"sizes": [1], "merges": "failing"}
    file = write_experiment(tmp_path, str(tmp_path / "store"), search=search)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(tmp_path), PLUGINS: MODULE, "RAYTVB_CACHE": suite_cache}
    command = [sys.executable, "-m", "raytvb", "run", str(file), "--num-cpus", "2"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "full-failing: visual.class_embedding: merge method 'failing' (" in run.stderr
    assert "raised RuntimeError: cannot be merged [" in run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    failed = run.stderr.count(": merge method 'failing' (")
    assert len((tmp_path / "calls").read_text()) == failed
