"""The stream of vectors into the Gram matrix and the bases, in this process and with actors that
die.
"""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from committed_vectors import commit, experiment, filled, mask, vector_key
from safetensors.torch import load_file
from torch import Tensor
from vector_files import problems_of

from raytvb.bases.builder import BasisBuilder
from raytvb.bases.messages import BuilderStatus, CacheUse, WrittenBases
from raytvb.bases.spectrum import spectrum_of
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import vector_prefix
from raytvb.experiment.metrics import BasisMetrics
from raytvb.experiment.stored import load_coefficients, load_gram
from raytvb.maths.basis_fit import fit_basis, task_errors
from raytvb.orchestration.ray_actors import basis_actors
from raytvb.storage import records
from raytvb.storage.gram_state import GramState
from raytvb.storage.records import RECORD
from raytvb.storage.store import Store
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vectors import vector_bytes, vector_info
from raytvb.suite.task_names import task_names


def tasks_in(asked: Experiment) -> list[str]:
    """The tasks whose vectors are in the stored Gram matrix, in the order of their arrival."""
    return GramState.read(Store(asked.store)).tasks


def test_it_answers_at_any_moment(tmp_path: Path) -> None:
    asked, V = filled(tmp_path, 6)
    builder = BasisBuilder(asked)
    order = [4, 0, 2, 5, 1, 3]
    for n, index in enumerate(order, 1):
        status = builder.add([asked.task_names[index]])
        assert status.vectors == n and not status.failed
        assert status.cache == CacheUse("memory", n * 4 * mask().kept)
        part = V[:, order[:n]]
        spectrum = spectrum_of(Store(asked.store), "svd", 2)
        assert spectrum.tasks == tuple(asked.task_names[i] for i in order[:n])
        energy = torch.linalg.svdvals(part) ** 2
        assert spectrum.share == pytest.approx((energy / energy.sum()).tolist(), abs=1e-6)
        if n > 2:
            assert spectrum.fit is not None
            fit = fit_basis(GramState.read(Store(asked.store)).gram, 2, method="svd")
            rebuilt = part @ fit.B @ fit.W
            floor = float(energy[2:].sum() / energy.sum())
            assert status.floor[2] == pytest.approx(floor, rel=1e-5)
            errors = ((rebuilt - part) ** 2).sum(0) / (part**2).sum(0)
            for name, error in zip(spectrum.tasks, errors.tolist(), strict=True):
                assert spectrum.fit.per_task[name] == pytest.approx(error, rel=1e-4)
    torch.testing.assert_close(
        builder.gram(), V.T @ V, rtol=1e-6, atol=1e-6 * float((V.T @ V).max())
    )
    stored = load_gram(Store(asked.store), asked)
    assert stored is not None and torch.equal(builder.gram(), stored)


def test_before_the_first_vector(tmp_path: Path) -> None:
    builder = BasisBuilder(experiment(str(tmp_path), 3))
    assert builder.status() == BuilderStatus()
    with pytest.raises(UserError, match="has no Gram matrix yet"):
        spectrum_of(Store(str(tmp_path)))
    with pytest.raises(ValueError, match="not taken in yet"):
        builder.write_bases()
    failed = builder.add([task_names()[0]]).failed
    assert "has not been committed" in failed[task_names()[0]]


def test_order_batches_and_repeats_change_no_bit(tmp_path: Path) -> None:
    asked, _ = filled(tmp_path / "one", 5)
    names, made = list(asked.task_names), []
    for number, order in enumerate(itertools.islice(itertools.permutations(names), 0, 120, 29)):
        other = asked.model_copy(update={"store": str(tmp_path / f"order-{number}")})
        for index in range(5):
            commit(other, index)
        builder = BasisBuilder(other)
        builder.add(order[:number])
        builder.add(order[:2] * 2)
        builder.add(order)
        made.append(builder.gram())
    assert all(torch.equal(g, made[0]) for g in made)


