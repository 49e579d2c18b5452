"""The direction of the dependencies, read from the source: every import, also those inside of functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import raytvb

PACKAGE = Path(raytvb.__file__).parent

# The lowest first: a module imports from layers on earlier lines only, never from its own or a later one.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("errors", ("errors",)),
    ("pure maths", ("task_vector", "fisher", "talos", "sparse", "factor", "mixes")),
    ("pure maths: convex bases", ("simplex",)),
    ("pure maths: merge methods", ("methods", "selection", "coefficients")),
    ("pure maths: bases", ("basis",)),
    ("pure maths: online bases", ("online",)),
    ("embedded suite: drawings", ("suite.sources",)),
    ("embedded suite: degradations", ("suite.domains",)),
    ("embedded suite: tasks", ("suite",)),
    ("embedded suite: how its model was made", ("suite.pretrain",)),
    ("storage: files", ("store",)),
    ("storage: records", ("records",)),
    ("storage: masks", ("masks",)),
    ("storage: vectors", ("vectors",)),
    ("storage: what is made of vectors", ("gram", "basis_files", "block_cache", "gram_state", "directions")),
    ("tasks of the literature", ("presets",)),
    ("experiment file", ("config",)),
    ("models", ("encoder",)),
    ("images", ("images",)),
    ("splits of images", ("data",)),
    ("training and measuring", ("finetune", "evaluate")),
    ("few images", ("fewshot",)),
    ("contents of a store", ("artifacts", "rows", "split_cache")),
    ("what a search compares", ("candidates",)),
    ("bodies of the Ray tasks", ("workers",)),
    ("body of a search trial", ("trials",)),
    ("bodies of the evaluations", ("operations",)),
    ("which evaluations there are", ("evaluations",)),
    ("shares of the coordinates", ("shards",)),
    ("online bases in a store", ("online_basis",)),
    ("body of the Ray actor", ("basis_actor",)),
    ("Ray: jobs", ("submit",)),
    ("Ray: connection", ("connect",)),
    ("Ray: tasks and actors", ("remote",)),
    ("progress of a run", ("progress",)),
    ("Ray: search", ("search",)),
    ("summary", ("summary",)),
    ("what is shown and handed out", ("report", "merge", "bench", "spectrum")),
    ("benchmarks", ("bench_arrivals", "bench_basis", "bench_gram", "bench_search")),
    ("dry run", ("plan",)),
    ("Ray: pipeline", ("pipeline",)),
    ("what the package offers", ("",)),
    ("command line", ("cli",)),
    ("python -m raytvb", ("__main__",)),
)
RANK = {module: rank for rank, (_, modules) in enumerate(LAYERS) for module in modules}
MATHS = tuple(module for name, modules in LAYERS if name.startswith("pure maths") for module in modules)
USES_RAY = {"remote", "search", "pipeline", "connect", "submit"}
USES_FSSPEC = {"store"}
MATHS_LIBRARIES = {"torch", "numpy", "scipy", "sklearn", "optuna"}
NO_MATHS = {"os", "pathlib", "sys", "io", "shutil", "tempfile", "logging", "subprocess", "json", "importlib"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def find_sources(folder: Path) -> dict[str, ast.Module]:
    """Syntax trees by module name below the package; the package itself is ''."""
    trees = {}
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        trees[name.removesuffix("__init__").rstrip(".")] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


SOURCES = find_sources(PACKAGE)


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported: `a.b` for `import a.b`, `a.b.c` for `from a.b import c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """Modules of this package that are imported, without the package's name."""
    found = set()
    for name in imported(tree):
        if name.split(".")[0] == "raytvb":
            inner = name.removeprefix("raytvb").lstrip(".")
            found.add(inner if inner in SOURCES else inner.rpartition(".")[0])
    return found


def libraries(tree: ast.AST) -> set[str]:
    """Top-level names of everything else that is imported."""
    return {name.split(".")[0] for name in imported(tree)} - {"raytvb"}


def calls(tree: ast.AST) -> set[str]:
    """Dotted names of all that is called or referred to by attribute, such as `torch.load`, and plain called names."""
    attributes = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return attributes | {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}


