"""The page and the printed results, from summaries created in the tests: they show what the
summaries say.
"""

import html
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from raytvb.cli.printing import print_summary
from raytvb.errors import UserError
from raytvb.evaluation.rows import Row
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import REPORT, SUMMARY, TIMINGS
from raytvb.experiment.metrics import PrecisionMetrics
from raytvb.experiment.parsing import load_experiment
from raytvb.maths.counts import Count, mean, wilson
from raytvb.merging.addends import BasisSum, Tasks
from raytvb.merging.merge import merge
from raytvb.report.accuracies import measured
from raytvb.report.numbers import headline, objective_on_test, overall, subset_sizes
from raytvb.report.page import render
from raytvb.report.summary import summarise
from raytvb.report.summary_contracts import (
    Accuracies,
    AdditionEntry,
    ArrivalAccuracies,
    ChosenBasis,
    Disentanglement,
    NamedAddition,
    NamedAdditionModel,
    Negation,
    NothingChosen,
    Online,
    PairErrors,
    Provenance,
    Spread,
    StoredBytes,
    Summary,
    UnseenEntry,
    UnseenModel,
    WeightedAccuracies,
    read_summary,
)
from raytvb.report.timings import add_timing
from raytvb.search.results import Choice
from raytvb.storage import records
from raytvb.storage.damage import DamagedError
from raytvb.storage.gram_rows import Arrival
from raytvb.storage.sealed_json import json_bytes
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError

ARCHIVE = Path(__file__).parent / "stores" / "format-1.tar.xz"
IMAGES = 200
HISTORY = [Arrival(vectors=n, floor={1: 1 - 0.1 * n}) for n in (1, 2)]
REASON = "no basis is better on validation data than <the pretrained> model"


def accuracies(correct: Mapping[str, int], fine_tuned: Mapping[str, float]) -> Accuracies:
    """Numbers of correct answers out of IMAGES, by task."""
    rows = [Row.of("m", "test", 1, 0, task, 1.0, Count(c, IMAGES)) for task, c in correct.items()]
    return measured(rows, fine_tuned)


def fine_tuned_of(tasks: Sequence[str]) -> dict[str, float]:
    return {task: 0.9 - 0.01 * (i % 20) for i, task in enumerate(tasks)}


