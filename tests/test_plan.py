"""`raytvb plan` reads a store and changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from raytvb.cli.main import main
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import base_identity, mask_identity, vector_identity
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.present_experiments import record_experiment
from raytvb.orchestration.plan import describe
from raytvb.storage import records
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError

TASKS = ["glyphs/greek-blur", "glyphs/latin-fog"]


def experiment(store: Path | str, **fields: object) -> Experiment:
    return parse_experiment({"store": str(store), "tasks": TASKS, **fields})


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification times of a folder and of everything below it, and the bytes of all files."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        data = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (path.stat().st_mtime_ns, data)
    return found


def test_plan_of_a_store_that_is_not_there_makes_no_folder(tmp_path: Path) -> None:
    lines = describe(experiment(tmp_path / "deep" / "store"))
    assert f"{tmp_path}/deep/store: writable" in lines and "2 tasks, 0 done" in lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"search": {"sizes": [1]}, "basis": {"method": ["svd"]}},
        {"seed": 1},
        {"model": {"name": "ViT-B-32", "pretrained": "openai"}},
    ],
)
def test_plan_leaves_a_store_without_vectors_as_it_is(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    """A plan changes nothing, even where a run would write the experiment again or delete another
    model's base.
    """
    folder = tmp_path / "store"
    store = Store(str(folder))
    record_experiment(store, experiment(folder), grows=True)
    base = base_identity(experiment(folder))
    for prefix, identity in (("base", base), (f"splits/val/{TASKS[0]}", {})):
        records.commit(store, prefix, identity=identity, files={"some.bin": b"x"})
    before = contents(tmp_path)
    describe(experiment(folder, **fields))
    assert contents(tmp_path) == before


def with_a_vector(folder: Path, fingerprint: str = "bits") -> Store:
    """A store with the vector of the first task, made as `experiment(folder)` asks."""
    store, asked = Store(str(folder)), experiment(folder)
    record_experiment(store, asked, grows=True)
    records.commit(store, "base", identity=base_identity(asked))
    records.commit(
        store,
        "masks/shared",
        identity=mask_identity(asked, asked.tasks),
        parents={"mask": "bits"},
    )
    records.commit(
        store,
        f"vectors/{TASKS[0]}",
        identity=vector_identity(asked, asked.tasks[0]),
        files={"vector.safetensors": b"x"},
        parents={"mask": fingerprint},
    )
    return store


def plan_lines(asked: Experiment, kind: str) -> list[str]:
    """The lines of a plan that begin with this word."""
    lines = []
    for line in describe(asked).splitlines():
        word, _, rest = line.partition(" ")
        if word == kind:
            lines.append(rest.strip())
    return lines


def test_plan_says_what_would_be_made_again_and_why(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with_a_vector(folder)
    before = contents(tmp_path)
    assert plan_lines(experiment(folder), "run") == [
        f"2 task vectors: 1 kept, 1 new ({TASKS[1]})",
        f"shared mask kept ({folder}/masks/shared)",
        "1 bases: 1 made (ae-m1)",
    ] and not plan_lines(experiment(folder), "asks")
    other = experiment(folder, finetune={"epochs": 3})
    differing = f"{TASKS[0]}: finetune.epochs: stored 10.0, asked for 3.0"
    assert "2 tasks, 0 done" in describe(other)
    assert plan_lines(other, "run")[:2] == [
        f"2 task vectors: 1 new ({TASKS[1]}), 1 made again ({TASKS[0]})",
        f"made again: {differing}",
    ]
    assert plan_lines(other, "asks") == [
        f"1 task vector will be made again, in place of what is stored: {TASKS[0]}",
        differing,
    ]
    assert "1 done" in describe(experiment(folder, search={"sizes": [1]}))
    assert contents(tmp_path) == before


def test_plan_of_other_tasks_names_what_is_kept_new_and_unused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with_a_vector(folder)
    asked = experiment(folder, tasks=[TASKS[1], "glyphs/clock-blur"])
    lines = plan_lines(asked, "run")
    assert lines[0] == f"2 task vectors: 2 new ({TASKS[1]}, glyphs/clock-blur)"
    assert f"1 stored vectors are not in this experiment, and stay: {TASKS[0]}" in lines
    mask = f"shared mask kept ({folder}/masks/shared); it was not scored on glyphs/clock-blur"
    assert mask in lines and not plan_lines(asked, "asks")


def test_plan_says_that_a_task_may_just_have_another_name(tmp_path: Path) -> None:
    """Also if no vector would be kept or made again."""
    folder = tmp_path / "store"
    own, density = {"data": "/data", "classes": ["a", "b"]}, {"talos": {"density": 1.0}}
    asked = experiment(folder, tasks=[{"name": "old", **own}], **density)
    store = Store(str(folder))
    record_experiment(store, asked, grows=True)
    identity = vector_identity(asked, asked.tasks[0])
    records.commit(store, "vectors/old", identity=identity, files={"vector.safetensors": b"x"})
    renamed = experiment(folder, tasks=[{"name": "new", **own}], **density)
    (question,) = plan_lines(renamed, "asks")
    assert question.startswith("task new has no vector, but old, which the experiment does not")
    other = experiment(folder, tasks=[{"name": "new", **own, "epochs": 3}], **density)
    assert not plan_lines(other, "asks")
    assert "1 stored vectors are not in this experiment, and stay: old" in plan_lines(other, "run")


def test_plan_of_a_store_with_another_shared_mask_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with_a_vector(folder)
    before = contents(tmp_path)
    for fields, line in (
        ({"seed": 1}, "seed: stored 0, asked for 1"),
        ({"talos": {"density": 0.2}}, "talos.density: stored 0.1, asked for 0.2"),
    ):
        with pytest.raises(UserError, match="was made with other settings") as caught:
            describe(experiment(folder, **fields))
        assert f"  {line}" in str(caught.value).splitlines()
        assert "run --renew mask" in str(caught.value)
    assert contents(tmp_path) == before


def test_plan_of_a_vector_on_another_mask_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with_a_vector(folder, fingerprint="other")
    assert (
        f"made again: {TASKS[0]}: mask: trained on another mask than {folder}/masks/shared"
        in plan_lines(experiment(folder), "run")
    )


def test_plan_of_another_models_store_is_refused_and_leaves_it_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with_a_vector(folder)
    before = contents(tmp_path)
    model = {"name": "ViT-B-32", "pretrained": "openai"}
    with pytest.raises(UserError, match="belongs to another pretrained model"):
        describe(experiment(folder, model=model))
    assert contents(tmp_path) == before


def test_plan_of_a_store_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file, not a folder"):
        describe(experiment(tmp_path / "file" / "store"))


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_plan_of_a_store_that_could_not_be_made_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="access denied"):
        describe(experiment(tmp_path / "store"))


@pytest.mark.s3
def test_plan_of_a_store_elsewhere_says_that_it_answers(s3_environment: str) -> None:
    url = f"{s3_environment}/plan"
    assert f"{url}: reachable" in describe(experiment(url))
    assert Store(url).keys() == []


@pytest.mark.s3
def test_plan_of_a_bucket_that_does_not_exist_is_refused(s3_environment: str) -> None:
    Store(s3_environment).check_reachable()
    assert Store(s3_environment).keys() == []
    with pytest.raises(StoreError, match="bucket does not exist"):
        Store("s3://no-such-bucket/x").check_reachable()


def test_a_report_changes_nothing_in_a_store_without_results(tmp_path: Path) -> None:
    """A run would delete the base of another model here; a report only reads."""
    folder = tmp_path / "store"
    store = Store(str(folder))
    record_experiment(store, experiment(folder), grows=True)
    base = base_identity(experiment(folder))
    records.commit(store, "base", identity=base, files={"some.bin": b"x"})
    before = contents(folder)
    for url in (folder, tmp_path / "nowhere"):
        file = tmp_path / "experiment.yaml"
        for fields in ({"seed": 1}, {"model": {"name": "ViT-B-32", "pretrained": "openai"}}):
            file.write_text(yaml.safe_dump({"store": str(url), "tasks": TASKS, **fields}))
            assert main(["report", str(file)]) == 1
    assert contents(folder) == before
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("damaged", [b"a: [", b"- a", b"", b"\xff\xfe\x00"])
@pytest.mark.parametrize("command", ["plan", "report"])
def test_a_damaged_experiment_in_a_store_is_named(
    tmp_path: Path, damaged: bytes, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "experiment.yaml").write_bytes(damaged)
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump({"store": str(store), "tasks": TASKS}))
    main([command, str(file)])
    message = capsys.readouterr()
    assert f"{store}/experiment.yaml is damaged" in message.out + message.err
