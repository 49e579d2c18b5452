"""The page and the printed results, from summaries made here: what is shown is what they say."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from raytvb.cli.tables import print_summary
from raytvb.errors import UserError
from raytvb.maths.counts import Count, mean, wilson
from raytvb.merging.merge import merge
from raytvb.report.page import render
from raytvb.report.summary import _measured
from raytvb.report.text import headline, objective_on_test, subset_sizes
from raytvb.storage.store import Store

IMAGES = 200
HISTORY = [{"vectors": n, "floor": {"1": 1 - 0.1 * n}} for n in (1, 2)]


def measured(correct: Mapping[str, int], own: Mapping[str, float]) -> dict[str, Any]:
    """As the summary has it, of correct answers out of IMAGES."""
    return _measured([{"task": t, "correct": c, "total": IMAGES} for t, c in correct.items()], own)


def make_summary(
    count: int = 3,
    methods: Sequence[str] = ("ae", "svd"),
    sizes: Sequence[int] = (1, 2),
    chosen: str | None = "ae-m2",
) -> dict[str, Any]:
    """A search with nothing that is optional: `count` tasks, the vectors themselves, and bases that
    gain with M.
    """
    tasks = [f"group/t{i}" for i in range(count)]
    own = {t: 0.9 - 0.01 * (i % 20) for i, t in enumerate(tasks)}
    classes = sorted({1, max(1, count // 2), count})

    def entry(
        name: str, method: str, size: int, gain: float, stored: int, merge: str = "decoded"
    ) -> dict[str, Any]:
        subsets = {
            str(s): 0.6 + gain - 0.001 * s for s in (classes if merge != "sum" else classes[-1:])
        }
        return {
            "merge": merge,
            "method": method,
            "size": size,
            "online": name.endswith("-online"),
            "relative_error": 0.5 / (1 + size) if size else 0.0,
            "stored_bytes": stored,
            "validation_objective": 0.6 + gain,
            "validation_share": 1.0,
            "stopped": False,
            "coefficient": {s: 1 / int(s) for s in subsets},
            "subsets": subsets,
            **measured({t: round(IMAGES * (0.6 + gain)) - i % 7 for i, t in enumerate(tasks)}, own),
            "spread": {
                "mean_absolute_difference": 0.012,
                "worst_task": tasks[-1],
                "worst_difference": -0.034,
            },
        }

    addition = {"full": entry("full", "full", 0, 0.2, 100_000 * count)}
    for number, method in enumerate(methods):
        for size in sizes:
            gain = 0.15 * size / max(sizes) + 0.003 * number
            addition[f"{method}-m{size}"] = entry(
                f"{method}-m{size}", method, size, gain, 100_000 * size + number
            )
    choice: dict[str, Any] = {
        "name": None,
        "reason": "no basis is better on validation data than <the pretrained> model",
    }
    if chosen:
        choice = {
            "name": chosen,
            "objective": addition[chosen]["validation_objective"],
            "tolerance": None,
            **{
                k: addition[chosen][k]
                for k in ("method", "size", "merge", "coefficient", "stored_bytes")
            },
        }
    return {
        "tasks": tasks,
        "zero_shot": dict.fromkeys(tasks, 0.5),
        "fine_tuned": own,
        "addition": addition,
        "random_subset": {
            "random-own-m1": entry("random-own-m1", "random-subset", 1, 0.05, 100_000)
        },
        "additions": [],
        "negation": {},
        "negation_basis": {},
        "unseen": {},
        "disentanglement": [],
        "online": {},
        "mask_overlap": None,
        "chosen": choice,
        "search": {
            "name": chosen,
            "objective_of": "subsets",
            "tolerance": None,
            "best": chosen,
            "zero_shot": 0.5,
            "front": [f"{methods[0]}-m{s}" for s in sizes] + ["full"],
            "stopped": [],
            "invalid": {},
            "candidates": 17,
            "evaluations": 1234,
            "images": 56789,
            "selection": "validation split only",
            "test": "read once",
        },
        "stored_bytes": {
            "dense_fp32": 10_000_000,
            "vectors": 1_000_000,
            "masks": 100_000,
            "heads": 1000,
            "basis": 1,
        },
        "seconds": {"finetune": 12.0},
        "floor": {},
        "provenance": {"experiment": {"evaluate": {"keep": 0.95}}, "precision": {"use": "fp32"}},
    }


def negation(tasks: Sequence[str], after: int, coefficient: float) -> dict[str, dict[str, Any]]:
    return {
        t: {
            "before": 0.5,
            "after": after / IMAGES,
            "control_before": 0.96,
            "control_after": 0.92,
            "coefficient": coefficient,
            "control_validation_before": 0.8,
            "control_validation_after": 0.78,
            "interval": [0.111, 0.222],
        }
        for t in tasks
    }


def with_everything(summary: dict[str, Any]) -> dict[str, Any]:
    """The optional parts as well, for a chosen basis."""
    tasks, own, chosen = summary["tasks"], summary["fine_tuned"], summary["chosen"]["name"]
    addition = summary["addition"]
    for name in ("full", chosen):
        addition[name]["weighted"] = {
            "kind": "per-task",
            "weights": [0.5] * len(tasks),
            "validation_accuracy": 0.777,
            **measured({t: 170 for t in tasks}, own),
        }
    addition["ae-m2-ties"] = {
        **addition["ae-m2"],
        "merge": "ties",
        **measured({t: 123 for t in tasks}, own),
    }
    addition["svd-m2"] |= {"stopped": True, "validation_share": 0.25}
    summary["search"]["stopped"] = ["svd-m1", "svd-m2"]
    pair = tasks[:2]
    models = {
        n: {"coefficient": a, **measured(dict.fromkeys(pair, c), own)}
        for n, a, c in (("full", 0.75, 160), (chosen, 1.25, 150))
    }
    matrix = [[0.0, 0.4], [0.8, 1.2]]
    summary |= {
        "negation": negation(tasks, 40, 2.0),
        "negation_basis": negation(tasks, 60, 1.4),
        "additions": [{"tasks": pair, "models": models}],
        "unseen": {
            name: {
                "images": 48,
                **{
                    kind: {"accuracy": a + shift, "interval": [0.2, 0.333], "coefficients": m}
                    for kind, a, m in (
                        ("zero_shot", 0.25, 0),
                        ("basis", 0.31, 2),
                        ("full", 0.41, len(tasks)),
                    )
                },
            }
            for name, shift in (("new/a", 0.0), ("new/b", 0.02))
        },
        "disentanglement": [
            {
                "tasks": pair,
                "coefficients": [-1.0, 1.0],
                "models": {
                    "full": {"error": matrix, "mean": 0.6},
                    chosen: {"error": matrix, "mean": 0.655},
                },
            }
        ],
        "online": {
            "svd-m1-online": {
                "method": "svd",
                "size": 1,
                "arrivals": [1, 2],
                "tasks": pair,
                **{
                    kind: {
                        "accuracy": [[a, None], [a - 0.1, a]],
                        "mean": [a, a - 0.05],
                        "added": [a - 0.2, a - 0.3],
                        "forgetting": {pair[0]: 0.1, pair[1]: 0.0},
                    }
                    for kind, a in (("online", 0.7), ("offline", 0.8), ("full", 0.9))
                },
            }
        },
    }
    return summary


def section(page: str, heading: str) -> str:
    """What is between a heading and the next one."""
    return (
        re.split(rf"<h[23]>{re.escape(heading)}</h[23]>", page)[1].split("<h2>")[0].split("<h3>")[0]
    )


def rows(page: str, heading: str = "") -> dict[str, list[str]]:
    """Cells of the rows of a section's tables by the first of them, as a reader sees them."""
    found = {}
    for row in re.findall(r"<tr.*?</tr>", section(page, heading) if heading else page, re.DOTALL):
        first, *others = (
            html.unescape(" ".join(re.sub(r"<.*?>", "", c).split()))
            for c in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)
        )
        found[first] = others
    return found


