"""The benchmarks of the command line on the embedded model, and the references they compare
with.
"""

import copy
import json
from typing import Any

import pytest
import torch

from raytvb.bench.finetune import PublishedMaskedAdamW
from raytvb.bench.fisher import published_scores
from raytvb.bench.measure import CLASSES, random_classifier
from raytvb.cli.main import main
from raytvb.maths.fisher import _add_batch
from raytvb.maths.masked_adamw import MaskedAdamW

CPU = torch.device("cpu")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments, "--model", "glyphs-tiny", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (
        found["machine"]["cores"] >= 1
        and found["machine"]["threads"] == 1
        and found["machine"]["cpu"]
    )
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    return found


def test_fisher_prints_one_json_object_with_a_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "fisher", "--batch-size", "8", "--batches", "2", "--scored", "2")
    reference, ours = found["reference"], found["ours"]
    assert found["ratio"] == pytest.approx(
        reference["seconds_per_image"] / ours["seconds_per_image"]
    )
    assert found["ratio"] > 1 and found["parameters"] == 477_120
    assert (reference["images_timed"], ours["images_timed"]) == (2, 16)
    assert found["loop"]["ratio"] == pytest.approx(
        found["loop"]["seconds_per_image"] / ours["seconds_per_image"]
    )


def test_finetune_prints_one_json_object_with_a_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(
        capsys, "finetune", "--batch-size", "8", "--repeats", "3", "--precision", "bf16"
    )
    reference, ours = found["reference"], found["ours"]
    assert found["ratio"] == pytest.approx(reference["step_s"] / ours["step_s"])
    assert found["ratio_with_gather"] == pytest.approx(
        reference["step_s"] / (ours["step_s"] + ours["gather_s"])
    )
    assert reference["state_bytes"] == 12 * found["parameters"] and found["kept"] == 47_712
    assert 12 * found["kept"] < ours["state_bytes"] <= 16 * found["kept"] + 4
    assert (
        8 * found["parameters"] <= found["fused_dense"]["state_bytes"] < 8.1 * found["parameters"]
    )
    whole = found["whole_step"]
    assert whole["batch_size"] == 8 and whole["sparse"]["seconds"] > ours["step_s"]
    assert whole["sparse_over_dense"] == pytest.approx(
        whole["sparse"]["seconds"] / whole["dense"]["seconds"], rel=0.5
    )


def test_without_json_it_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["bench", "fisher", "--model", "glyphs-tiny", "--batch-size", "4", "--scored", "1"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["parameters", "477,120"] for line in lines)
    assert any("reference.seconds_per_image" in line for line in lines)


def test_an_unknown_model_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "fisher", "--model", "ViT"]) == 1
    assert "unknown model 'ViT'; open_clip has" in capsys.readouterr().err


def test_the_published_loop_computes_what_ours_does() -> None:
    classifier, size = random_classifier("glyphs-tiny", CPU)
    images, labels = torch.randn(4, 3, size, size), torch.randint(CLASSES, (4,))
    parameters = dict(classifier.named_parameters())
    ours = {n: torch.zeros_like(p) for n, p in parameters.items()}
    drawn = (labels[:, None], torch.ones(4, 1))
    assert _add_batch(classifier, parameters, images, lambda logits: drawn, ours, 1e-4)[2] == set()
    published = published_scores(classifier, images, labels, 4)
    largest = max(float(s.max()) for s in published.values())
    for name, score in published.items():
        torch.testing.assert_close(
            ours[name], score, rtol=0, atol=max(1e-4 * float(score.max()), 1e-9 * largest)
        )


def test_the_published_optimizer_trains_as_ours_does_where_gradients_are_not_clipped() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(30, 20)
    mask = {n: torch.rand(p.shape) < 0.3 for n, p in net.named_parameters()}
    other = copy.deepcopy(net)
    published = PublishedMaskedAdamW(dict(other.named_parameters()), mask, weight_decay=0.1)
    ours = MaskedAdamW(dict(net.named_parameters()), mask, lr=0.0, weight_decay=0.1)
    for step in range(4):
        x = torch.randn(8, 30)
        for model in (net, other):
            model(x).square().mean().backward()
        ours.step(1e-2 / (step + 1))
        published.step(1e-2 / (step + 1))
        other.zero_grad()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert published.state_bytes == 12 * 620