def test_a_builder_that_died_goes_on_and_nothing_is_read_twice(tmp_path: Path) -> None:
    asked, V = filled(tmp_path, 40, search={"sizes": [2]})
    straight = BasisBuilder(asked)
    straight.add(asked.task_names)
    expected = straight.gram()
    Store(asked.store).delete("gram")
    for task in asked.task_names:  # a new builder for each call: the state is in the store
        builder = BasisBuilder(asked)
        assert task not in tasks_in(asked)
        builder.add([task])
    again = BasisBuilder(asked)
    assert tasks_in(asked) == list(asked.task_names) and torch.equal(again.gram(), expected)
    before = {k: (tmp_path / k).stat().st_mtime_ns for k in Store(asked.store).keys("gram")}
    again.add(asked.task_names)
    assert again.status().cache.bytes == 0  # known vectors are not fetched
    changed = [
        k
        for k in Store(asked.store).keys("gram")
        if k != "gram/owner.json" and (tmp_path / k).stat().st_mtime_ns != before.get(k)
    ]
    assert changed == []
    assert (expected - V.T @ V).abs().max() < 1e-5 * (V.T @ V).max()


def test_a_vector_that_was_made_again_replaces_its_row(tmp_path: Path) -> None:
    asked, V = filled(tmp_path, 4)
    builder = BasisBuilder(asked)
    builder.add(asked.task_names)
    V[:, 1] = commit(asked, 1, seed=1234)
    builder.add(asked.task_names)
    torch.testing.assert_close(builder.gram(), V.T @ V, rtol=1e-5, atol=1e-3)
    fresh = BasisBuilder(asked)
    assert torch.equal(fresh.gram(), builder.gram()) and fresh.status().vectors == 4


def test_a_stale_twin_reads_what_was_written_before_it_writes(tmp_path: Path) -> None:
    asked, V = filled(tmp_path, 4)
    old = BasisBuilder(asked)
    old.add(asked.task_names[:2])
    new = BasisBuilder(asked)
    old.add(asked.task_names[2:3])  # no vector was taken from it yet
    new.add(asked.task_names[3:])
    assert tasks_in(asked) == list(asked.task_names)
    V[:, 0] = commit(asked, 0, seed=55)
    assert old.add(asked.task_names).vectors == 4
    V[:, 1] = commit(asked, 1, seed=56)
    assert new.add(asked.task_names).vectors == 4
    V[:, 2] = commit(asked, 2, seed=57)
    assert old.add(asked.task_names[2:3]).vectors == 4
    state = GramState.read(Store(asked.store))
    assert sorted(state.tasks) == sorted(asked.task_names)
    torch.testing.assert_close(state.ordered(asked.task_names), V.T @ V, rtol=1e-5, atol=1e-3)


def test_bases_are_the_products_and_records_come_last(tmp_path: Path) -> None:
    asked, V = filled(tmp_path, 5)
    builder = BasisBuilder(asked)
    builder.add(asked.task_names)
    store = Store(asked.store)
    done = builder.write_bases()
    assert sorted(done.names) == ["ae-anchored-m2", "ae-m2", "svd-m2"] and done.notes == ()
    assert builder.write_bases() == WrittenBases()
    for name in ("ae-anchored-m2", "ae-m2", "svd-m2"):
        B, W = load_coefficients(store, name)
        record = store.read_json(f"basis/{name}/{RECORD}")
        S = torch.cat([rows for _, rows in StoredBasis(store, f"basis/{name}").blocks()], dim=1).T
        torch.testing.assert_close(S.double(), V @ B, rtol=1e-5, atol=1e-5)
        loss = ((V @ B @ W - V) ** 2).sum() / (V**2).sum()
        assert record["metrics"]["relative_error"] == pytest.approx(float(loss), rel=1e-4)
        assert record["metrics"]["convex"] == name.startswith("ae")
        index = json.loads(store.read(f"basis/{name}/basis.safetensors.index.json"))
        loaded = load_file(store.path(f"basis/{name}/{index['weight_map']['visual.a']}"))
        assert loaded["visual.a"].shape == (2, int(mask().tensors()["visual.a"].sum()))
    assert problems_of(store) == []


