"""The algebra of task vectors, and that a mismatch of tensors is never ignored."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import raytvb
from raytvb.maths.task_vector import TaskVector, check_same_tensors

SHAPES = {"a.weight": (4, 3), "b.bias": (5,), "c.scale": ()}


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def flat(vector: TaskVector) -> Tensor:
    return torch.cat([t.reshape(-1) for _, t in sorted(vector.tensors.items())]).double()


def same(left: TaskVector, right: TaskVector) -> bool:
    return left.tensors.keys() == right.tensors.keys() and all(
        torch.equal(t, right.tensors[n]) for n, t in left.tensors.items()
    )


def test_it_is_the_difference_of_two_models_without_integer_buffers() -> None:
    base, tuned = tensors(0), tensors(1)
    counter = {"bn.num_batches_tracked": torch.tensor(3)}
    vector = TaskVector.from_state_dicts(base | counter, tuned | counter)
    assert vector.tensors.keys() == SHAPES.keys()
    assert all(torch.equal(t, tuned[n] - base[n]) for n, t in vector.tensors.items())


def test_applying_it_to_the_pretrained_model_gives_the_fine_tuned_one() -> None:
    base, tuned = tensors(0, torch.float64), tensors(1, torch.float64)
    vector = TaskVector.from_state_dicts(base, tuned)
    back = vector.apply(base)
    assert all(torch.allclose(back[n], tuned[n], rtol=1e-14) for n in base)
    undone = (-vector).apply(back)
    assert all(torch.allclose(undone[n], base[n], rtol=1e-13) for n in base)


def test_the_algebra_is_that_of_vectors() -> None:
    u, v = TaskVector(tensors(1)), TaskVector(tensors(2))
    assert torch.equal(flat(u + v), (flat(u).float() + flat(v).float()).double())
    torch.testing.assert_close(flat(u - v), flat(u) - flat(v), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flat(2.5 * u), 2.5 * flat(u), rtol=1e-6, atol=0)
    assert (
        same(u * 3.0, 3.0 * u) and same(-u, u * -1) and same(u + v, v + u) and same(u - v, u + (-v))
    )
    assert not any((u - u).tensors[n].any() for n in SHAPES)
    zero = TaskVector({n: torch.zeros_like(t) for n, t in u.tensors.items()})
    assert same(u + zero, u) and zero.norm() == 0.0


def test_operations_leave_their_operands_alone() -> None:
    u, v, base = TaskVector(tensors(1)), TaskVector(tensors(2)), tensors(0)
    _ = u + v, u - v, 2.0 * u, -u, u.dot(v), u.apply(base, 0.3)
    assert same(u, TaskVector(tensors(1))) and same(v, TaskVector(tensors(2)))
    assert all(torch.equal(t, tensors(0)[n]) for n, t in base.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        u.tensors = {}  # type: ignore[misc]


def test_tensors_are_paired_by_name_not_by_position() -> None:
    u, v = TaskVector(tensors(1)), TaskVector(dict(reversed(tensors(2).items())))
    assert same(u + v, u + TaskVector(tensors(2)))
    assert u.dot(v) == u.dot(TaskVector(tensors(2)))


def test_apply_scales_and_copies_what_the_vector_has_not() -> None:
    base = tensors(0) | {"head": torch.ones(2), "count": torch.tensor(7)}
    vector = TaskVector({n: t for n, t in tensors(1).items() if n != "b.bias"})
    made = vector.apply(base, 0.25)
    assert list(made) == list(base)
    for name, value in base.items():
        expected = value + 0.25 * vector.tensors[name] if name in vector.tensors else value
        assert torch.equal(made[name], expected) and made[name].dtype == value.dtype
        assert made[name].data_ptr() != value.data_ptr()


def test_apply_keeps_the_dtype_of_the_model() -> None:
    base = tensors(0, torch.bfloat16)
    assert {t.dtype for t in TaskVector(tensors(1)).apply(base).values()} == {torch.bfloat16}


def test_dot_and_norm_are_accumulated_in_float64() -> None:
    u, v = TaskVector(tensors(1)), TaskVector(tensors(2))
    assert u.dot(v) == pytest.approx(float(flat(u) @ flat(v)), rel=1e-13)
    assert u.norm() == pytest.approx(float(flat(u).norm()), rel=1e-13)
    big = TaskVector({"a": torch.tensor([1e20, 1e-3]), "b": torch.full((10,), 1e20)})
    assert big.dot(big) == pytest.approx(1.1e41, rel=1e-6)  # beyond float32
    tiny = TaskVector({"a": torch.tensor([1.0]), "b": torch.full((4096,), 1e-5)})
    assert tiny.dot(tiny) - 1.0 == pytest.approx(4096 * 1e-10, rel=1e-4)  # lost in float32


def test_dot_does_not_cancel_across_tensors() -> None:
    """1e17 + 1 - 1e17: the sum over tensors is exact, so small tensors count beside large ones."""
    u = TaskVector({"a": torch.tensor([1e9]), "b": torch.tensor([1.0]), "c": torch.tensor([-1e9])})
    assert (
        u.dot(
            TaskVector(
                {"a": torch.tensor([1e8]), "b": torch.tensor([1.0]), "c": torch.tensor([1e8])}
            )
        )
        == 1.0
    )


def mismatching() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    left = {
        "same": torch.zeros(2),
        "only.left": torch.zeros(1),
        "also.left": torch.zeros(1),
        "bent": torch.zeros(2, 3),
    }
    right = {"same": torch.zeros(2), "only.right": torch.zeros(1), "bent": torch.zeros(3, 2)}
    return left, right


def test_a_mismatch_lists_all_names_and_shapes_at_once() -> None:
    left, right = mismatching()
    with pytest.raises(ValueError) as caught:
        check_same_tensors(left, right)
    message = str(caught.value)
    for part in ("only.left", "also.left", "only.right", "shape of bent: (2, 3) and (3, 2)"):
        assert part in message
    assert message.index("also.left") < message.index(
        "only.left"
    ) and "same" not in message.replace("the same", "")


@pytest.mark.parametrize(
    "operation",
    [
        lambda u, v: u + v,
        lambda u, v: u - v,
        lambda u, v: u.dot(v),
        lambda u, v: TaskVector.from_state_dicts(u.tensors, v.tensors),
    ],
)
def test_every_operation_is_strict(operation: Callable[[TaskVector, TaskVector], object]) -> None:
    left, right = mismatching()
    with pytest.raises(ValueError, match=r"also\.left.*only\.left.*only\.right.*bent"):
        operation(TaskVector(left), TaskVector(right))


def test_apply_is_strict_about_what_the_model_has_not() -> None:
    left, right = mismatching()
    with pytest.raises(ValueError, match=r"also\.left.*only\.left.*bent"):
        TaskVector(left).apply(right)


def test_the_package_offers_its_pure_parts() -> None:
    assert raytvb.TaskVector is TaskVector
    assert all(callable(getattr(raytvb, name)) for name in raytvb.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = raytvb.nothing