def words(page: str, heading: str) -> str:
    return html.unescape(
        " ".join(re.sub(r"<.*?>", "", section(page, heading), flags=re.DOTALL).split())
    )


def printed(
    summary: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, list[str]], str]:
    """(cells of the table by the first of their row, the lines below it)."""
    print_summary(summary)
    lines = capsys.readouterr().out.splitlines()
    cells = [
        [c.strip() for c in re.split("[│┃]", line)[1:-1]]
        for line in lines
        if line[:1] in ("│", "┃")
    ]
    last = next(i for i, line in enumerate(lines) if line.startswith("└"))
    return {first: others for first, *others in cells}, "\n".join(lines[last + 1 :])


# The page -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_page() -> tuple[dict[str, Any], str]:
    """A summary with everything and its page."""
    summary = with_everything(make_summary())
    summary["addition"]["svd-m2"] |= {
        "normalised": dict.fromkeys(summary["tasks"]),
        "normalised_mean": None,
    }
    summary["addition"]["ae-m2-sum"] = {
        **summary["addition"]["ae-m2"],
        "merge": "sum",
        "subsets": {"3": 0.7},
    }
    del summary["addition"]["svd-m1"]  # stopped early, and not at M = T/2
    summary["search"] |= {
        "tolerance": 0.015,
        "best": "svd-m9",
        "invalid": {"odd-m1": "NaN <script>"},
        "front": ["svd-m1", "ae-m1", "ae-m2", "svd-m2", "full"],
    }
    summary["provenance"]["precision"] = {
        "use": "bf16",
        "agreement": 0.99876,
        "worst_task": 0.98,
        "images": 2400,
        "device": "cuda",
    }
    return summary, render(summary, "<i>name</i>", HISTORY)