def test_sizes_beyond_the_rank_give_the_exact_basis_with_a_note(tmp_path: Path) -> None:
    asked = experiment(
        str(tmp_path), 6, search={"sizes": [2, 4, 6]}, basis={"method": ["ae", "svd"]}
    )
    columns = [commit(asked, i, seed=i % 3) for i in range(6)]  # three different vectors
    builder = BasisBuilder(asked)
    builder.add(asked.task_names)
    done = builder.write_bases()
    assert any("rank 3" in note for note in done.notes)
    assert any("not below the 6 vectors" in note for note in done.notes)
    V, store = torch.stack(columns, 1), Store(asked.store)
    for name, most in (("ae-m4", 3), ("svd-m4", 3), ("ae-m6", 6)):
        B, W = load_coefficients(store, name)
        assert B.shape[1] <= most
        torch.testing.assert_close(V @ B @ W, V, rtol=1e-5, atol=1e-4)


def test_metrics_in_the_records_of_bases(tmp_path: Path) -> None:
    """Only online bases have bounds; JSON has no infinity, so an infinite condition is null."""
    asked, _ = filled(tmp_path, 4, basis={"method": "svd", "online": True})
    builder = BasisBuilder(asked)
    builder.add(asked.task_names)
    builder.write_bases()
    fields = {"tasks", "vectors", "convex", "relative_error", "floor", "condition"}
    store = Store(asked.store)
    offline = store.read_json(f"basis/svd-m2/{RECORD}")["metrics"]
    online = store.read_json(f"basis/svd-m2-online/{RECORD}")["metrics"]
    assert offline.keys() == fields and online.keys() == fields | {"error_bounds"}
    assert offline["condition"] >= 1 and online["condition"] is None
    metrics = BasisMetrics.from_json(offline, "a record")
    assert metrics.to_json() == offline
    infinite = metrics.model_copy(update={"condition": math.inf})
    assert infinite.to_json() == {**offline, "condition": None}


def damage(asked: Experiment, index: int) -> Path:
    path = Path(Store(asked.store).path(vector_key(asked.task_names[index])))
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("bad", [0, 2])
def test_a_damaged_vector_is_named_and_the_rest_goes_on(tmp_path: Path, bad: int) -> None:
    asked, V = filled(tmp_path, 4)
    path = damage(asked, bad)
    builder = BasisBuilder(asked)
    failed = builder.add(asked.task_names).failed
    assert list(failed) == [asked.task_names[bad]] and str(path) in failed[asked.task_names[bad]]
    assert "is not as its record says" in failed[asked.task_names[bad]]
    good = [i for i in range(4) if i != bad]
    assert tasks_in(asked) == [asked.task_names[i] for i in good]
    with pytest.raises(ValueError, match=f"not taken in yet: {asked.task_names[bad]}"):
        builder.write_bases()
    V[:, bad] = commit(asked, bad)
    assert builder.add(asked.task_names).failed == {}
    torch.testing.assert_close(builder.gram(), V.T @ V, rtol=1e-5, atol=1e-3)