def make_entry(
    tasks: Sequence[str], method: str, size: int, gain: float, stored: int
) -> AdditionEntry:
    """A candidate whose accuracies are about 0.6 + gain."""
    correct = {task: round(IMAGES * (0.6 + gain)) - i % 7 for i, task in enumerate(tasks)}
    sizes = sorted({1, max(1, len(tasks) // 2), len(tasks)})
    return AdditionEntry(
        **dict(accuracies(correct, fine_tuned_of(tasks))),
        merge="decoded",
        method=method,
        size=size,
        online=False,
        relative_error=0.5 / (1 + size) if size else 0.0,
        stored_bytes=stored,
        validation_objective=0.6 + gain,
        validation_share=1.0,
        stopped=False,
        coefficient={s: 1 / s for s in sizes},
        own_lengths=dict.fromkeys(sizes, False),
        subsets={s: 0.6 + gain - 0.001 * s for s in sizes},
        spread=Spread(
            mean_absolute_difference=0.012, worst_task=tasks[-1], worst_difference=-0.034
        ),
    )


def make_choice(name: str | None, front: Sequence[str]) -> Choice:
    return Choice(
        name=name,
        reason=None if name else REASON,
        objective_of="subsets",
        tolerance=None,
        best=name,
        zero_shot=0.5,
        front=tuple(front),
        stopped=(),
        invalid={},
        candidates=17,
        evaluations=1234,
        images=56789,
        selection="validation split only",
        test="read once",
    )


def chosen_basis(name: str, entry: AdditionEntry) -> ChosenBasis:
    assert entry.validation_objective is not None
    return ChosenBasis(
        name=name,
        method=entry.method,
        size=entry.size,
        merge=entry.merge,
        coefficient=entry.coefficient,
        own_lengths=entry.own_lengths,
        objective=entry.validation_objective,
        tolerance=None,
        stored_bytes=entry.stored_bytes,
    )


def make_summary(
    count: int = 3,
    methods: Sequence[str] = ("ae", "svd"),
    sizes: Sequence[int] = (1, 2),
    chosen: str | None = "ae-m2",
) -> Summary:
    """A search without optional parts: `count` tasks, the vectors themselves, and bases that gain
    with M.
    """
    tasks = tuple(f"group/t{i}" for i in range(count))
    addition = {"full": make_entry(tasks, "full", 0, 0.2, 100_000 * count)}
    for number, method in enumerate(methods):
        for size in sizes:
            gain = 0.15 * size / max(sizes) + 0.003 * number
            stored = 100_000 * size + number
            addition[f"{method}-m{size}"] = make_entry(tasks, method, size, gain, stored)
    front = [*(f"{methods[0]}-m{size}" for size in sizes), "full"]
    return Summary(
        tasks=tasks,
        zero_shot=dict.fromkeys(tasks, 0.5),
        fine_tuned=fine_tuned_of(tasks),
        addition=addition,
        random_subset={"random-own-m1": make_entry(tasks, "random-subset", 1, 0.05, 100_000)},
        additions=(),
        negation={},
        negation_basis={},
        unseen={},
        disentanglement=(),
        online={},
        mask_overlap=None,
        chosen=chosen_basis(chosen, addition[chosen]) if chosen else NothingChosen(reason=REASON),
        search=make_choice(chosen, front),
        stored_bytes=StoredBytes(
            dense_fp32=10_000_000, vectors=1_000_000, masks=100_000, heads=1000, basis=1
        ),
        seconds={"finetune": 12.0},
        floor={},
        provenance=Provenance(
            experiment={"evaluate": {"keep": 0.95}},
            base="0" * 64,
            selection="validation split only",
            test="read once",
            precision=PrecisionMetrics(use="fp32"),
            versions={},
        ),
    )


def negation(tasks: Sequence[str], after: int, coefficient: float) -> dict[str, Negation]:
    entry = Negation(
        before=0.5,
        after=after / IMAGES,
        control_before=0.96,
        control_after=0.92,
        coefficient=coefficient,
        control_validation_before=0.8,
        control_validation_after=0.78,
        interval=(0.111, 0.222),
    )
    return dict.fromkeys(tasks, entry)


def changed(summary: Summary, **fields: object) -> Summary:
    """The summary with other values of some fields."""
    return summary.model_copy(update=fields)


def with_entry(summary: Summary, name: str, base: str = "", **fields: object) -> Summary:
    """The summary with a candidate: that of the name, or `base`, with other values of fields."""
    entry = summary.addition[base or name].model_copy(update=fields)
    return changed(summary, addition=summary.addition | {name: entry})


def with_search(summary: Summary, **fields: object) -> Summary:
    return changed(summary, search=summary.search.model_copy(update=fields))


def unseen_entry(shift: float, vectors: int) -> UnseenEntry:
    def model(accuracy: float, coefficients: int) -> UnseenModel:
        return UnseenModel(
            accuracy=accuracy + shift, interval=(0.2, 0.333), coefficients=coefficients
        )

    return UnseenEntry(
        images=48, zero_shot=model(0.25, 0), basis=model(0.31, 2), full=model(0.41, vectors)
    )


def online_entry(tasks: Sequence[str]) -> Online:
    def of_kind(accuracy: float) -> ArrivalAccuracies:
        return ArrivalAccuracies(
            accuracy=((accuracy, None), (accuracy - 0.1, accuracy)),
            mean=(accuracy, accuracy - 0.05),
            added=(accuracy - 0.2, accuracy - 0.3),
            forgetting={tasks[0]: 0.1, tasks[1]: 0.0},
        )

    return Online(
        method="svd",
        size=1,
        arrivals=(1, 2),
        tasks=tuple(tasks),
        online=of_kind(0.7),
        offline=of_kind(0.8),
        full=of_kind(0.9),
    )


def with_weights(summary: Summary) -> Summary:
    """A coefficient for each task, for the full vectors and the chosen basis."""
    correct = dict.fromkeys(summary.tasks, 170)
    weighted = WeightedAccuracies(
        **dict(accuracies(correct, summary.fine_tuned)),
        kind="per-task",
        weights=(0.5,) * len(summary.tasks),
        validation_accuracy=0.777,
    )
    assert summary.chosen.name is not None
    for name in ("full", summary.chosen.name):
        summary = with_entry(summary, name, weighted=weighted)
    return summary


def with_named_addition(summary: Summary, pair: Sequence[str]) -> Summary:
    models = {}
    for name, coefficient, correct in (("full", 0.75, 160), (summary.chosen.name, 1.25, 150)):
        assert name is not None
        found = accuracies(dict.fromkeys(pair, correct), summary.fine_tuned)
        models[name] = NamedAdditionModel(**dict(found), coefficient=coefficient)
    return changed(summary, additions=(NamedAddition(tasks=tuple(pair), models=models),))


def with_everything(summary: Summary) -> Summary:
    """The optional parts as well, for a chosen basis."""
    tasks, chosen = summary.tasks, summary.chosen.name
    assert chosen is not None
    summary = with_named_addition(with_weights(summary), tasks[:2])
    ties = accuracies(dict.fromkeys(tasks, 123), summary.fine_tuned)
    summary = with_entry(summary, "ae-m2-ties", "ae-m2", merge="ties", **dict(ties))
    summary = with_entry(summary, "svd-m2", stopped=True, validation_share=0.25)
    summary = with_search(summary, stopped=("svd-m1", "svd-m2"))
    matrix = ((0.0, 0.4), (0.8, 1.2))
    errors = {
        "full": PairErrors(error=matrix, mean=0.6),
        chosen: PairErrors(error=matrix, mean=0.655),
    }
    pair = Disentanglement(tasks=(tasks[0], tasks[1]), coefficients=(-1.0, 1.0), models=errors)
    return changed(
        summary,
        negation=negation(tasks, 40, 2.0),
        negation_basis=negation(tasks, 60, 1.4),
        unseen={
            "new/a": unseen_entry(0.0, len(tasks)),
            "new/b": unseen_entry(0.02, len(tasks)),
        },
        disentanglement=(pair,),
        online={"svd-m1-online": online_entry(tasks[:2])},
    )


def section(page: str, heading: str) -> str:
    """The text between a heading and the next one."""
    return (
        re.split(rf"<h[23]>{re.escape(heading)}</h[23]>", page)[1].split("<h2>")[0].split("<h3>")[0]
    )


def rows(page: str, heading: str = "") -> dict[str, list[str]]:
    """The cells of each table row in a section, as a reader sees them, by the row's first cell."""
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
    summary: Summary, capsys: pytest.CaptureFixture[str]
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
def full_page() -> tuple[Summary, str]:
    """A summary with everything and its page."""
    summary = with_everything(make_summary())
    no_shares = dict.fromkeys(summary.tasks)  # a fine-tuned model without any right answer
    summary = with_entry(summary, "svd-m2", normalised=no_shares, normalised_mean=None)
    summary = with_entry(summary, "ae-m2-sum", "ae-m2", merge="sum", subsets={3: 0.7})
    addition = dict(summary.addition)
    del addition["svd-m1"]  # stopped early, and not at M = T/2
    summary = with_search(
        changed(summary, addition=addition),
        tolerance=0.015,
        best="svd-m9",
        invalid={"odd-m1": "NaN <script>"},
        front=("svd-m1", "ae-m1", "ae-m2", "svd-m2", "full"),
    )
    precision = PrecisionMetrics(
        use="bf16", agreement=0.99876, worst_task=0.98, images=2400, device="cuda"
    )
    provenance = summary.provenance.model_copy(update={"precision": precision})
    summary = changed(summary, provenance=provenance)
    return summary, render(summary, "<i>name</i>", HISTORY)


def test_a_plain_page_has_its_plots_inline_and_fetches_nothing() -> None:
    summary = make_summary()
    page = render(changed(summary, negation=negation(summary.tasks, 40, 2.0)), "tiny", HISTORY)
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


def test_the_table_of_additions(full_page: tuple[Summary, str]) -> None:
    summary, page = full_page
    table, entry = rows(page, "Addition"), summary.addition["ae-m2"]
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
    assert entry.normalised_mean is not None
    assert table["ae-m2 * +"] == [
        "0.167",
        f"{100 * entry.mean:.1f}",
        f"{100 * entry.normalised_mean:.1f}",
        "74.9",
        "74.8",
        "1.2",
        "t2 -3.4",
        "200.00 kB",
    ]
    assert {"full +", "ae-m1 +", "random-own-m1"} < set(table) and "ae-m2-ties" not in table
    assert table["ae-m2-sum"][3:5] == ["–", "–"]
    assert table["svd-m2 + stopped at 25 %"][2] == "–"
    assert rows(page, "Other merge methods")["ae-m2-ties"][1] == "61.5"


def test_every_task_has_its_interval_and_counts(full_page: tuple[Summary, str]) -> None:
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
    full_page: tuple[Summary, str],
) -> None:
    summary, page = full_page
    one = f"{100 * summary.addition['full'].mean:.1f}"
    assert rows(page, "A coefficient for each vector")["full"] == ["task", one, "85.0", "77.7"]
    own = list(summary.fine_tuned.values())[:2]
    named = rows(page, "Named additions")
    assert named["t0 + t1"] == ["full", "80.0", f"{100 * mean([0.8 / o for o in own]):.1f}", "0.75"]
    assert named[""] == ["ae-m2", "75.0", f"{100 * mean([0.75 / o for o in own]):.1f}", "1.25"]


def test_what_was_searched_and_how_it_was_chosen(full_page: tuple[Summary, str]) -> None:
    text, table = words(full_page[1], "Search"), rows(full_page[1], "Search")
    for said in (
        "17 candidates, 1,234 evaluations, 56,789 validation images",
        "The objective, subsets,",
        "at most 1.5 points below the best one (svd-m9)",
        "The search stopped early for 2 (svd-m1, svd-m2)",
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
    entry = summary.addition["ae-m1"]
    for objective, value in (
        ("all", entry.mean),
        ("single", entry.subsets[1]),
        ("subsets", overall(entry)),
    ):
        assert objective_on_test(with_search(summary, objective_of=objective), entry) == value


def test_negation_from_the_vectors_and_from_the_basis_side_by_side(
    full_page: tuple[Summary, str],
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


def test_unseen_tasks_and_disentanglement(full_page: tuple[Summary, str]) -> None:
    _, page = full_page
    unseen = rows(page, "Unseen tasks")
    assert unseen["new/a"] == ["48", "25.0 20.0–33.3", "2: 31.0 20.0–33.3", "3: 41.0 20.0–33.3"]
    assert unseen["mean"] == ["", "26.0", "32.0", "42.0"]
    assert rows(page, "Weight disentanglement")["group/t0 and group/t1"] == ["0.600", "0.655"]
    assert section(page, "Weight disentanglement").count("<svg") == 1


def test_arrivals_have_the_vectors_themselves_beside_both_bases(
    full_page: tuple[Summary, str],
) -> None:
    table = rows(full_page[1], "svd-m1-online")
    assert table["2"] == ["60.0", "70.0", "65.0", "75.0", "85.0", "40.0", "50.0", "60.0"]
    assert table["forgetting"] == ["10.0", "0.0", "5.0", "5.0", "5.0", "", "", ""]


def test_the_precision_and_how_well_it_agrees(full_page: tuple[Summary, str]) -> None:
    assert (
        "Evaluations ran in bf16: bf16 keeps 99.88 % of the answers of fp32 on 2,400 validation "
        "images, 98.00 % in the worst task (cuda)."
    ) in words(full_page[1], "Provenance")


def test_names_and_reasons_are_escaped(full_page: tuple[Summary, str]) -> None:
    _, page = full_page
    assert "<h1>&lt;i&gt;name&lt;/i&gt;</h1>" in page and "NaN &lt;script&gt;" in page
    assert "<i>name" not in page and "<script" not in page


def test_without_a_basis_the_page_says_why() -> None:
    """No candidate could be measured, so there is no plot either."""
    summary = make_summary(chosen=None)
    summary = changed(
        with_search(summary, front=("full",)),
        addition={"full": summary.addition["full"]},
        negation=negation(summary.tasks, 40, 2.0),
    )
    page = render(summary, "tiny", HISTORY)
    assert (
        page.count("no basis is better on validation data than &lt;the pretrained&gt; model") == 2
    )
    assert (
        "<b>no basis is chosen</b>" in page and "None" not in page and 'class="chosen"' not in page
    )
    assert len(rows(page, "Addition")["group/t0"]) == 6 and "from the chosen basis" not in page
    assert page.count("<svg") == 6 and "Reconstruction error" not in page
    assert headline(summary).chosen is None


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
    full, one = (100 * summary.addition[n].mean for n in ("full", "ae-m2"))
    for said in (
        "* chosen on validation data. zero-shot 50.0, fine-tuned 89.0, all tasks added 79.5 (+29.5 "
        "points",
        "\n+ on the Pareto front of the bases",
        "coefficients from 25 % of the validation images: svd-m2\n",
        f"a coefficient for each task: full 85.0 ({full:.1f} with one), "
        f"ae-m2 85.0 ({one:.1f} with one)",
        "group/t0 + group/t1: full 80.0 (normalised 89.4), ae-m2 75.0 (normalised 83.8)",
        "negation: 3 of 3 targets lowered, on average from 50.0 to 20.0; "
        "the control keeps at least 97.5 %",
        "negation from ae-m2: 3 of 3 targets lowered, on average from 50.0 to 30.0",
        "unseen tasks (2): zero-shot 26.0, 2 coefficients of ae-m2 32.0, "
        "3 coefficients of the task vectors 42.0",
        "disentanglement error (0 to 2), mean of 1 pair: full 0.60, ae-m2 0.66",
        "single tasks (mean of 2) 65.0 at the end, forgetting 5.0 (fitted anew: 75.0, 5.0; "
        "vectors themselves: 85.0, 5.0)",
        "stored: vectors 1.00 MB and masks 100.00 kB, 11.0 %",
    ):
        assert said in below, said


def test_the_printed_results_without_optional_parts(capsys: pytest.CaptureFixture[str]) -> None:
    table, below = printed(make_summary(1, sizes=(1,), chosen="ae-m1"), capsys)
    assert table["vectors"] == ["error", "all 1", "subsets", "bytes"]
    assert [line.split()[0] for line in below.splitlines()] == ["*", "+", "stored:"]


def test_the_printed_results_say_why_nothing_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    summary = make_summary(chosen=None)
    summary = changed(summary, negation=negation(summary.tasks, 40, 2.0))
    table, below = printed(summary, capsys)
    assert not any("*" in name for name in table) and "full +" in table
    assert below.startswith(
        "no basis is chosen: no basis is better on validation data than <the pretrained> model. "
        "zero-shot 50.0"
    )
    assert "negation: 3 of 3" in below and "negation from" not in below


def test_numbers_of_tasks_rise_whatever_the_order_of_the_keys() -> None:
    subsets = dict.fromkeys((1, 10, 20, 5), 0.5)
    assert subset_sizes(with_entry(make_summary(20), "full", subsets=subsets)) == [1, 5, 10, 20]


# The summary in the store -------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["ae-m2", None])
def test_a_summary_is_read_back_as_it_was_written(tmp_path: Path, chosen: str | None) -> None:
    store = Store(str(tmp_path / "store"))
    summary = make_summary(12, chosen=chosen)
    if chosen:
        summary = with_everything(summary)
    records.commit(store, REPORT, identity={}, files={SUMMARY: json_bytes(summary.to_json())})
    assert read_summary(store) == summary
    store.delete(f"{REPORT}/{records.RECORD}")  # the file by itself cannot be checked
    with pytest.raises(DamagedError, match=r"summary\.json .*its record is missing"):
        read_summary(store)


def test_the_keys_of_the_summary_file() -> None:
    """Scripts read the file. Absent parts have no key, and empty values are null."""
    plain = make_summary(12, chosen=None).to_json()
    fields = json.loads(json.dumps(plain))
    assert fields["chosen"] == {"name": None, "reason": REASON}
    assert fields["search"]["reason"] == REASON and fields["mask_overlap"] is None
    assert fields["provenance"]["precision"] == {"use": "fp32"}
    entry = fields["addition"]["full"]
    assert "weighted" not in entry and list(entry["subsets"]) == ["1", "6", "12"]
    assert entry["counts"]["group/t0"] == [160, IMAGES] and len(entry["interval"]["group/t0"]) == 2
    fields = json.loads(json.dumps(with_everything(make_summary()).to_json()))
    assert "reason" not in fields["search"] and "reason" not in fields["chosen"]
    assert fields["chosen"]["tolerance"] is None
    assert fields["addition"]["full"]["weighted"]["kind"] == "per-task"
    assert fields["online"]["svd-m1-online"]["full"]["accuracy"][0] == [0.9, None]
    assert fields["disentanglement"][0]["models"]["full"]["error"][1] == [0.8, 1.2]


@pytest.fixture
def finished_store(tmp_path: Path) -> tuple[Store, Experiment]:
    """A finished store that an earlier version wrote, and its experiment."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "format-1"
    store = Store(str(folder / "shared"))
    return store, load_experiment(folder / "shared.yaml", {"store": store.url})


def _rounded(summary: object) -> object:
    """The summary with 12 digits of each number: the others depend on the kind of processor."""
    return json.loads(json.dumps(summary), parse_float=lambda text: float(f"{float(text):.12g}"))


def test_a_finished_store_has_the_same_summary_again(
    finished_store: tuple[Store, Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes come from the listing: a request for each file would take minutes on a large store."""
    store, experiment = finished_store
    written = store.read_json(f"{REPORT}/{SUMMARY}")
    monkeypatch.delattr(Store, "size")
    again = json.loads(json.dumps(summarise(store, experiment).to_json()))
    del written["provenance"]["versions"], again["provenance"]["versions"]
    assert _rounded(again) == _rounded(written)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"basis": "long"}', b'{"basis": NaN}', b"\xff"])
def test_damaged_timings_count_as_absent(
    finished_store: tuple[Store, Experiment], data: bytes
) -> None:
    store, experiment = finished_store
    assert summarise(store, experiment).seconds
    store.write("report/timings.json", data)  # where format 1 has them
    assert summarise(store, experiment).seconds == {}
    add_timing(store, "basis", 2.5)
    assert summarise(store, experiment).seconds == {"basis": 2.5}
    store.write(f"{TIMINGS}/record.json", data)
    assert summarise(store, experiment).seconds == {}


@pytest.mark.parametrize(
    ("key", "damage", "problem"),
    [
        ("base", {"metrics": {}}, "parameters: Field required"),
        ("base", {"parents": {}}, "parents.fingerprint: Field required"),
        ("basis/svd-m2", {"metrics": {}}, "tasks: Field required"),
        ("search/full", {"metrics": {}}, "objective: Field required"),
        ("search", {"metrics": {"name": "ae-m99"}}, "name: ae-m99 is not among the tested"),
    ],
)
def test_a_damaged_record_is_named(
    finished_store: tuple[Store, Experiment], key: str, damage: dict[str, Any], problem: str
) -> None:
    store, experiment = finished_store
    record = store.read_json(f"{key}/record.json")
    if damage.get("metrics"):
        damage = {"metrics": record["metrics"] | damage["metrics"]}
    store.write_json(f"{key}/record.json", record | damage)
    where = re.escape(store.where(f"{key}/record.json"))
    with pytest.raises(StoreError, match=f"{where} cannot be read: {problem}"):
        summarise(store, experiment)


@pytest.mark.parametrize(
    "name", ["models", "svd-m2", "online/svd-m2-online", "negation-full/glyphs/greek-blur"]
)
def test_a_missing_evaluation_is_named(finished_store: tuple[Store, Experiment], name: str) -> None:
    store, experiment = finished_store
    store.delete(f"evals/{name}.parquet")
    with pytest.raises(UserError, match=f"{name} has not been evaluated yet: run `raytvb run`"):
        summarise(store, experiment)


def test_a_missing_search_is_named(finished_store: tuple[Store, Experiment]) -> None:
    store, experiment = finished_store
    store.delete("search/full/record.json")
    with pytest.raises(UserError, match="full has not been searched yet: run `raytvb run`"):
        summarise(store, experiment)


# What is merged by default ------------------------------------------------------------------------


def test_where_no_basis_is_chosen_the_full_vectors_are_merged(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    store.write_json("report/summary.json", {"chosen": {"name": None, "reason": "none is better"}})
    with pytest.raises(UserError, match="holds no task vectors yet"):
        merge(store, Tasks({"a": 1.0}), tmp_path / "out")
    with pytest.raises(UserError, match="`--merge sum` and --vector need the vectors of a basis"):
        merge(store, BasisSum(), tmp_path / "out")


@pytest.mark.parametrize("key", ["search", "basis/svd-m2", "search/svd-m2"])
def test_a_merge_names_the_record_that_lacks_its_metrics(
    finished_store: tuple[Store, Experiment], key: str, tmp_path: Path
) -> None:
    """Otherwise a merge would silently have another coefficient than the search chose."""
    store, experiment = finished_store
    path = f"{key}/record.json"
    store.write_json(path, store.read_json(path) | {"metrics": {}})
    tasks = Tasks(dict.fromkeys(experiment.task_names, 1.0))
    basis = None if key == "search" else "svd-m2"
    with pytest.raises(StoreError, match=f"{re.escape(store.where(path))} cannot be read: "):
        merge(store, tasks, tmp_path / "out", basis=basis)
