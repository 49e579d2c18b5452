"""Sparse training against torch's own optimizer on the kept entries alone, and fine-tuning on a toy
problem.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split
from raytvb.errors import UserError
from raytvb.experiment.sections.finetune import FinetuneConfig
from raytvb.finetuning.training_loop import Checkpoint, Finetuned, batches, finetune, learning_rate
from raytvb.maths.bits import pack_bits, unpack_bits
from raytvb.maths.masked_adamw import MaskedAdamW
from raytvb.maths.seeds import task_seed

CPU = torch.device("cpu")
RATES = [1e-2, 5e-3, 2e-2, 1e-3, 0.0, 7e-3]
PREPROCESS = Preprocess(4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), {})


def toy_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)
    )


def toy_split(count: int = 50, seed: int = 1) -> Split:
    """4x4 images whose class is the channel that is brightest."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = torch.randint(0, 120, (count, 3, 4, 4), generator=generator)
    images[torch.arange(count), labels] += 60
    return Split(images.to(torch.uint8), labels, ("red", "green", "blue"))


def random_mask(net: nn.Module, density: float = 0.3, seed: int = 2) -> dict[str, Tensor]:
    """A mask that keeps about the given share, nothing of the LayerNorm's weight and all of the
    last bias.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = {
        n: torch.rand(p.shape, generator=generator) < density for n, p in net.named_parameters()
    }
    mask["2.weight"][:] = False
    mask["4.bias"][:] = True
    return mask


def full_mask(net: nn.Module) -> dict[str, Tensor]:
    return {n: torch.ones_like(p, dtype=torch.bool) for n, p in net.named_parameters()}


@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_adamw_on_the_kept_entries(
    weight_decay: float, clip: float | None
) -> None:
    net, split = toy_net(), toy_split()
    reference, mask = copy.deepcopy(net), random_mask(net)
    images = PREPROCESS.normalise(split.images)
    ours = MaskedAdamW(dict(net.named_parameters()), mask, lr=0.5, weight_decay=weight_decay)
    kept = {
        n: nn.Parameter(p.detach()[mask[n]])
        for n, p in reference.named_parameters()
        if mask[n].any()
    }
    theirs = torch.optim.AdamW(kept.values(), lr=0.5, weight_decay=weight_decay)
    norms = []
    for rate in RATES:
        nn.functional.cross_entropy(net(images), split.labels).backward()
        norms.append(ours.step(rate, clip))

        nn.functional.cross_entropy(reference(images), split.labels).backward()
        for name, parameter in reference.named_parameters():
            if name in kept:
                assert parameter.grad is not None
                kept[name].grad = parameter.grad[mask[name]].clone()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(kept.values(), math.inf if clip is None else clip)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if name in kept:
                    parameter[mask[name]] = kept[name]
        assert norms[-1] == pytest.approx(float(norm), rel=1e-5)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(
                parameter, reference.get_parameter(name), rtol=1e-5, atol=1e-7
            )
    assert clip != 0.05 or min(norms) > clip  # so that this case clips, and the others do not


def test_everything_that_is_not_kept_stays_the_same_bits() -> None:
    net, split = toy_net(), toy_split()
    before, mask = copy.deepcopy(net), random_mask(net)
    optimizer = MaskedAdamW(dict(net.named_parameters()), mask, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        nn.functional.cross_entropy(
            net(PREPROCESS.normalise(split.images)), split.labels
        ).backward()
        optimizer.step(0.1, 1.0)
    for name, parameter in net.named_parameters():
        start = before.get_parameter(name)
        assert torch.equal(parameter[~mask[name]], start[~mask[name]])
        assert bool((parameter[mask[name]] != start[mask[name]]).all())


def test_tensors_without_kept_entries_need_no_gradient() -> None:
    net = toy_net()
    net.get_parameter("4.bias").requires_grad_(False)
    MaskedAdamW(dict(net.named_parameters()), random_mask(net), lr=0.1, weight_decay=0.0)
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == {"2.weight"}


def test_whole_gradients_are_freed_and_after_closing_they_stay() -> None:
    net, split = toy_net(), toy_split()
    optimizer = MaskedAdamW(
        dict(net.named_parameters()), random_mask(net), lr=0.1, weight_decay=0.0
    )
    loss = nn.functional.cross_entropy(net(PREPROCESS.normalise(split.images)), split.labels)
    loss.backward(retain_graph=True)
    assert all(p.grad is None for p in net.parameters())
    optimizer.close()
    loss.backward()
    assert any(p.grad is not None for p in net.parameters())


def test_the_state_is_sixteen_bytes_a_kept_entry() -> None:
    net, split = toy_net(), toy_split()
    mask = random_mask(net)
    optimizer = MaskedAdamW(dict(net.named_parameters()), mask, lr=0.1, weight_decay=0.0)
    nn.functional.cross_entropy(net(PREPROCESS.normalise(split.images)), split.labels).backward()
    optimizer.step(0.1)
    indexed = [
        m for m in mask.values() if not m.all()
    ]  # a tensor that is kept whole needs no positions
    assert (
        optimizer.state_bytes
        == 12 * len(optimizer.values) + 4 * sum(int(m.sum()) for m in indexed) + 4
    )


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    net, split = toy_net(), toy_split()
    before = copy.deepcopy(net).state_dict()
    optimizer = MaskedAdamW(
        dict(net.named_parameters()), random_mask(net), lr=0.1, weight_decay=0.1
    )
    (
        torch.inf
        * nn.functional.cross_entropy(net(PREPROCESS.normalise(split.images)), split.labels)
    ).backward()
    assert not math.isfinite(optimizer.step(0.1, 1.0))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    nn.functional.cross_entropy(net(PREPROCESS.normalise(split.images)), split.labels).backward()
    assert math.isfinite(optimizer.step(0.1, 1.0))
    assert not all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_a_mask_of_other_names_is_an_error_that_lists_them() -> None:
    net = toy_net()
    mask = random_mask(net)
    mask["other"] = mask.pop("1.weight")
    with pytest.raises(ValueError, match=r"'1\.weight', 'other'"):
        MaskedAdamW(dict(net.named_parameters()), mask, lr=0.1, weight_decay=0.0)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 65, 1001])
def test_packed_bits_come_back(count: int) -> None:
    mask = torch.from_numpy(np.random.default_rng(count).random(count) < 0.4)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(count / 8)
    back = unpack_bits(packed, count)
    assert back.dtype == torch.bool and torch.equal(back, mask)


def test_entry_i_is_bit_i_mod_8_lowest_first_and_the_rest_is_zero() -> None:
    mask = torch.zeros(11, dtype=torch.bool)
    mask[[0, 3, 9]] = True
    assert pack_bits(mask).tolist() == [0b00001001, 0b00000010]
    assert pack_bits(torch.ones(9, dtype=torch.bool)).tolist() == [255, 1]
    assert unpack_bits(torch.tensor([2, 255], dtype=torch.uint8), 10).int().tolist() == [0, 1] + [
        0
    ] * 6 + [1, 1]


def test_the_learning_rate_warms_up_and_falls_as_a_half_cosine() -> None:
    config = FinetuneConfig(lr=2.0, warmup=0.2)
    rates = [learning_rate(s, 50, config) for s in range(50)]
    assert rates[:10] == pytest.approx([2.0 * (s + 1) / 10 for s in range(10)])
    assert rates[10] == rates[9] == max(rates) == 2.0
    assert rates[10:] == pytest.approx([1.0 + math.cos(math.pi * s / 40) for s in range(40)])
    assert rates[30] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.01


def test_warming_up_for_a_number_of_steps() -> None:
    rates = [learning_rate(s, 50, FinetuneConfig(lr=2.0, warmup=5)) for s in range(50)]
    assert rates == [learning_rate(s, 50, FinetuneConfig(lr=2.0, warmup=0.1)) for s in range(50)]
    assert learning_rate(3, 4, FinetuneConfig(lr=2.0, warmup=500)) == pytest.approx(2.0 * 4 / 500)


def test_the_learning_rate_of_short_runs_is_finite_and_positive() -> None:
    assert learning_rate(0, 1, FinetuneConfig(lr=0.5)) == 0.5
    assert learning_rate(0, 10, FinetuneConfig(lr=0.5, warmup=0.0)) == 0.5
    for steps in range(1, 8):
        rates = [learning_rate(s, steps, FinetuneConfig(lr=0.5, warmup=0.9)) for s in range(steps)]
        assert all(0 < r <= 0.5 for r in rates) and max(rates) == 0.5


@pytest.mark.parametrize(("count", "size"), [(10, 3), (9, 3), (4, 10), (1, 1)])
def test_every_epoch_covers_every_index_once_in_another_order(count: int, size: int) -> None:
    each = math.ceil(count / size)
    made = list(batches(count, size, 3 * each, torch.Generator().manual_seed(0)))
    assert len(made) == 3 * each and all(len(b) <= size for b in made)
    epochs = [torch.cat(made[e * each : (e + 1) * each]).tolist() for e in range(3)]
    assert all(sorted(e) == list(range(count)) for e in epochs)
    assert count < 9 or len({tuple(e) for e in epochs}) == 3


def test_batches_end_in_the_middle_of_an_epoch() -> None:
    made = list(batches(10, 3, 6, torch.Generator().manual_seed(0)))
    assert [len(b) for b in made] == [3, 3, 3, 1, 3, 3]


def trained(
    net: nn.Module, mask: dict[str, Tensor], seed: int = 0, **fields: float | str
) -> Finetuned:
    config = FinetuneConfig.model_validate({"epochs": 5, "batch_size": 16, "lr": 1e-2, **fields})
    return finetune(net, toy_split(), mask, config, PREPROCESS, seed=seed, device=CPU)


def loss_of(net: nn.Module) -> float:
    split = toy_split(200, seed=9)
    return float(
        nn.functional.cross_entropy(net(PREPROCESS.normalise(split.images)), split.labels).detach()
    )


def test_finetuning_lowers_the_loss_and_returns_the_kept_differences() -> None:
    net = toy_net()
    before, mask = copy.deepcopy(net), random_mask(net)
    result = trained(net, mask)
    assert loss_of(net) < 0.7 * loss_of(before)
    assert result.steps == 20
    assert math.isfinite(result.final_loss) and result.seconds > 0
    assert result.values.keys() == mask.keys()
    for name, parameter in net.named_parameters():
        start, kept = before.get_parameter(name), mask[name]
        assert torch.equal(parameter[~kept], start[~kept])
        assert result.values[name].shape == (int(kept.sum()),)
        assert torch.equal(result.values[name], (parameter - start).detach()[kept])
        assert not kept.any() or bool(result.values[name].any())


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_a_batch_in_parts_trains_as_the_whole_batch_does(parts: int) -> None:
    """This includes the smaller last batch, of 2 images. Adam's first steps enlarge rounding errors
    of small gradients.
    """
    mask = random_mask(toy_net())
    whole, divided = trained(toy_net(), mask), trained(toy_net(), mask, accumulate=parts)
    assert divided.steps == whole.steps and divided.final_loss == pytest.approx(
        whole.final_loss, rel=1e-4
    )
    for name in mask:
        torch.testing.assert_close(divided.values[name], whole.values[name], rtol=1e-3, atol=1e-5)


def test_smoothed_labels_give_the_loss_of_mixed_targets() -> None:
    net, split = toy_net(), toy_split(16)
    targets = 0.7 * nn.functional.one_hot(split.labels, 3) + 0.3 / 3
    expected = (
        -(targets * net(PREPROCESS.normalise(split.images)).log_softmax(dim=1)).sum(dim=1).mean()
    )
    config = FinetuneConfig(epochs=1, batch_size=16, lr=1e-2, label_smoothing=0.3)
    found = finetune(net, split, full_mask(net), config, PREPROCESS, seed=0, device=CPU)
    assert found.steps == 1 and found.final_loss == pytest.approx(expected.item(), rel=1e-5)


def test_bf16_trains_float32_weights_to_about_the_same() -> None:
    mask = random_mask(toy_net())
    seen: list[torch.dtype] = []
    net = toy_net()
    net.get_submodule("1").register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    half, full = trained(net, mask, precision="bf16"), trained(toy_net(), mask)
    assert set(seen) == {torch.bfloat16} and all(p.dtype == torch.float32 for p in net.parameters())
    left, right = (torch.cat([r.values[n] for n in sorted(mask)]) for r in (half, full))
    assert left.dtype == torch.float32 and not torch.equal(left, right)
    assert float((left - right).norm() / right.norm()) < 0.2
    again = trained(toy_net(), mask, precision="bf16")
    assert all(torch.equal(again.values[n], half.values[n]) for n in mask)


def test_a_dense_mask_gives_whole_tensors() -> None:
    net = toy_net()
    before = copy.deepcopy(net)
    result = trained(net, full_mask(net))
    for name, parameter in net.named_parameters():
        assert torch.equal(result.values[name], (parameter - before.get_parameter(name)).detach())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    mask = random_mask(toy_net())
    first, second, third = (trained(toy_net(), mask, seed).values for seed in (4, 4, 5))
    assert all(torch.equal(first[n], second[n]) for n in mask)
    assert not all(torch.equal(first[n], third[n]) for n in mask)


def test_a_fraction_of_an_epoch_is_a_number_of_steps() -> None:
    net = toy_net()
    assert trained(net, random_mask(net), epochs=0.5).steps == 2
    assert trained(net, random_mask(net), epochs=0.01).steps == 1


def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_step() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = toy_net(), 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            logits: Tensor = self.net(images) * (torch.nan if self.calls == 4 else 1.0)
            return logits

    net = Breaks()
    with pytest.raises(UserError, match=r"loss is nan at step 4 of 20.*finetune\.lr \(0\.01\)"):
        trained(net, full_mask(net))
    assert net.calls == 4


def test_a_task_has_a_seed_of_its_own() -> None:
    seeds = {
        task_seed(s, n)
        for s in range(5)
        for n in ("glyphs/greek-blur", "glyphs/latin-fog", "mnist")
    }
    assert len(seeds) == 15 and task_seed(0, "mnist") == task_seed(0, "mnist")


def test_running_statistics_are_left_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    before = {n: b.clone() for n, b in net.named_buffers()}
    trained(net, full_mask(net))
    assert before and all(torch.equal(b, before[n]) for n, b in net.named_buffers())


def test_a_kept_parameter_that_the_forward_pass_does_not_use_only_decays() -> None:
    net = toy_net()
    net.register_parameter("spare", nn.Parameter(torch.ones(3)))
    optimizer = MaskedAdamW(dict(net.named_parameters()), full_mask(net), lr=0.1, weight_decay=0.1)
    loss_before = net(torch.ones(2, 3, 4, 4)).square().sum()
    loss_before.backward()
    optimizer.step(0.1)
    spare = net.get_parameter("spare").detach()
    torch.testing.assert_close(spare, torch.full((3,), 0.99))
    assert not torch.equal(net.get_parameter("4.bias"), toy_net().get_parameter("4.bias"))


def test_a_fine_tune_goes_on_from_any_checkpoint_to_the_same_bits() -> None:
    def net_with_dropout() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(48, 16), nn.LayerNorm(16), nn.Dropout(0.3), nn.Linear(16, 3)
        )

    config, mask = FinetuneConfig(epochs=5, batch_size=16, lr=1e-2), random_mask(net_with_dropout())

    def run(net: nn.Module, saved: list[Checkpoint], start: Checkpoint | None = None) -> Finetuned:
        return finetune(
            net,
            toy_split(),
            mask,
            config,
            PREPROCESS,
            seed=3,
            device=CPU,
            start=start,
            save=saved.append,
            save_every_s=0.0,
        )

    whole_net, all_saved = net_with_dropout(), list[Checkpoint]()
    whole = run(whole_net, all_saved)
    assert [c.step for c in all_saved] == list(range(1, 21))
    for checkpoint in (all_saved[0], all_saved[6], all_saved[18], all_saved[19]):
        torch.manual_seed(99)
        net, saved = net_with_dropout(), list[Checkpoint]()
        rest = run(net, saved, checkpoint)
        assert [c.step for c in saved] == list(range(checkpoint.step + 1, 21))
        assert all(torch.equal(rest.values[n], whole.values[n]) for n in mask)
        assert all(torch.equal(p, whole_net.get_parameter(n)) for n, p in net.named_parameters())
        assert (rest.steps, rest.final_loss) == (20, whole.final_loss)


def test_a_checkpoint_of_another_mask_is_refused() -> None:
    saved: list[Checkpoint] = []
    net = toy_net()
    config = FinetuneConfig(epochs=1, batch_size=16, lr=1e-2)
    finetune(
        net,
        toy_split(),
        random_mask(net),
        config,
        PREPROCESS,
        seed=0,
        device=CPU,
        save=saved.append,
        save_every_s=0.0,
    )
    with pytest.raises(ValueError, match="kept entries in the state"):
        finetune(
            net, toy_split(), full_mask(net), config, PREPROCESS, seed=0, device=CPU, start=saved[0]
        )