def test_a_plain_page_has_its_plots_inline_and_fetches_nothing() -> None:
    summary = make_summary()
    page = render(summary | {"negation": negation(summary["tasks"], 40, 2.0)}, "tiny", HISTORY)
    assert page.count("<svg") == 7 and "<script" not in page
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)
    for absent in (
        "Unseen tasks",
        "Weight disentanglement",
        "Tasks arriving over time",
        "Named additions",
        "Other merge methods",
        "A coefficient for each vector",
        "stopped early",
    ):
        assert absent not in page
    assert rows(page, "Negation")["group/t0"] == ["50.0", "20.0 11.1–22.2", "96.0", "92.0", "2.00"]
    assert "From ae-m2" not in words(page, "Negation")
    assert "Evaluations ran in fp32." in words(page, "Provenance")


def test_the_table_of_additions(full_page: tuple[dict[str, Any], str]) -> None:
    summary, page = full_page
    table, entry = rows(page, "Addition"), summary["addition"]["ae-m2"]
    assert table["vectors"] == [
        "error",
        "all tasks",
        "normalised",
        "1 added",
        "mean of sizes",
        "|Δ| to full",
        "worst task",
        "bytes",
    ]
    assert table["ae-m2 * +"] == [
        "0.167",
        f"{100 * entry['mean']:.1f}",
        f"{100 * entry['normalised_mean']:.1f}",
        "74.9",
        "74.8",
        "1.2",
        "t2 -3.4",
        "200.00 kB",
    ]
    assert {"full +", "ae-m1 +", "random-own-m1"} < set(table) and "ae-m2-ties" not in table
    assert table["ae-m2-sum"][3:5] == ["–", "–"]
    assert (
        table["svd-m2 + stopped at 25 %"][2] == "–"
    )  # a fine-tuned model without any right answer
    assert rows(page, "Other merge methods")["ae-m2-ties"][1] == "61.5"


def test_every_task_has_its_interval_and_counts(full_page: tuple[dict[str, Any], str]) -> None:
    row = rows(full_page[1], "Addition")["group/t0"]
    low, high = wilson(Count(150, IMAGES))
    assert row[:3] == ["50.0", "90.0", "80.0"]
    assert row[-4:] == [
        "75.0",
        f"{100 * low:.1f}–{100 * high:.1f}",
        f"{100 * 0.75 / 0.9:.1f}",
        "150 of 200",
    ]


def test_coefficients_for_each_vector_and_named_additions(
    full_page: tuple[dict[str, Any], str],
) -> None:
    summary, page = full_page
    one = f"{100 * summary['addition']['full']['mean']:.1f}"
    assert rows(page, "A coefficient for each vector")["full"] == ["task", one, "85.0", "77.7"]
    own = list(summary["fine_tuned"].values())[:2]
    named = rows(page, "Named additions")
    assert named["t0 + t1"] == ["full", "80.0", f"{100 * mean([0.8 / o for o in own]):.1f}", "0.75"]
    assert named[""] == ["ae-m2", "75.0", f"{100 * mean([0.75 / o for o in own]):.1f}", "1.25"]