def test_truncated_and_strange_vectors_are_named(tmp_path: Path) -> None:
    asked, _ = filled(tmp_path, 5)
    store = Store(asked.store)
    names = asked.task_names
    path = Path(store.path(vector_key(names[0])))
    path.write_bytes(path.read_bytes()[:-40])
    values = torch.randn(mask().kept)
    values[3] = float("inf")
    commit(asked, 1, values=values)
    data = vector_bytes({"visual.a": torch.zeros(5)}, vector_info("other-base"))
    records.commit(store, vector_prefix(names[2]), identity={}, files={"vector.safetensors": data})
    failed = BasisBuilder(asked).add(names).failed
    assert set(failed) == set(names[:3])
    assert "is not as its record says" in failed[names[0]] and names[0] in failed[names[0]]
    assert "NaN or infinite values in visual.a" in failed[names[1]] and names[1] in failed[names[1]]
    assert names[2] in failed[names[2]]
    assert "different" in failed[names[2]]


def test_an_online_basis_follows_the_tasks_in_their_order(tmp_path: Path) -> None:
    asked, V = filled(
        tmp_path, 7, basis={"method": ["svd", "ae-anchored", "pca"], "online": True, "buffer": 2}
    )
    store = Store(asked.store)
    order = [3, 0, 1, 6, 2, 5, 4]  # the order in which the fine-tunes end
    for index in order:  # a new builder for each task
        BasisBuilder(asked).add([asked.task_names[index]])
    BasisBuilder(asked).write_bases()
    other = asked.model_copy(update={"store": str(tmp_path / "other")})
    for index in range(7):
        commit(other, index)
    builder = BasisBuilder(other)
    builder.add(other.task_names)
    builder.write_bases()
    assert not store.exists("basis/pca-m2-online/record.json")
    for name in ("svd-m2-online", "ae-anchored-m2-online"):
        left, right = (
            s.read_json(f"basis/{name}/{RECORD}")["files"] for s in (store, Store(other.store))
        )
        assert left == right
        H, W = load_coefficients(store, name)
        S = torch.cat([rows for _, rows in StoredBasis(store, f"basis/{name}").blocks()], dim=1).T
        torch.testing.assert_close(S.double(), V @ H, rtol=1e-4, atol=1e-4)
        record = store.read_json(f"basis/{name}/{RECORD}")["metrics"]
        error = ((V @ H @ W - V) ** 2).sum(0).sqrt() / V.norm(dim=0)
        assert record["relative_error"] == pytest.approx(
            float(((V @ H @ W - V) ** 2).sum() / (V**2).sum()), rel=1e-4
        )
        offline = store.read_json(f"basis/{name.removesuffix('-online')}/{RECORD}")["metrics"][
            "relative_error"
        ]
        assert offline * (1 - 1e-6) <= record["relative_error"] <= 1.3 * offline
        for task, true in zip(asked.task_names, error.tolist(), strict=True):
            assert true <= record["error_bounds"][task] * (1 + 1e-5)
    S = V @ load_coefficients(store, "ae-anchored-m2-online")[0]
    W = load_coefficients(store, "ae-anchored-m2-online")[1]
    torch.testing.assert_close((S @ W).sum(1), V.sum(1), rtol=1e-5, atol=1e-5)
    # Incremental SVD of the explicit vectors, two at a time, as Brand writes it.
    U, s = torch.zeros(len(V), 0).double(), torch.zeros(0).double()
    for start in range(0, 7, 2):
        U, s, _ = torch.linalg.svd(
            torch.cat([U * s, V[:, start : start + 2]], dim=1), full_matrices=False
        )
        U, s = U[:, :2], s[:2]
    found = V @ load_coefficients(store, "svd-m2-online")[0]
    Q = torch.linalg.qr(found)[0]
    torch.testing.assert_close(Q @ Q.T, U @ U.T, rtol=0, atol=1e-5)


def test_an_online_basis_starts_anew_where_a_vector_changed(tmp_path: Path) -> None:
    asked, _ = filled(tmp_path, 4, basis={"method": "svd", "online": True})
    builder = BasisBuilder(asked)
    builder.add(asked.task_names[:3])
    commit(asked, 1, seed=77)
    builder.add(asked.task_names)
    builder.write_bases()
    other = asked.model_copy(update={"store": str(tmp_path / "other")})
    for index in range(4):
        commit(other, index, seed=77 if index == 1 else None)
    fresh = BasisBuilder(other)
    fresh.add(other.task_names)
    fresh.write_bases()
    left, right = (
        Store(e.store).read_json(f"basis/svd-m2-online/{RECORD}")["files"] for e in (asked, other)
    )
    assert left == right


