"""The experiment file: its defaults, the errors that it reports, and whether each message says what
to do.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment, half, quarter
from raytvb.experiment.fields import TINY_MODEL
from raytvb.experiment.identities import base_identity
from raytvb.experiment.layout import EXPERIMENT, EXPERIMENTS
from raytvb.experiment.parsing import load_experiment, parse_experiment
from raytvb.experiment.present_experiments import (
    check_model,
    present_experiments,
    record_experiment,
    store_metrics,
    stored_experiment,
)
from raytvb.experiment.sections.evaluate import DisentanglementConfig, UnseenConfig
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.maths.basis_registry import BASIS_METHODS
from raytvb.maths.merge_registry import compared_merges
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.store import Store
from raytvb.suite.task_names import CONTROL, SHOWCASE, TEMPLATES, task_names

TASKS = list(SHOWCASE[:8])
SAMPLE = """
name: clip-b32-8
store: s3://bucket/clip-b32-8
model: {name: ViT-B-32, pretrained: openai}
tasks:
  - {name: mnist, data: "s3://sets/mnist"}
  - {name: svhn, data: "s3://sets/svhn", image_column: img, label_column: digit}
  - {name: dtd, data: /data/dtd, classes: [banded, blotchy], templates: ["a {} texture."]}
  - {name: group/cars, data: "https://host/cars"}