def test_what_was_searched_and_how_it_was_chosen(full_page: tuple[dict[str, Any], str]) -> None:
    text, table = words(full_page[1], "Search"), rows(full_page[1], "Search")
    for said in (
        "17 candidates, 1,234 evaluations, 56,789 validation images",
        "The objective, subsets,",
        "at most 1.5 points below the best one (svd-m9)",
        "2 stopped early (svd-m1, svd-m2)",
        "odd-m1 (NaN <script>).",
        "validation split only",
        "The test split: read once",
        "The pretrained model has 50.0",
    ):
        assert said in text
    assert table["ae-m2 *"] == ["200.00 kB", "75.0", "74.8"]
    assert table["svd-m1 stopped early, not tested"] == ["–", "–", "–"]
    assert "svd-m2 stopped at 25 %" in table


def test_the_test_objective_is_the_one_of_the_search() -> None:
    summary = make_summary()
    entry = summary["addition"]["ae-m1"]
    for objective, value in (
        ("all", entry["mean"]),
        ("single", entry["subsets"]["1"]),
        ("subsets", mean(list(entry["subsets"].values()))),
    ):
        summary["search"]["objective_of"] = objective
        assert objective_on_test(summary, entry) == value


def test_negation_from_the_vectors_and_from_the_basis_side_by_side(
    full_page: tuple[dict[str, Any], str],
) -> None:
    _, page = full_page
    assert rows(page, "Negation")["group/t0"] == [
        "50.0",
        "20.0 11.1–22.2",
        "30.0 11.1–22.2",
        "96.0",
        "92.0",
        "92.0",
        "2.00",
        "1.40",
    ]
    assert "From the full vectors, 3 of 3 targets fell, on average from 50.0 to 20.0" in words(
        page, "Negation"
    )
    assert "From ae-m2, 3 of 3 targets fell, on average from 50.0 to 30.0" in words(
        page, "Negation"
    )


def test_unseen_tasks_and_disentanglement(full_page: tuple[dict[str, Any], str]) -> None:
    _, page = full_page
    unseen = rows(page, "Unseen tasks")
    assert unseen["new/a"] == ["48", "25.0 20.0–33.3", "2: 31.0 20.0–33.3", "3: 41.0 20.0–33.3"]
    assert unseen["mean"] == ["", "26.0", "32.0", "42.0"]
    assert rows(page, "Weight disentanglement")["group/t0 and group/t1"] == ["0.600", "0.655"]
    assert section(page, "Weight disentanglement").count("<svg") == 1


def test_arrivals_have_the_vectors_themselves_beside_both_bases(
    full_page: tuple[dict[str, Any], str],
) -> None:
    table = rows(full_page[1], "svd-m1-online")
    assert table["2"] == ["60.0", "70.0", "65.0", "75.0", "85.0", "40.0", "50.0", "60.0"]
    assert table["forgetting"] == ["10.0", "0.0", "5.0", "5.0", "5.0", "", "", ""]


def test_the_precision_and_how_well_it_agrees(full_page: tuple[dict[str, Any], str]) -> None:
    assert (
        "Evaluations ran in bf16: bf16 keeps 99.88 % of the answers of fp32 on 2,400 validation images, 98.00 % in "
        "the worst task (cuda)."
    ) in words(full_page[1], "Provenance")


def test_names_and_reasons_are_escaped(full_page: tuple[dict[str, Any], str]) -> None:
    _, page = full_page
    assert "<h1>&lt;i&gt;name&lt;/i&gt;</h1>" in page and "NaN &lt;script&gt;" in page
    assert "<i>name" not in page and "<script" not in page


def test_without_a_basis_the_page_says_why() -> None:
    """None could be measured, so there is no plot of them either."""
    summary = make_summary(chosen=None)
    summary["addition"] = {"full": summary["addition"]["full"]}
    summary["search"]["front"], summary["negation"] = ["full"], negation(summary["tasks"], 40, 2.0)
    page = render(summary, "tiny", HISTORY)
    assert (
        page.count("no basis is better on validation data than &lt;the pretrained&gt; model") == 2
    )
    assert (
        "<b>no basis is chosen</b>" in page and "None" not in page and 'class="chosen"' not in page
    )
    assert len(rows(page, "Addition")["group/t0"]) == 6 and "from the chosen basis" not in page
    assert page.count("<svg") == 6 and "Reconstruction error" not in page
    assert "chosen" not in headline(summary)