class KilledError(BaseException):
    """Ends a builder as a kill does: nothing catches it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, changes: int) -> None:
    """From now on, a builder dies at its change of a store number `changes`, counted from 0."""
    left = [changes]

    def counted(name: str) -> None:
        plain = getattr(Store, name)

        def change(self: Store, *args: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            plain(self, *args)

        monkeypatch.setattr(Store, name, change)

    counted("write")
    counted("delete")


def vectors_of_online(store: Store) -> Tensor:
    """The vectors (K, M) of the online basis of `svd`, read with their checksums."""
    basis = StoredBasis(store, "basis/svd-m2-online")
    assert load_coefficients(store, "svd-m2-online")[1].shape == (basis.size, 4)
    return torch.cat([rows for _, rows in basis.blocks()], dim=1).T


def write_all(asked: Experiment) -> tuple[str, ...]:
    """What a new builder does. Returns the bases that it wrote."""
    builder = BasisBuilder(asked)
    builder.add(asked.task_names)
    return builder.write_bases().names


def test_a_builder_killed_at_any_change_keeps_the_last_online_basis(tmp_path: Path) -> None:
    """The basis of the old vectors can be read until that of the new ones takes its place."""
    fields = {"basis": {"method": "svd", "online": True, "buffer": 2}}
    first, _ = filled(tmp_path / "first", 4, **fields)
    write_all(first)
    old = vectors_of_online(Store(first.store))
    commit(first, 1, seed=77)
    seen_old, changes = 0, 0
    while True:
        place = tmp_path / str(changes)
        shutil.copytree(first.store, place)
        asked, store = first.model_copy(update={"store": str(place)}), Store(str(place))
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, changes)
            try:
                write_all(asked)
            except KilledError:
                is_killed = True
            else:
                is_killed = False
        present = vectors_of_online(store)
        seen_old += torch.equal(present, old)
        write_all(asked)
        new = vectors_of_online(store)
        assert torch.equal(present, old) or torch.equal(present, new)
        torch.testing.assert_close(new, final(tmp_path / "fresh", fields), rtol=0, atol=0)
        if not is_killed:
            break
        changes += 1
    assert seen_old > 8 and changes > seen_old
    assert problems_of(store) == []


def final(folder: Path, fields: dict[str, Any]) -> Tensor:
    """The online basis of a store that had the new vector from the start."""
    if not folder.exists():
        asked, _ = filled(folder, 4, **fields)
        commit(asked, 1, seed=77)
        write_all(asked)
    return vectors_of_online(Store(str(folder)))


@pytest.mark.parametrize("what", ["", "/basis-00001-of-00001.safetensors"])
def test_a_deleted_online_basis_is_made_again(tmp_path: Path, what: str) -> None:
    """Delete the whole folder, or one of its files, as the message for a damaged basis says."""
    asked, _ = filled(tmp_path, 4, basis={"method": "svd", "online": True})
    builder = BasisBuilder(asked)
    builder.add(asked.task_names)
    builder.write_bases()
    store = Store(asked.store)
    before = {k: store.read(k) for k in store.keys("basis/svd-m2-online")}
    store.delete(f"basis/svd-m2-online{what}")
    assert BasisBuilder(asked).write_bases().names == ("svd-m2-online",)
    assert {k: store.read(k) for k in store.keys("basis/svd-m2-online")} == before
    assert problems_of(store) == []


def test_errors_by_task_are_those_of_explicit_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(50, 6, generator=generator).double()
    V[:, 2] = 0
    fit = fit_basis(V.T @ V, 3)
    expected = ((V @ fit.B @ fit.W - V) ** 2).sum(0) / (V**2).sum(0).clamp(min=1e-300)
    torch.testing.assert_close(
        task_errors(V.T @ V, fit), torch.where(V.any(0), expected, 0.0), rtol=1e-9, atol=1e-9
    )


# As Ray actors ------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_actors_that_are_killed_lose_nothing(
    ray_cluster: None, tmp_path: Path, shards: int
) -> None:
    import ray

    asked, _ = filled(tmp_path, 8, resources={"shards": shards})
    expected = BasisBuilder(asked)
    expected.add(asked.task_names)
    expected.write_bases()
    gram, store = expected.gram(), Store(asked.store)
    bases = {k: store.read(k) for k in store.keys("basis")}
    store.delete("gram")
    store.delete("basis")
    builder, actors = basis_actors(asked)
    assert len(actors) == (1 if shards == 1 else shards + 1)
    for number, task in enumerate(asked.task_names):
        call = builder.add.remote([task])
        if number in (2, 5):
            ray.kill(
                actors[0 if number == 2 else -1], no_restart=False
            )  # perhaps while the actor works
        assert ray.get(call).failed == {}
    assert tasks_in(asked) == list(asked.task_names)
    assert torch.equal(ray.get(builder.gram.remote()), gram)
    ray.get(builder.write_bases.remote())
    assert {k: store.read(k) for k in store.keys("basis") if k.endswith("safetensors")} == {
        k: v for k, v in bases.items() if k.endswith("safetensors")
    }
    for actor in actors:
        ray.kill(actor)


NODE_DEATH = """
import sys
import time
import ray
import ray._private.state as state
from ray.cluster_utils import Cluster
from raytvb.experiment.parsing import load_experiment
from raytvb.orchestration.stream import Stream