talos: {density: 0.1, rounds: 4, mask: shared}
finetune: {epochs: 10, lr: 1e-5, batch_size: 128}
basis: {method: ae}
search: {sizes: [2, 4, 8], objective: subsets, coefficients: {low: 0.0, high: 1.5}}
resources: {gpus_per_task: 0.5, max_retries: 20}
"""


def experiment(**fields: Any) -> Experiment:
    return parse_experiment({"store": "runs/one", "tasks": TASKS, **fields})


def section(identity: JsonObject, name: str) -> JsonObject:
    fields = identity[name]
    assert isinstance(fields, dict)
    return fields


def refusal(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse_experiment({"store": "runs/one", "tasks": TASKS, **fields}, "file.yaml")
    assert str(caught.value).startswith("file.yaml: ")
    return str(caught.value)


def test_the_sample_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(SAMPLE, encoding="utf-8")
    made = load_experiment(path)
    assert (made.model.name, made.model.pretrained) == ("ViT-B-32", "openai")
    assert made.task_names == ("mnist", "svhn", "dtd", "group/cars")
    assert [t.data for t in made.tasks[:2]] == ["s3://sets/mnist", "s3://sets/svhn"]
    assert made.tasks[1].image_column == "img" and made.tasks[1].label_column == "digit"
    assert made.tasks[2].classes == ("banded", "blotchy") and made.tasks[2].prompts == (
        "a {} texture.",
    )
    assert made.finetune.lr == 1e-5 and made.basis.method == ("ae",)
    assert made.search.sizes == (2, 4) and made.search.coefficients.high == 1.5
    assert made.evaluate.control is None  # the embedded control belongs to the embedded model
    assert (made.resources.gpus_per_task, made.resources.max_retries) == (0.5, 20)


def test_the_smallest_file_gets_every_default() -> None:
    made = experiment()
    assert made.task_names == tuple(TASKS) and made.seed == 0
    assert made.talos.density == 0.1 and made.talos.mask == "shared" and made.talos.rounds == 4
    assert made.search.sizes == (2, 4) and made.search.objective == "subsets"
    assert made.evaluate.control is not None and made.evaluate.control.name == CONTROL
    assert made.finetune.lr is not None and made.finetune.lr > 1e-5
    assert made.tasks[0].prompts == TEMPLATES


@pytest.mark.parametrize("count", [1, 2, 3, 6, 8, 16])
def test_the_default_sizes_are_a_quarter_and_half_of_the_tasks(count: int) -> None:
    sizes = experiment(tasks=list(SHOWCASE[:count])).search.sizes
    assert (
        set(sizes)
        == {quarter(count), half(count)}
        == {max(1, round(count / 4)), max(1, round(count / 2))}
    )
    assert list(sizes) == sorted(set(sizes)) and all(1 <= m <= count for m in sizes)


def test_given_sizes_are_sorted_and_unique() -> None:
    assert experiment(search={"sizes": [4, 2, 4, 1]}).search.sizes == (1, 2, 4)


def test_the_default_learning_rate_depends_on_the_model_and_the_mask() -> None:
    rates = {
        key: experiment(talos=talos).finetune.lr
        for key, talos in {
            "dense": {"density": 1.0},
            "shared": {"mask": "shared"},
            "per-task": {"mask": "per-task"},
        }.items()
    }
    assert len(set(rates.values())) == 3 and all(r is not None and r > 1e-5 for r in rates.values())
    assert experiment(model={"name": "ViT-B-32", "pretrained": "openai"}).finetune.lr == 1e-5
    assert experiment(finetune={"lr": 0.125}).finetune.lr == 0.125


def test_a_given_control_stays() -> None:
    control = experiment(evaluate={"control": "glyphs/latin-noise"}).evaluate.control
    assert control is not None and control.name == "glyphs/latin-noise"
    own = {"name": "imagenet", "data": "/data/imagenet"}
    made = experiment(model={"name": "ViT-B-32", "pretrained": "openai"}, evaluate={"control": own})
    assert made.evaluate.control is not None and made.evaluate.control.data == "/data/imagenet"


@pytest.mark.parametrize(
    ("text", "rate"), [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("0.001", 1e-3), ("2", 2.0)]
)
def test_numbers_mean_what_they_say_in_yaml(tmp_path: Path, text: str, rate: float) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(f"store: here\ntasks: [{TASKS[0]}]\nfinetune: {{lr: {text}}}\n")
    assert load_experiment(path).finetune.lr == rate


def test_one_basis_method_or_a_list_of_them() -> None:
    assert experiment(basis={"method": "ae"}).basis.method == ("ae",)
    assert experiment(basis={"method": ["svd", "ae", "svd"]}).basis.method == ("svd", "ae")
    assert experiment(basis={"method": list(BASIS_METHODS)}).basis.method == tuple(BASIS_METHODS)
    message = refusal(basis={"method": ["ae", "aee", "nmf"]})
    assert "basis" in message and "aee, nmf" in message and all(m in message for m in BASIS_METHODS)
    assert "none given" in refusal(basis={"method": []})


UNKNOWN = [
    ({"stroe": "x"}, "stroe", "store", "resources"),
    ({"model": {"nme": "x"}}, "model.nme", "name", "pretrained"),
    (
        {"tasks": [TASKS[0], {"name": "a", "data": "/a", "label_colum": "x"}]},
        "tasks[1].label_colum",
        "label_column",
        "templates",
    ),
    ({"talos": {"densty": 0.1}}, "talos.densty", "density", "damping"),
    ({"finetune": {"epoch": 1}}, "finetune.epoch", "epochs", "warmup"),
    ({"basis": {"methods": "ae"}}, "basis.methods", "method", "method"),
    ({"search": {"size": [1]}}, "search.size", "sizes", "objective"),
    ({"search": {"coefficients": {"hihg": 1}}}, "search.coefficients.hihg", "high", "low"),
    ({"evaluate": {"kep": 0.9}}, "evaluate.kep", "keep", "control"),
    (
        {"evaluate": {"control": {"name": "a", "dta": "/a"}}},
        "evaluate.control.dta",
        "data",
        "image_column",
    ),
    (
        {"evaluate": {"unseen": {"tasks": ["glyphs/clean"], "shot": 4}}},
        "evaluate.unseen.shot",
        "shots",
        "lr",
    ),
    (
        {"evaluate": {"unseen": [{"name": "a", "dta": "/a"}]}},
        "evaluate.unseen.tasks[0].dta",
        "data",
        "image_column",
    ),
    (
        {"evaluate": {"disentanglement": {"pair": []}}},
        "evaluate.disentanglement.pair",
        "pairs",
        "points",
    ),
    (
        {"search": {"coefficients": {"strateg": "grid"}}},
        "search.coefficients.strateg",
        "strategy",
        "vector",
    ),
    ({"resources": {"gpu_per_task": 1}}, "resources.gpu_per_task", "gpus_per_task", "max_retries"),
]


@pytest.mark.parametrize(
    ("fields", "path", "meant", "allowed"), UNKNOWN, ids=[u[1] for u in UNKNOWN]
)
def test_an_unknown_field_is_named_with_what_is_allowed(
    fields: dict[str, Any], path: str, meant: str, allowed: str
) -> None:
    message = refusal(**fields)
    assert f"{path}: unknown field (did you mean {meant}?); allowed: " in message
    listed = message.split("allowed: ")[1].splitlines()[0].split(", ")
    assert meant in listed and allowed in listed and path.split(".")[-1] not in listed


def test_an_unknown_task_is_named_with_its_near_matches() -> None:
    message = refusal(tasks=[*TASKS, "glyphs/greek-blurr"])
    assert (
        "tasks[8]" in message
        and "'glyphs/greek-blurr'" in message
        and "did you mean glyphs/greek-blur" in message
    )
    far = refusal(tasks=[*TASKS, "zzz"])
    assert "'zzz'" in far and "did you mean" not in far and "data:" in far


WRONG = [
    ({"talos": {"density": 0}}, "talos.density", "above 0 and at most 1", "0"),
    ({"talos": {"density": 1.5}}, "talos.density", "above 0 and at most 1", "1.5"),
    ({"talos": {"mask": "both"}}, "talos.mask", "'shared' or 'per-task'", "'both'"),
    ({"talos": {"rounds": 0}}, "talos.rounds", "from 1 to 1,000", "0"),
    ({"talos": {"damping": -0.1}}, "talos.damping", "from 0 to 1", "-0.1"),
    ({"talos": {"draws": 0}}, "talos.draws", "'exact'", "0"),
    ({"finetune": {"lr": -1e-3}}, "finetune.lr", "above 0", "-0.001"),
    ({"finetune": {"lr": float("nan")}}, "finetune.lr", "a number above 0", "nan"),
    ({"finetune": {"epochs": 0}}, "finetune.epochs", "above 0", "0"),
    ({"finetune": {"epochs": "many"}}, "finetune.epochs", "number", "'many'"),
    (
        {"finetune": {"warmup": 1.5}},
        "finetune",
        "a share below 1, or a whole number of steps",
        "1.5",
    ),
    (
        {"finetune": {"accumulate": 9, "batch_size": 8}},
        "finetune",
        "at most 8, the batch_size",
        "9",
    ),
    ({"finetune": {"label_smoothing": 1.0}}, "finetune.label_smoothing", "below 1", "1.0"),
    (
        {"tasks": [{"name": "a", "data": "/a", "splits": {"val": 1.5}}]},
        "tasks[0].splits",
        "between 0 and 1",
        "1.5",
    ),
    (
        {"tasks": [{"name": "a", "data": "/a", "splits": {"val": 0.5, "test": 0.5}}]},
        "tasks[0].splits",
        "nothing",
        "",
    ),
    (
        {"tasks": [{"name": "a", "data": "/a", "splits": {"val": "x", "test": "x"}}]},
        "tasks[0].splits",
        "same",
        "x",
    ),
    (
        {"tasks": [{"name": "a", "data": "/a", "root": "/b"}]},
        "tasks[0]",
        "only with `data: torchvision:NAME`",
        "",
    ),
    ({"tasks": ["clip9"]}, "tasks[0]", "no preset (clip8, clip14, clip20, imagenet)", "clip9"),
    ({"tasks": {"preset": "clip9"}}, "tasks", "there are clip8, clip14, clip20, imagenet", "clip9"),
    ({"tasks": [{"preset": "clip8", "name": "a"}]}, "tasks", "names its tasks itself", "clip8"),
    ({"tasks": {"preset": ["clip8"]}}, "tasks: unknown preset", "there are clip8", "['clip8']"),
    ({"tasks": {"preset": "clip8", "data": 5}}, "tasks", "data is a URL", "5"),
    ({"tasks": {"preset": "clip8", 5: 6}}, "tasks[0]", "the name of a field is text", "5"),
    ({"tasks": 5}, "tasks[0]", "the name of a task or of a preset", "5"),
    ({"finetune": {"batch_size": 1.5}}, "finetune.batch_size", "a whole number", "1.5"),
    ({"search": {"sizes": [2, 0]}}, "search.sizes[1]", "from 1 to 1,000,000", "0"),
    (
        {"search": {"objective": "best"}},
        "search.objective",
        "'subsets', 'all' or 'single'",
        "'best'",
    ),
    (
        {"search": {"coefficients": {"low": 1.0, "high": 1.0}}},
        "search.coefficients",
        "low (1.0) must be below",
        "1.0",
    ),
    (
        {"search": {"coefficients": {"low": 4.5}}},
        "search.coefficients",
        "low (4.5) must be below high (4.0)",
        "4.5",
    ),
    (
        {"search": {"coefficients": {"points": 1}}},
        "search.coefficients.points",
        "from 2 to 10,000",
        "1",
    ),
    (
        {"search": {"coefficients": {"strategy": "all"}}},
        "search.coefficients.strategy",
        "'line' or 'grid'",
        "'all'",
    ),
    (
        {"search": {"coefficients": {"vector": "yes"}}},
        "search.coefficients.vector",
        "'per-task' or 'per-basis'",
        "yes",
    ),
    (
        {"search": {"coefficients": {"trials": 0}}},
        "search.coefficients.trials",
        "from 1 to 100,000",
        "0",
    ),
    ({"search": {"tolerance": -0.01}}, "search.tolerance", "at least 0 and below 1", "-0.01"),
    ({"search": {"tolerance": 1.0}}, "search.tolerance", "below 1", "1.0"),
    (
        {"search": {"shares": [0.5, 0.25, 1.0]}},
        "search",
        "shares must rise and end with 1.0",
        "[0.5, 0.25, 1.0]",
    ),
    (
        {"search": {"shares": [0.5, 0.5, 1.0]}},
        "search",
        "shares must rise and end with 1.0",
        "[0.5, 0.5, 1.0]",
    ),
    (
        {"search": {"shares": [0.25, 0.5]}},
        "search",
        "shares must rise and end with 1.0",
        "[0.25, 0.5]",
    ),
    ({"search": {"shares": []}}, "search", "shares must rise and end with 1.0", "[]"),
    ({"search": {"shares": [0.0, 1.0]}}, "search.shares[0]", "above 0", "0.0"),
    ({"search": {"shares": [0.5, 2.0]}}, "search.shares[1]", "at most 1", "2.0"),
    ({"search": {"lengths": "task"}}, "search.lengths", "'auto', 'projected' or 'own'", "'task'"),
    ({"search": {"keep": 0.0}}, "search.keep", "above 0", "0.0"),
    ({"search": {"random_subsets": 0}}, "search.random_subsets", "from 1 to 1,000", "0"),
    ({"search": {"merges": ["ties", "tis"]}}, "search", "merges: tis; allowed: ", "tsv-m"),
    ({"search": {"merges": ["ties", "ties"]}}, "search", "merges: a method is given twice", "ties"),
    ({"search": {"merges": ["sum"]}}, "search", "merges: sum; allowed: ", "ties"),
    ({"search": {"merges": ["fisher"]}}, "search", "merges: fisher; allowed: ", "ties"),
    (
        {"basis": {"prepare": "trim"}},
        "basis.prepare",
        "'none', 'trimmed', 'dropped' or 'sparsified'",
        "'trim'",
    ),
    (
        {"evaluate": {"precision": "fp16"}},
        "evaluate.precision",
        "'auto', 'fp32' or 'bf16'",
        "'fp16'",
    ),
    (
        {"evaluate": {"control": "clip8"}},
        "evaluate.control",
        "control: give a single task, not a preset of several",
        "",
    ),
    (
        {"evaluate": {"control": {"preset": "clip9"}}},
        "evaluate.control: unknown preset",
        "there are clip8, clip14, clip20, imagenet",
        "clip9",
    ),
    (
        {"evaluate": {"additions": [[]]}},
        "evaluate.additions",
        "give different tasks of the experiment",
        "[]",
    ),
    (
        {"evaluate": {"additions": [TASKS[:2], ["a"]]}},
        "evaluate.additions",
        "give different tasks",
        "unknown: a",
    ),
    (
        {"evaluate": {"additions": [[TASKS[0]] * 2]}},
        "evaluate.additions",
        "give different tasks",
        TASKS[0],
    ),
    ({"evaluate": {"unseen": []}}, "evaluate.unseen.tasks", "at least 1 item", "[]"),
    ({"evaluate": {"unseen": ["nope"]}}, "evaluate.unseen.tasks[0]", "unknown task 'nope'", ""),
    (
        {"evaluate": {"unseen": [TASKS[3]]}},
        "evaluate.unseen.tasks",
        "these tasks have vectors",
        TASKS[3],
    ),
    (
        {"evaluate": {"unseen": ["glyphs/clean"] * 2}},
        "evaluate.unseen.tasks",
        "the same name is given twice",
        "",
    ),
    (
        {"evaluate": {"unseen": {"tasks": ["glyphs/clean"], "shots": 0}}},
        "evaluate.unseen.shots",
        "from 1 to 1,000,000",
        "0",
    ),
    (
        {"evaluate": {"disentanglement": {"pairs": [[TASKS[0], "a"]]}}},
        "evaluate.disentanglement.pairs",
        "give different tasks",
        "unknown: a",
    ),
    (
        {"evaluate": {"disentanglement": {"pairs": [[TASKS[0]] * 2]}}},
        "evaluate.disentanglement.pairs",
        "give different tasks",
        TASKS[0],
    ),
    (
        {"evaluate": {"disentanglement": {"low": 2.0}}},
        "evaluate.disentanglement",
        "low (2.0) must be below high",
        "",
    ),
    (
        {"evaluate": {"disentanglement": {"points": 1}}},
        "evaluate.disentanglement.points",
        "from 2 to 200",
        "1",
    ),
    ({"evaluate": {"keep": 1.1}}, "evaluate.keep", "at most 1", "1.1"),
    ({"evaluate": {"control": "nope"}}, "evaluate.control", "unknown task 'nope'", "nope"),
    (
        {"resources": {"gpus_per_task": 1.5}},
        "resources",
        "fractions below 1 and whole numbers above",
        "1.5",
    ),
    (
        {"resources": {"max_retries": -1}},
        "resources.max_retries",
        "from 0 to 1,000,000",
        "-1",
    ),
    ({"tasks": [TASKS[0], TASKS[1], TASKS[0]]}, "tasks", "more than once", TASKS[0]),
    ({"tasks": []}, "tasks", "at least 1", "[]"),
    ({"tasks": [TASKS[0], {"data": "/a"}]}, "tasks[1].name", "required", ""),
    (
        {"tasks": [TASKS[0], {"name": "../a", "data": "/a"}]},
        "tasks[1].name",
        "letters a-z, digits",
        "'../a'",
    ),
    (
        {"tasks": [{"name": n, "data": "/a"} for n in ("a", "a/b")]},
        "tasks",
        "folder of another",
        "",
    ),
    (
        {"tasks": [TASKS[0], {"name": "a", "data": "/a", "templates": ["a photo"]}]},
        "tasks[1]",
        "exactly one {}",
        "'a photo'",
    ),
    ({"store": ""}, "store", "it is blank", ""),
    ({"seed": -1}, "seed", "at least 0 and below 2,147,483,648", "-1"),
    ({"name": "a b"}, "name", "letters a-z, digits", "'a b'"),
]


@pytest.mark.parametrize(("fields", "path", "rule", "given"), WRONG)
def test_a_wrong_value_is_named_with_its_path_and_the_rule(
    fields: dict[str, Any], path: str, rule: str, given: str
) -> None:
    lines = [
        line for line in refusal(**fields).removeprefix("file.yaml: ").splitlines() if rule in line
    ]
    assert lines and lines[0].strip().startswith(path) and given in lines[0]


PAPER = {
    "Cars": 35,
    "DTD": 76,
    "EuroSAT": 12,
    "GTSRB": 11,
    "MNIST": 5,
    "RESISC45": 15,
    "SVHN": 4,
    "SUN397": 14,
}


@pytest.mark.parametrize("asked", ["clip8", ["clip8"], {"preset": "clip8"}, [{"preset": "clip8"}]])
def test_a_preset_is_its_tasks_with_the_epochs_of_the_paper(asked: Any) -> None:
    made = parse_experiment(
        {"store": "/s", "tasks": asked, "model": {"name": "ViT-B-32", "pretrained": "openai"}}
    )
    assert {t.name: t.epochs for t in made.tasks} == PAPER
    assert all(t.data and t.data.startswith("hf://datasets/") and t.templates for t in made.tasks)
    assert made.tasks[3].classes and len(made.tasks[3].classes) == 43


def test_presets_grow_mix_with_other_tasks_and_may_lie_elsewhere() -> None:
    sizes = {
        n: parse_experiment({"store": "/s", "tasks": [f"clip{n}"]}).task_names for n in (8, 14, 20)
    }
    assert {n: len(names) for n, names in sizes.items()} == {8: 8, 14: 14, 20: 20}
    assert sizes[20][:14] == sizes[14] and sizes[14][:8] == sizes[8] == tuple(PAPER)
    made = parse_experiment(
        {
            "store": "/s",
            "tasks": [
                {"preset": "clip14", "data": "s3://b/clip/", "epochs": 2, "max_corrupt": 0},
                TASKS[0],
            ],
        }
    )
    assert [t.data for t in made.tasks[:2]] == ["s3://b/clip/Cars", "s3://b/clip/DTD"] and len(
        made.tasks
    ) == 15
    assert {t.epochs for t in made.tasks} == {2, None} and {t.max_corrupt for t in made.tasks} == {
        0,
        10,
    }
    with pytest.raises(UserError, match="given more than once: Cars"):
        parse_experiment(
            {"store": "/s", "tasks": [{"preset": "clip8"}, {"name": "Cars", "data": "/cars"}]}
        )


def test_every_wrong_field_is_listed_at_once() -> None:
    message = refusal(talos={"density": 2, "rounds": 0}, finetune={"lr": -1}, stroe="x")
    assert all(p in message for p in ("talos.density", "talos.rounds", "finetune.lr", "stroe"))


def test_a_missing_store_is_named() -> None:
    with pytest.raises(UserError, match="store: this field is required"):
        parse_experiment({"tasks": TASKS})


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_a_file_that_holds_no_fields_is_refused(values: Any) -> None:
    with pytest.raises(UserError, match="expected fields like"):
        parse_experiment(values)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml: there is no such file"):
        load_experiment(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("store: [unclosed\n")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML"):
        load_experiment(broken)
    broken.write_bytes(b"store: \xff\xfe\n")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML"):
        load_experiment(broken)
    broken.write_text("talos: {density: 7}\n")
    with pytest.raises(UserError, match=r"broken\.yaml: [\s\S]*talos\.density"):
        load_experiment(broken)


def test_overrides_replace_top_level_fields(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(f"store: here\nseed: 3\ntasks: [{TASKS[0]}]\n")
    made = load_experiment(path, {"store": "there", "tasks": TASKS[:2]})
    assert made.store == "there" and made.seed == 3 and made.task_names == tuple(TASKS[:2])


HEAVY = ("torch", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "pyarrow", "open_clip", "ray")


@pytest.mark.parametrize("text", [SAMPLE, "store: s\ntasks: [glyphs/greek-blr]\nseach: {}\n"])
def test_a_file_is_checked_without_heavy_imports(tmp_path: Path, text: str) -> None:
    path = tmp_path / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    code = (
        "import sys\n"
        "from raytvb.errors import UserError\n"
        "from raytvb.experiment.parsing import load_experiment\n"
        "try:\n"
        "    load_experiment(sys.argv[1]).identity()\n"
        "except UserError as error:\n"
        "    assert 'did you mean glyphs/greek-blur' in str(error)\n"
        f"assert not set({HEAVY}) & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_every_field_of_a_file_has_a_help_text() -> None:
    def check(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            text = field.description or ""
            assert text[:1].strip() and text.endswith((".", "…")), f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)

    for model in (Experiment, TaskConfig, UnseenConfig, DisentanglementConfig):
        check(model)


def test_an_experiment_cannot_be_changed() -> None:
    made = experiment()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, "seed", 1)  # noqa: B010
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made.finetune, "lr", 1.0)  # noqa: B010


def test_the_identity_has_what_is_computed_and_not_where() -> None:
    base = experiment().identity()
    assert not {"store", "resources", "name"} & base.keys()
    same = experiment(
        store="s3://bucket/else", name="other", resources={"gpus_per_task": 1.0, "max_retries": 0}
    )
    assert same.identity() == base
    for change in (
        {"seed": 1},
        {"tasks": TASKS[:7]},
        {"talos": {"density": 0.2}},
        {"finetune": {"epochs": 3}},
        {"basis": {"method": "svd"}},
        {"search": {"sizes": [3]}},
        {"evaluate": {"keep": 0.9}},
    ):
        assert experiment(**change).identity() != base, change


def test_the_identity_has_the_defaults_filled_in_and_reads_back() -> None:
    made = experiment()
    identity = made.identity()
    assert section(identity, "finetune")["lr"] == made.finetune.lr
    assert section(identity, "search")["sizes"] == [2, 4]
    assert parse_experiment({"store": "else", **identity}).identity() == identity


def test_the_differing_fields_of_two_identities_are_shown() -> None:
    stored = experiment().identity()
    asked = experiment(seed=5, talos={"density": 0.2}, search={"sizes": [1]}).identity()
    assert records.differences(stored, stored) == []
    lines = records.differences(stored, asked)
    assert "seed: stored 0, asked for 5" in lines
    assert "talos.density: stored 0.1, asked for 0.2" in lines
    assert "search.sizes: stored [2, 4], asked for [1]" in lines and len(lines) == 3


def test_a_field_that_one_side_has_not_is_a_difference() -> None:
    assert records.differences({"a": {"b": 1}}, {"a": {}}) == ["a.b: stored 1, asked for None"]
    assert records.differences({"a": [1, 2]}, {"a": {"b": 1}}) == [
        "a: stored [1, 2], asked for {'b': 1}"
    ]


def test_half_and_quarter_are_at_least_one() -> None:
    assert [half(t) for t in (1, 2, 3, 5, 8, 264)] == [1, 1, 2, 2, 4, 132]
    assert [quarter(t) for t in (1, 2, 3, 6, 8, 264)] == [1, 1, 1, 2, 2, 66]


def test_differing_lists_of_tasks_are_compared_by_name() -> None:
    a, b, c = ({"name": n, "data": None} for n in "abc")
    assert records.differences({"tasks": [a, b]}, {"tasks": [a, c]}) == [
        "tasks: b stored only",
        "tasks: c asked for only",
    ]
    assert records.differences({"tasks": [a, b]}, {"tasks": [a, {**b, "data": "x"}]}) == [
        "tasks[b].data: stored None, asked for 'x'"
    ]
    assert records.differences({"tasks": [a, b]}, {"tasks": [b, a]}) == [
        "tasks: stored in the order a, b, asked for b, a"
    ]


def test_negation_can_be_left_out_on_the_embedded_model() -> None:
    control = experiment().control
    assert control is not None and control.name == CONTROL
    for evaluate in ({"control": "none"}, {"negation": False}):
        made = experiment(evaluate=evaluate)
        assert (
            made.control is None
            and parse_experiment({"store": "x", **made.identity()}).control is None
        )


def test_an_error_within_a_task_is_the_only_one_about_the_tasks() -> None:
    message = refusal(tasks=[{"name": "mine", "data": "/d", "clases": ["a"]}])
    assert "did you mean classes?" in message and "at least 1 item" not in message
    assert "at least 1 item" in refusal(tasks=[])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"tasks": [{"name": "mine", "data": "/d", "classes": []}]},
            "classes: give at least one name, and each name once",
        ),
        (
            {"tasks": [{"name": "mine", "data": "/d", "classes": ["a", "a"]}]},
            "classes: give at least one name",
        ),
        (
            {"model": {"name": "glyphs-tiny", "pretrained": "openai"}},
            "glyphs-tiny brings its own weights",
        ),
        (
            {"finetune": {"epochs": float("inf")}},
            "finetune.epochs: found inf; allowed: a number above 0",
        ),
    ],
)
def test_values_that_make_no_sense(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(**fields)


def test_sizes_above_the_number_of_tasks_are_that_number() -> None:
    assert experiment(search={"sizes": [2, 8, 100]}).search.sizes == (2, 8)


def test_the_defaults_of_search_and_evaluation() -> None:
    made = experiment()
    search, evaluate = made.search, made.evaluate
    assert (search.shares, search.keep, search.tolerance, search.random_subsets, search.merges) == (
        (0.25, 1.0),
        0.5,
        None,
        1,
        (),
    )
    assert (search.coefficients.strategy, search.coefficients.vector, search.lengths) == (
        "line",
        "none",
        "auto",
    )
    assert (evaluate.precision, evaluate.additions, evaluate.unseen, evaluate.disentanglement) == (
        "auto",
        (),
        None,
        None,
    )
    assert made.basis.prepare == "none" and made.unseen == () and made.pairs == ()


def test_one_value_stands_for_a_list_of_it() -> None:
    search = experiment(search={"merges": "ties", "sizes": 3, "shares": 1}).search
    assert (search.merges, search.sizes, search.shares) == (("ties",), (3,), (1.0,))
    merges = compared_merges()
    assert experiment(search={"merges": merges}).search.merges == tuple(merges)
    assert {"ties", "dare", "mean", "tsv-m", "iso-c"} <= set(merges) and not {
        "sum",
        "fisher",
    } & set(merges)
    evaluate = experiment(evaluate={"unseen": "glyphs/clean"}).evaluate
    assert evaluate.unseen is not None and [t.name for t in evaluate.unseen.tasks] == [
        "glyphs/clean"
    ]


def test_all_that_can_be_asked_of_a_search_and_evaluation_reads_back() -> None:
    asked: dict[str, dict[str, Any]] = {
        "basis": {"method": "svd", "prepare": "trimmed"},
        "search": {
            "tolerance": 0.01,
            "shares": [0.1, 0.5, 1.0],
            "keep": 0.25,
            "random_subsets": 3,
            "merges": ["ties"],
            "coefficients": {"strategy": "grid", "points": 5, "vector": "per-task", "trials": 7},
        },
        "evaluate": {
            "control": {"preset": "imagenet", "root": "/data/imagenet"},
            "precision": "bf16",
            "additions": [TASKS[:2], TASKS[3:6]],
            "unseen": {"tasks": ["glyphs/clean"], "shots": 2},
            "disentanglement": {"pairs": [TASKS[:2], TASKS[2:4]], "points": 3},
        },
    }
    made = experiment(**asked)
    identity = made.identity()
    again = parse_experiment({"store": "else", **identity})
    assert again.identity() == identity and again.pairs == made.pairs == (
        tuple(TASKS[:2]),
        tuple(TASKS[2:4]),
    )
    for field in ("basis", "search", "evaluate"):
        for name in asked[field]:
            changed = experiment(
                **{**asked, field: {k: v for k, v in asked[field].items() if k != name}}
            )
            assert changed.identity() != identity, name


def test_the_control_may_be_imagenet_with_its_archives() -> None:
    for control in (
        "imagenet",
        {"preset": "imagenet"},
        {"preset": "imagenet", "root": "/data/imagenet"},
    ):
        made = experiment(
            model={"name": "ViT-B-32", "pretrained": "openai"}, evaluate={"control": control}
        ).control
        assert made is not None and (made.name, made.data) == ("ImageNet", "torchvision:ImageNet")
        assert made.root == (control.get("root") if isinstance(control, dict) else None)
        assert len(made.prompts) == 7 and made.splits.val == 0.2 and made.splits.test == 0.7
    there = experiment(evaluate={"control": {"preset": "imagenet", "data": "s3://b/sets/"}}).control
    assert there is not None and there.data == "s3://b/sets/ImageNet"


def test_unseen_tasks_may_be_a_preset() -> None:
    made = experiment(
        evaluate={"unseen": {"tasks": [{"preset": "clip8", "data": "/clip"}, "glyphs/clean"]}}
    )
    assert [t.name for t in made.unseen] == [*PAPER, "glyphs/clean"]
    assert made.unseen[0].data == "/clip/Cars"


def test_without_a_control_the_rest_can_be_asked_for_as_with_one() -> None:
    asked = {"unseen": ["glyphs/clean"], "disentanglement": True, "additions": [TASKS[:2]]}
    for control in ({"control": "none"}, {"negation": False}):
        made = experiment(evaluate={**control, **asked})
        assert made.control is None and [t.name for t in made.unseen] == ["glyphs/clean"]
        assert made.pairs == ((TASKS[0], TASKS[1]),)


def test_pairs_are_the_first_two_tasks_unless_they_are_given() -> None:
    assert experiment(evaluate={"disentanglement": True}).pairs == ((TASKS[0], TASKS[1]),)
    assert experiment(evaluate={"disentanglement": {"points": 3}}).pairs == ((TASKS[0], TASKS[1]),)
    assert experiment(tasks=TASKS[:1], evaluate={"disentanglement": True}).pairs == ()
    assert experiment(evaluate={"disentanglement": {"pairs": [TASKS[4:6]]}}).pairs == (
        tuple(TASKS[4:6]),
    )


UNSEEN = list(task_names()[20:22])


@pytest.mark.parametrize(
    ("evaluate", "val", "train", "test"),
    [
        ({"control": "none"}, [], [], []),
        ({"control": CONTROL}, [CONTROL], [], [CONTROL]),
        ({"control": TASKS[1]}, [], [], []),
        ({"control": CONTROL, "unseen": UNSEEN}, [CONTROL], UNSEEN, [CONTROL, *UNSEEN]),
        ({"control": CONTROL, "negation": False, "unseen": UNSEEN}, [], UNSEEN, UNSEEN),
        ({"control": UNSEEN[1], "unseen": UNSEEN}, [UNSEEN[1]], UNSEEN, [UNSEEN[1], UNSEEN[0]]),
        ({"control": TASKS[0], "unseen": UNSEEN}, [], UNSEEN, UNSEEN),
    ],
)
def test_which_tasks_need_images_of_which_split(
    evaluate: dict[str, Any], val: list[str], train: list[str], test: list[str]
) -> None:
    made = experiment(evaluate=evaluate)
    found = {s: [t.name for t in made.tasks_with(s)] for s in ("train", "val", "test")}
    assert found == {"train": [*TASKS, *train], "val": [*TASKS, *val], "test": [*TASKS, *test]}
    assert [t.name for t in made.every_task] == found["test"]
    for split in found:
        assert made.tasks_with(split)[:8] == made.tasks


# What a store is used for -------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def by_name(name: str = "experiment") -> str:
    """Key of the latest version of an experiment."""
    return f"{EXPERIMENTS}/{name}/{records.RECORD}"


def test_a_new_store_has_what_was_asked_and_the_same_changes_nothing(store: Store) -> None:
    made = experiment()
    assert stored_experiment(store) is None and present_experiments(store) == {}
    record_experiment(store, made, grows=True)
    assert store.keys() == [EXPERIMENT, by_name(), records.RECORD]
    assert yaml.safe_load(store.read(EXPERIMENT)) == made.identity() == stored_experiment(store)
    record = records.find(store, "")
    assert record is not None and record.identity == made.identity()
    written = {key: store.read(key) for key in store.keys()}
    for grows in (False, True):
        record_experiment(store, experiment(resources={"max_retries": 1}), grows=grows)
        assert {key: store.read(key) for key in store.keys()} == written


def test_a_store_knows_the_latest_version_of_each_experiment(store: Store) -> None:
    first, other = experiment(name="one"), experiment(name="two", tasks=TASKS[:3], seed=1)
    again = experiment(name="one", tasks=TASKS[:5])
    for each in (first, other, again):
        record_experiment(store, each, grows=True)
        assert stored_experiment(store) == each.identity()
    assert present_experiments(store) == {"one": again.identity(), "two": other.identity()}
    assert store_metrics(store).name == "one"
    assert store.keys() == [EXPERIMENT, by_name("one"), by_name("two"), records.RECORD]


def test_the_store_that_vectors_are_taken_from_is_recorded(store: Store, tmp_path: Path) -> None:
    library = str(tmp_path / "library")
    record_experiment(store, experiment(), grows=True)
    assert store_metrics(store).vectors is None
    record_experiment(store, experiment(vectors=library), grows=False)
    assert store_metrics(store).vectors == library
    assert stored_experiment(store) == experiment().identity()


RESULTS = [
    {"search": {"sizes": [1, 3], "keep": 0.25}},
    {"search": {"objective": "all"}},
    {"basis": {"method": "svd"}},
    {"evaluate": {"control": "none"}},
    {"evaluate": {"unseen": "glyphs/clean", "precision": "bf16"}},
]
VECTORS: list[dict[str, Any]] = [
    {"seed": 1},
    {"tasks": TASKS[:7]},
    {"tasks": [*TASKS[1:], "glyphs/clean"]},
    {"talos": {"density": 0.2}},
    {"finetune": {"epochs": 3}},
    {"basis": {"prepare": "trimmed"}},
    {"basis": {"online": True}},
]
OTHER_MODEL: list[tuple[dict[str, Any], str]] = [
    (
        {"name": "ViT-B-32", "pretrained": "openai"},
        "model.pretrained: stored None, asked for 'openai'",
    ),
    (
        {"name": "local-dir:/models/mine"},
        f"model.name: stored {TINY_MODEL!r}, asked for 'local-dir:/models/mine'",
    ),
]


def with_base(store: Store) -> None:
    """A store that holds the experiment's pretrained model, and nothing made with it."""
    record_experiment(store, experiment(), grows=True)
    records.commit(store, "base", identity=base_identity(experiment()), files={"some.bin": b"x"})
    for prefix in (f"splits/val/{TASKS[0]}", f"heads/{TASKS[0]}"):
        records.commit(store, prefix, identity={}, files={"some.bin": b"x"})
    store.write(f"vectors/{TASKS[0]}/head.safetensors", b"x")


