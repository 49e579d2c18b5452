"""`raytvb plan` reads a store and changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from raytvb.cli.main import main
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.freezing import check_frozen, freeze
from raytvb.experiment.parsing import parse_experiment
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
    freeze(store, experiment(folder))
    for prefix in ("base", f"splits/val/{TASKS[0]}"):
        records.commit(store, prefix, identity={}, files={"some.bin": b"x"})
    before = contents(tmp_path)
    describe(experiment(folder, **fields))
    assert contents(tmp_path) == before


def test_plan_of_another_experiments_store_is_refused_and_leaves_it_as_it_is(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "store"
    store = Store(str(folder))
    freeze(store, experiment(folder))
    records.commit(store, f"vectors/{TASKS[0]}", identity={}, files={"some.bin": b"x"})
    before = contents(tmp_path)
    with pytest.raises(UserError, match="seed: stored 0, asked for 1"):
        describe(experiment(folder, seed=1))
    with pytest.raises(UserError, match="belongs to another experiment"):
        check_frozen(store, experiment(folder, seed=1))
    assert "1 done" in describe(experiment(folder, search={"sizes": [1]}))
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
    """A run would delete the base of another experiment here; a report only reads."""
    folder = tmp_path / "store"
    store = Store(str(folder))
    freeze(store, experiment(folder))
    records.commit(store, "base", identity={}, files={"some.bin": b"x"})
    before = contents(folder)
    for url in (folder, tmp_path / "nowhere"):
        file = tmp_path / "experiment.yaml"
        file.write_text(yaml.safe_dump({"store": str(url), "tasks": TASKS, "seed": 1}))
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