def test_every_module_is_in_exactly_one_layer() -> None:
    listed = [module for _, modules in LAYERS for module in modules]
    assert len(listed) == len(set(listed))
    assert set(SOURCES) - set(listed) == set(), "modules that are in no layer: give each a line in LAYERS"
    assert set(listed) - set(SOURCES) == set(), "layers name modules that do not exist"


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_from_lower_layers_only(module: str) -> None:
    assert not any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(SOURCES[module])), "relative import"
    wrong = {name for name in own_imports(SOURCES[module]) if RANK[name] >= RANK[module]}
    assert not wrong, f"{module} (layer {LAYERS[RANK[module]][0]!r}) imports {sorted(wrong)}"


@pytest.mark.parametrize("module", MATHS)
def test_pure_maths_imports_maths_and_errors_only(module: str) -> None:
    assert own_imports(SOURCES[module]) <= {"errors", *MATHS}
    used = libraries(SOURCES[module])
    assert not used & NO_MATHS
    third_party = {name for name in used if name not in sys.stdlib_module_names}
    assert third_party <= MATHS_LIBRARIES


@pytest.mark.parametrize("module", MATHS)
def test_pure_maths_reads_prints_and_chooses_no_device(module: str) -> None:
    used = calls(SOURCES[module])
    assert not used & {"print", "open", "input", "torch.save", "torch.load", "torch.cuda.is_available", "torch.device"}
    assert not {name for name in used if name.endswith((".cuda", ".write", ".read_text"))}


def test_only_the_store_knows_fsspec() -> None:
    users = {m for m, tree in SOURCES.items() if libraries(tree) & {"fsspec", "s3fs", "boto3", "botocore", "gcsfs"}}
    assert users == USES_FSSPEC


def test_only_the_edge_knows_ray() -> None:
    assert {m for m, tree in SOURCES.items() if "ray" in libraries(tree)} == USES_RAY


def test_what_workers_run_reaches_no_ray() -> None:
    """The bodies of Ray tasks and actors, and all that they import, work where there is no Ray."""
    reached, todo = set(), ["workers", "operations", "basis_actor", "shards"]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += own_imports(SOURCES[module])
    assert {"store", "vectors", "finetune", "talos"} <= reached
    assert not reached & USES_RAY


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_is_unpickled(module: str) -> None:
    assert not libraries(SOURCES[module]) & UNPICKLERS
    used = calls(SOURCES[module])
    assert not used & {"torch.load", "torch.save", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
                       "eval", "exec", "pd.read_pickle"}
    given = {k.arg for n in ast.walk(SOURCES[module]) if isinstance(n, ast.Call) for k in n.keywords}
    assert "allow_pickle" not in given


def test_what_the_package_offers_needs_ray_for_running_only() -> None:
    assert set(raytvb._HOMES) == set(raytvb.__all__)
    code = ("import sys, raytvb\nassert not {'torch', 'ray'} & set(sys.modules)\n"
            "[getattr(raytvb, n) for n in raytvb.__all__ if n != 'run']\nassert 'ray' not in sys.modules\n"
            "raytvb.run\nassert 'ray' in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jobs_are_thin_entry_points_of_the_command_line() -> None:
    jobs = find_sources(PACKAGE.parent / "jobs")
    assert jobs
    for name, tree in jobs.items():
        assert own_imports(tree) <= {"cli"}, name
        assert libraries(tree) <= {"sys", "pathlib", "os", "__future__"}, name
        assert not any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.walk(tree)), name


def test_the_reader_of_imports_sees_all_forms() -> None:
    tree = ast.parse("import ray.tune as t\nfrom raytvb import suite, errors\ndef f():\n    from raytvb.suite.domains "
                     "import DOMAINS\n    import raytvb.store\n    torch.load(x)\n    print(1)\n")
    assert libraries(tree) == {"ray"}
    assert own_imports(tree) == {"suite", "errors", "suite.domains", "store"}
    assert {"torch.load", "print"} <= calls(tree)