def with_vectors(store: Store) -> list[str]:
    """A store that holds results of the experiment."""
    with_base(store)
    records.commit(store, f"vectors/{TASKS[0]}", identity={}, files={"some.bin": b"x"})
    return store.keys()


@pytest.mark.parametrize("fields", [*RESULTS, *VECTORS])
def test_everything_but_the_model_may_change(store: Store, fields: dict[str, Any]) -> None:
    keys = with_vectors(store)
    for asked in (experiment(**fields), experiment()):
        check_model(store, asked)
        record_experiment(store, asked, grows=True)
        assert yaml.safe_load(store.read(EXPERIMENT)) == asked.identity()
        assert stored_experiment(store) == asked.identity() and store.keys() == keys
        assert present_experiments(store) == {"experiment": asked.identity()}


def model_of(fields: dict[str, Any]) -> Experiment:
    return experiment(model=fields, search={"sizes": [1]})


@pytest.mark.parametrize(("fields", "line"), OTHER_MODEL)
@pytest.mark.parametrize("made", [f"vectors/{TASKS[0]}", "masks/shared", "basis/svd-m2"])
def test_the_model_of_what_is_stored_may_not_change(
    store: Store, fields: dict[str, Any], line: str, made: str
) -> None:
    with_base(store)
    records.commit(store, made, identity={}, files={"some.bin": b"x"})
    keys = store.keys()
    problem = "belongs to another pretrained model"
    with pytest.raises(UserError, match=problem) as caught:
        check_model(store, model_of(fields))
    lines = str(caught.value).splitlines()
    assert f"  {line}" in lines and not any("search" in each for each in lines)
    with pytest.raises(UserError, match=problem):
        record_experiment(store, model_of(fields), grows=True)
    assert yaml.safe_load(store.read(EXPERIMENT)) == experiment().identity()
    assert store.keys() == keys