asked = load_experiment(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
cluster.wait_for_nodes()
stream = Stream(asked)
for task in asked.task_names[:4]:
    stream.offer(task)
stream.finish()
assert stream.status.vectors == 4 and not stream.failed
homes = {a["Address"]["NodeID"] for a in state.actors().values() if a["State"] == "ALIVE"}
victim = next(n for n in workers if n.node_id in homes)
cluster.remove_node(victim, allow_graceful=False)
deadline = time.monotonic() + 90
while any(n["Alive"] for n in ray.nodes() if n["NodeID"] == victim.node_id):
    assert time.monotonic() < deadline, "Ray does not see the death"
    time.sleep(0.5)
for task in asked.task_names:
    stream.offer(task)
stream.finish()
assert not stream.failed, stream.failed
gone = {a["Address"]["NodeID"] for a in state.actors().values() if a["State"] == "ALIVE"}
assert victim.node_id not in gone
print("vectors", stream.status.vectors, "written", sorted(stream.write_bases().names))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_the_death_of_a_node_loses_nothing(tmp_path: Path) -> None:
    """Three nodes on this machine with four actors. A node with some of the actors is killed when
    half of the vectors have been taken in.
    """
    asked, _ = filled(tmp_path / "store", 8, resources={"shards": 3})
    store = Store(asked.store)
    expected = BasisBuilder(asked)
    expected.add(asked.task_names)
    expected.write_bases()
    bases = {k: store.read(k) for k in store.keys("basis") if k.endswith("safetensors")}
    store.delete("gram")
    store.delete("basis")
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(asked.model_dump(mode="json")))
    script = tmp_path / "script.py"
    script.write_text(NODE_DEATH)
    run = subprocess.run(
        [sys.executable, str(script), str(file)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "vectors 8 written ['ae-anchored-m2', 'ae-anchored-m4', 'ae-m2'" in run.stdout
    assert torch.equal(BasisBuilder(asked).gram(), expected.gram())
    assert {k: store.read(k) for k in store.keys("basis") if k.endswith("safetensors")} == bases
