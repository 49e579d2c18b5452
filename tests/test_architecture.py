"""The rooms of the package and the direction of their imports. Every import in the source is
checked, also those inside functions.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import raytvb

PACKAGE = Path(raytvb.__file__).parent

# The lowest first. A module imports from its own room and from rooms before it.
ROOMS = (
    ("errors", "plugins", "maths"),
    ("storage", "suite"),
    ("experiment", "data", "models"),
    ("finetuning", "bases"),
    ("search", "evaluation", "merging"),
    ("report", "orchestration"),
    ("bench", "cli", "__main__"),
)
ORDER = [room for floor in ROOMS for room in floor]
MATHS_LIBRARIES = {"torch", "numpy", "scipy", "sklearn", "optuna"}
NO_MATHS = {"os", "pathlib", "sys", "io", "shutil", "tempfile", "logging", "subprocess", "json"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE = {
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
    "pd.read_pickle",
}


def find_sources(folder: Path) -> dict[str, ast.Module]:
    """Syntax trees by dotted module name below `folder`; a package has its folder's name."""
    trees = {}
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        trees[name.removesuffix("__init__").rstrip(".")] = ast.parse(path.read_text("utf-8"))
    return trees


SOURCES = find_sources(PACKAGE)
MATHS = [module for module in SOURCES if module.split(".")[0] == "maths"]


def room_of(module: str) -> str:
    return module.split(".")[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all imports: `a.b` for `import a.b`, `a.b.c` for `from a.b import c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """Modules of this package that are imported, without the package's name."""
    modules = set()
    for name in imported(tree):
        if room_of(name) == "raytvb":
            inner = name.removeprefix("raytvb").lstrip(".")
            modules.add(inner if inner in SOURCES else inner.rpartition(".")[0])
    return modules


def libraries(tree: ast.AST) -> set[str]:
    """Top-level names of all imported modules of other packages."""
    return {room_of(name) for name in imported(tree)} - {"raytvb"}


def calls(tree: ast.AST) -> set[str]:
    """Dotted names that are called or looked up, such as `torch.load`, and plain called names."""
    attributes = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return attributes | {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}


def users_of(*names: str) -> set[str]:
    """Rooms in which one of these libraries is imported."""
    return {room_of(m) for m, tree in SOURCES.items() if libraries(tree) & set(names)}


def test_every_room_is_listed_once() -> None:
    assert len(ORDER) == len(set(ORDER))
    assert {room_of(module) for module in SOURCES} - {""} == set(ORDER)


@pytest.mark.parametrize("module", [m for m in SOURCES if m])
def test_a_module_imports_from_its_own_room_and_lower_ones(module: str) -> None:
    tree, room = SOURCES[module], room_of(module)
    assert not any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(tree)), "relative"
    allowed = {room, *ORDER[: ORDER.index(room)]}
    assert not {m for m in own_imports(tree) if room_of(m) not in allowed}
    if room not in ("cli", "bench"):
        assert "bench" not in map(room_of, own_imports(tree))


def test_no_circle_of_modules() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for each in sorted(own_imports(SOURCES[module])):
                visit(each, (*path, module))
            done.add(module)

    for module in SOURCES:
        if module:  # the package itself only says where its public names are defined
            visit(module, ())


def test_rooms_hand_nothing_on_that_lives_elsewhere() -> None:
    for module, tree in SOURCES.items():
        if module in ORDER and module not in ("errors", "plugins", "__main__"):
            body = [n for n in tree.body if not isinstance(n, ast.Expr)]
            assert not body, f"{module}/__init__.py has more than a docstring"
            assert ast.get_docstring(tree), module


@pytest.mark.parametrize("module", MATHS)
def test_maths_knows_tensors_only(module: str) -> None:
    assert {room_of(m) for m in own_imports(SOURCES[module])} <= {"errors", "plugins", "maths"}
    used = libraries(SOURCES[module])
    assert not used & NO_MATHS
    assert {n for n in used if n not in sys.stdlib_module_names} <= MATHS_LIBRARIES


@pytest.mark.parametrize("module", MATHS)
def test_maths_reads_prints_and_chooses_no_device(module: str) -> None:
    used = calls(SOURCES[module])
    assert not used & {"print", "open", "input", "torch.cuda.is_available", "torch.device"}
    assert not {name for name in used if name.endswith((".cuda", ".write", ".read_text"))}


def test_only_storage_knows_fsspec_and_only_orchestration_knows_ray() -> None:
    assert users_of("fsspec", "s3fs", "boto3", "botocore", "gcsfs") == {"storage"}
    assert users_of("ray") == {"orchestration"}


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_is_unpickled(module: str) -> None:
    assert not libraries(SOURCES[module]) & UNPICKLERS
    assert not calls(SOURCES[module]) & UNSAFE
    keywords = (
        k.arg for n in ast.walk(SOURCES[module]) if isinstance(n, ast.Call) for k in n.keywords
    )
    assert "allow_pickle" not in set(keywords)


def test_what_the_package_offers_needs_ray_for_running_only() -> None:
    assert set(raytvb._HOMES) == set(raytvb.__all__)
    code = (
        "import sys, raytvb\nassert not {'torch', 'ray'} & set(sys.modules)\n"
        "[getattr(raytvb, n) for n in raytvb.__all__ if n != 'run']\n"
        "assert 'ray' not in sys.modules\nraytvb.run\nassert 'ray' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jobs_are_thin_entry_points_of_the_command_line() -> None:
    jobs = find_sources(PACKAGE.parent / "jobs")
    assert jobs
    for name, tree in jobs.items():
        assert {room_of(m) for m in own_imports(tree)} <= {"cli"}, name
        assert libraries(tree) <= {"sys", "pathlib", "os", "__future__"}, name
        assert not any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.walk(tree)), name


def test_the_reader_of_imports_sees_all_forms() -> None:
    tree = ast.parse(
        "import ray.tune as t\nfrom raytvb import suite, errors\n"
        "def f():\n    from raytvb.suite.domains import DOMAINS\n"
        "    import raytvb.storage.store\n    torch.load(x)\n    print(1)\n"
    )
    assert libraries(tree) == {"ray"}
    assert own_imports(tree) == {"suite", "errors", "suite.domains", "storage.store"}
    assert {"torch.load", "print"} <= calls(tree)