def test_one_task() -> None:
    page = render(make_summary(1, sizes=(1,), chosen="ae-m1"), "tiny", [])
    assert "1 task ·" in page and page.count("<svg") == 5
    assert rows(page, "Addition")["vectors"][:4] == [
        "error",
        "all tasks",
        "normalised",
        "mean of sizes",
    ]


# What is printed ----------------------------------------------------------------------------------


def test_the_printed_table_marks_the_choice_and_the_front(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = with_everything(make_summary())
    table, below = printed(summary, capsys)
    assert list(table) == [
        "vectors",
        "full +",
        "ae-m1 +",
        "ae-m2 * +",
        "ae-m2-ties",
        "svd-m1",
        "svd-m2",
        "random-own-m1",
    ]
    assert table["ae-m2 * +"][2:] == ["74.9", "74.8", "200.00 kB"]
    full, one = (100 * summary["addition"][n]["mean"] for n in ("full", "ae-m2"))
    for said in (
        "* chosen on validation data. zero-shot 50.0, fine-tuned 89.0, all tasks added 79.5 (+29.5 points",
        "\n+ Pareto front of the bases",
        "coefficients from 25 % of the validation images: svd-m2\n",
        f"a coefficient for each task: full 85.0 ({full:.1f} with one), ae-m2 85.0 ({one:.1f} with one)",
        "group/t0 + group/t1: full 80.0 (normalised 89.4), ae-m2 75.0 (normalised 83.8)",
        "negation: 3 of 3 targets lowered, on average from 50.0 to 20.0; the control keeps at least 97.5 %",
        "negation from ae-m2: 3 of 3 targets lowered, on average from 50.0 to 30.0",
        "unseen tasks (2): zero-shot 26.0, 2 coefficients of ae-m2 32.0, 3 of the vectors 42.0",
        "disentanglement error (0 to 2), mean of 1 pair: full 0.60, ae-m2 0.66",
        "single tasks (2 looked at) 65.0 at the end, forgetting 5.0 (fitted anew: 75.0, 5.0; vectors "
        "themselves: 85.0, 5.0)",
        "stored: vectors 1.00 MB and masks 100.00 kB, 11.0 %",
    ):
        assert said in below, said


def test_the_printed_results_without_optional_parts(capsys: pytest.CaptureFixture[str]) -> None:
    table, below = printed(make_summary(1, sizes=(1,), chosen="ae-m1"), capsys)
    assert table["vectors"] == ["error", "all 1", "subsets", "bytes"]
    assert [line.split()[0] for line in below.splitlines()] == ["*", "+", "stored:"]


def test_the_printed_results_say_why_nothing_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    summary = make_summary(chosen=None)
    summary["negation"] = negation(summary["tasks"], 40, 2.0)
    table, below = printed(summary, capsys)
    assert not any("*" in name for name in table) and "full +" in table
    assert below.startswith(
        "no basis is chosen: no basis is better on validation data than <the pretrained> model. "
        "zero-shot 50.0"
    )
    assert "negation: 3 of 3" in below and "negation from" not in below


def test_numbers_of_tasks_rise_whatever_the_order_of_the_keys() -> None:
    summary = make_summary(20)
    summary["addition"]["full"]["subsets"] = dict.fromkeys(("1", "10", "20", "5"), 0.5)
    assert subset_sizes(summary) == ["1", "5", "10", "20"]


# What is merged by default ------------------------------------------------------------------------


def test_where_no_basis_is_chosen_the_full_vectors_are_merged(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.write_json("report/summary.json", {"chosen": {"name": None, "reason": "none is better"}})
    with pytest.raises(UserError, match="holds no task vectors yet"):
        merge(store, {"a": 1.0}, tmp_path / "out")
    with pytest.raises(UserError, match="only a basis has vectors to merge like that"):
        merge(store, {}, tmp_path / "out", kind="sum")