@pytest.mark.parametrize(("fields", "line"), OTHER_MODEL)
def test_a_store_without_vectors_is_given_to_another_model(
    store: Store, fields: dict[str, Any], line: str
) -> None:
    with_base(store)
    check_model(store, model_of(fields))
    record_experiment(store, model_of(fields), grows=True)
    assert store.keys() == [EXPERIMENT, by_name(), records.RECORD]
    assert yaml.safe_load(store.read(EXPERIMENT)) == model_of(fields).identity()


@pytest.mark.parametrize("fields", VECTORS)
def test_the_pretrained_model_stays_for_other_vectors(store: Store, fields: dict[str, Any]) -> None:
    with_base(store)
    keys = store.keys()
    record_experiment(store, experiment(**fields), grows=True)
    assert store.keys() == keys


# Stores of earlier formats ------------------------------------------------------------------------


def of_the_first_format(store: Store) -> JsonObject:
    """A store with vectors whose experiment is only a file, of before vectors were prepared."""
    with_vectors(store)
    stored = experiment().identity()
    del section(stored, "basis")["prepare"]
    store.delete(EXPERIMENTS)
    store.delete(records.RECORD)
    store.write(EXPERIMENT, yaml.safe_dump(stored).encode())
    return stored


def test_a_store_of_before_vectors_were_prepared_is_one_of_vectors_as_they_are(
    store: Store,
) -> None:
    """Its results still count, as the vectors that they were measured on are the present ones."""
    stored = of_the_first_format(store)
    assert present_experiments(store) == {"": stored}
    record_experiment(store, experiment(), grows=False)
    assert yaml.safe_load(store.read(EXPERIMENT)) == experiment().identity()
    assert not store_metrics(store).dated


@pytest.mark.parametrize("fields", RESULTS)
def test_results_of_earlier_formats_count_while_the_vectors_are_the_same(
    store: Store, fields: dict[str, Any]
) -> None:
    of_the_first_format(store)
    for asked in (experiment(**fields), experiment()):
        record_experiment(store, asked, grows=False)
        assert not store_metrics(store).dated and stored_experiment(store) == asked.identity()


@pytest.mark.parametrize("fields", [{}, *VECTORS])
def test_results_of_earlier_formats_do_not_count_once_the_vectors_have_changed(
    store: Store, fields: dict[str, Any]
) -> None:
    """They stay so, also after the old experiment has come back: what they were measured on is not
    known any more.
    """
    of_the_first_format(store)
    record_experiment(store, experiment(**fields), grows=not fields)
    assert store_metrics(store).dated
    record_experiment(store, experiment(), grows=False)
    assert store_metrics(store).dated
    assert present_experiments(store) == {"experiment": experiment().identity()}
