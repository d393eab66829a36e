"""`report.html`: whatever a run is, its page is whole, says what the data say, and can be read by
everyone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.common.data import Dataset
from lockstep.common.errors import RecordError
from lockstep.common.report import alt_text, chart_data, tables, write_report_page
from lockstep.common.report.figures import VARIABLES
from lockstep.common.report.template import keep_numbers
from lockstep.common.report.text import four_digits
from lockstep.common.runs.record import Record, windows
from tests.marks import slow_except
from tests.report.helpers import HOSTILE, PLAIN, found
from tests.verdict.helpers import compared

MEGABYTE = 1_000_000
STEPS = 40
BOTH = ("torch", "flax")
MANY = tuple(f"class {index}" for index in range(120))
VOID = {"meta", "link", "img", "br", "path", "use", "image", "rect"}


# --- Runs


def dataset(
    classes: tuple[str, ...] = PLAIN, members: int | None = None, images: int = 30
) -> Dataset:
    """Random pictures of the first `members` classes, or of all."""
    pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), np.uint8)
    labels = np.arange(images) % (len(classes) if members is None else members)
    return Dataset("small", pixels, labels, pixels, labels, classes)


def record(
    backend: str,
    dtype: str,
    of: Dataset,
    twin: int | None = None,
    steps: int = STEPS,
    **changes: Any,
) -> Record:
    """A run whose loss falls from 2.3 to 1.1; backends and twins differ by a rounding error, and in
    a few images."""
    generator = np.random.default_rng([len(backend), 0 if twin is None else twin])
    noise = (1e-15 if dtype == "float64" else 1e-6) * generator.normal(size=steps)
    loss, norm = np.linspace(2.3, 1.1, steps) + noise, np.linspace(0.5, 4.0, steps) + noise
    predictions = np.where(np.arange(len(of.test_labels)) % 3, of.test_labels, 0)
    if dtype != "float64" and twin is None and backend == "flax":
        predictions[:2] = (predictions[:2] + 1) % len(of.classes)
    weights = {"fc.bias": np.zeros(3)}
    facts = {
        "classes": list(of.classes),
        "name": "small",
        "digest": "abc",
        "sizes": {"train": 30, "test": 30},
    }
    made = Record(
        backend, dtype, twin, {"steps": steps, "momentum": 0.9, "lr": 0.01}, facts, {"version": "1.0"}, "", loss, norm,
        np.full(steps, 0.01), predictions, 1.2, 3.0, 1234.5, weights, {"0/loss/loss": np.array([2.3])}, [], {}, weights,
        np.arange(steps),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def run(
    of: Dataset, backends: tuple[str, ...] = BOTH, steps: int = STEPS, **changes: Any
) -> tuple[Any, chart_data.Records, chart_data.Twins]:
    """Report, records and twins of a run in both precisions; `changes` are what is different in
    Flax's records."""
    records: chart_data.Records = {
        dtype: {
            name: record(name, dtype, of, steps=steps, **(changes if name == "flax" else {}))
            for name in backends
        }
        for dtype in ("float64", "float32")
    }
    twins = {
        "float32": {
            name: [record(name, "float32", of, twin, steps) for twin in (1, 2)] for name in backends
        }
    }
    lenses = [
        compared(runs, {**twins.get(dtype, {})}, of.test_labels) for dtype, runs in records.items()
    ]
    verdicts = [each["verdict"] for each in lenses]
    report = {
        "schema": 1,
        "verdict": next(
            verdict for verdict in ("disagree", "agree", "single") if verdict in verdicts
        ),
        "command": ["compare.py", "--data", "a folder"],
        "recipe": "quick",
        "config": {"lr": 0.01, "nesterov": False, "schedule": {"kind": "step", "period": 100}},
        "environment": {"torch": {"torch": "2.0", "compiled": True}, "machine": {"commit": None}},
        "data": records["float64"][backends[0]].data,
        "lenses": lenses,
    }
    return report, records, twins


def write(
    folder: Path, of: Dataset, backends: tuple[str, ...] = BOTH, steps: int = STEPS, **changes: Any
) -> str:
    """The page of a run."""
    report, records, twins = run(of, backends, steps, **changes)
    for each in report["lenses"]:
        if each["first_divergence"]:
            together = {"failing": 3, "tensors": 6, "common": "all biases, no kernel"}
            each["located"] = found(**together)
    return write_report_page(folder, report, records, of, twins, np.arange(30)).read_text("utf-8")


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("agreeing"), dataset())


@pytest.fixture(scope="module")
def disagreeing(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(
        tmp_path_factory.mktemp("disagreeing"), dataset(), loss=np.linspace(2.3, 2.0, STEPS)
    )


# --- A page


class Page(HTMLParser):
    """Its elements, in order: a tag, its attributes, and the text within it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open, [self.elements[index] for index in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.elements[self.open[-1]][0] == tag, (
                f"{tag} closes {self.elements[self.open[-1]]}"
            )
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.texts[index] += data

    def of(self, tag: str) -> Iterator[tuple[dict[str, str], str]]:
        for (name, attributes), text in zip(self.elements, self.texts, strict=True):
            if name == tag:
                yield attributes, " ".join(text.split())


def flaws(text: str) -> list[str]:
    """What keeps a page from being whole, or from being read by everyone."""
    page, wrong = Page(text), []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    wrong += [f"two are called {name}" for name in set(ids) if ids.count(name) > 1]
    wrong += [
        f"nothing is called {name}"
        for name in re.findall(r'(?:href="#|url\(#)([^")]+)', text)
        if name not in ids
    ]
    outside = re.findall(
        r'(?:src|href)="(?!#|data:|report\.json")[^"]*"|url\((?!#)[^)]*\)|@import', text
    )
    wrong += [f"from elsewhere: {found}" for found in outside]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    wrong += [f"h{b} after h{a}" for a, b in zip([0, *levels], levels, strict=False) if b > a + 1]
    wrong += [
        "an image without a text" for attributes, _ in page.of("img") if not attributes.get("alt")
    ]
    wrong += [
        "a chart without a text"
        for attributes, _ in page.of("svg")
        if attributes.get("role") != "img" or not attributes.get("aria-label")
    ]
    wrong += [
        "a heading of a table without a scope"
        for attributes, _ in page.of("th")
        if "scope" not in attributes
    ]
    if len(list(page.of("table"))) != len([text for _, text in page.of("caption") if text]):
        wrong.append("a table without a caption")
    regions = [
        attributes["aria-label"]
        for _, attributes in page.elements
        if attributes.get("role") == "region"
    ]
    wrong += [f"two regions are called {name}" for name in set(regions) if regions.count(name) > 1]
    wrong += [
        f"not to be printed: {letter!r}"
        for letter in set(text)
        if not (letter.isprintable() or letter == "\n")
    ]
    return wrong


ODD: dict[str, tuple[Dataset, dict[str, Any]]] = {
    "one backend": (dataset(), {"backends": ("flax",)}),
    "not finite": (dataset(), {"loss": np.r_[2.3, 1e300, np.inf, np.full(STEPS - 3, np.nan)]}),
    "no finite gradient": (dataset(), {"gradient_norm": np.full(STEPS, np.nan)}),
    "predictions missing": (dataset(), {"predictions": np.arange(7)}),
    "no such class": (dataset(), {"predictions": np.arange(30) - 5}),
    "classes without images": (dataset(members=2), {}),
    "two classes": (dataset(("a", "b")), {}),
    "many classes": (dataset(MANY, images=240), {}),
    "names": (dataset(HOSTILE), {}),
    "names without letters": (dataset(("", " ", "\n")), {}),
    "one step": (dataset(), {"steps": 1}),
    "long": (dataset(), {"steps": 20_000}),
}


@pytest.mark.parametrize(
    "case", slow_except(ODD, "one backend", "not finite", "no such class", "names", "one step")
)
def test_the_page_of_any_run_is_whole(tmp_path: Path, case: str) -> None:
    of, changes = ODD[case]
    text = write(tmp_path, of, **changes)
    assert flaws(text) == []
    assert len(text.encode()) < 3 * MEGABYTE


def test_the_pages_of_runs_that_agree_and_that_do_not_are_whole(
    agreeing: str, disagreeing: str
) -> None:
    assert flaws(agreeing) == flaws(disagreeing) == []


@pytest.mark.parametrize(
    ("old", "new", "flaw"),
    [
        ('id="losses"', 'id="accuracy"', "two are called accuracy"),
        ('id="images"', "", "nothing is called images"),
        ('src="data:', 'src="https://example.org/', "from elsewhere"),
        ("<h2", "<h4", "closes"),
        (' alt="training image', ' title="', "an image without a text"),
        ('role="img"', "", "a chart without a text"),
        ("scope=row", "", "without a scope"),
        ("<caption>", "<caption></caption><p>", "closes"),
        ("</h1>", "\x1b</h1>", "not to be printed"),
    ],
)
def test_a_page_that_is_not_whole_is_seen(agreeing: str, old: str, new: str, flaw: str) -> None:
    assert old in agreeing
    try:
        seen = flaws(agreeing.replace(old, new, 1))
    except AssertionError as error:
        seen = [str(error)]
    assert any(flaw in each for each in seen)


def test_equal_runs_give_equal_pages_and_others_do_not(tmp_path: Path, agreeing: str) -> None:
    again, other = (
        write(tmp_path / "again", dataset()),
        write(tmp_path / "other", dataset(), seconds=3.5),
    )
    assert again == agreeing != other


# --- What it says


def said(text: str, start: str) -> str:
    """The text of the chart that begins with `start`."""
    return next(
        label
        for attributes, _ in Page(text).of("svg")
        if (label := attributes["aria-label"]).startswith(start)
    )


def heading(text: str) -> str:
    return next(Page(text).of("h1"))[1]


def test_the_page_begins_with_the_verdict(agreeing: str, disagreeing: str) -> None:
    assert heading(agreeing) == "\N{CHECK MARK} The two runs agree"
    assert "The losses agree within" in agreeing
    assert heading(disagreeing) == "\N{BALLOT X} The two runs disagree"
    assert (
        "<title>Lockstep: net on small, quick recipe: the two runs disagree</title>" in disagreeing
    )


def test_the_first_screen_says_where_they_differ_how_why_and_what_to_try(
    agreeing: str, disagreeing: str
) -> None:
    card = disagreeing.partition('<section class="card')[2].partition("</section>")[0]
    asked = [text for _, text in Page(f"<dl>{card.partition('<dl>')[2]}").of("dt")][:4]
    assert asked == ["Where they differ first", "How", "Likely cause", "Try"]
    assert "float64, step 17, forward pass: conv1" in card and "padding=1" in card
    assert "Where they differ first" not in agreeing


def test_no_line_breaks_within_a_number(agreeing: str) -> None:
    assert re.search(r'<span class="n">\d[\d.]*e-1\d</span>', agreeing)
    assert keep_numbers("a < 6.4e-02, 42 %") == (
        'a &lt; <span class="n">6.4e-02</span>, <span class="n">42 %</span>'
    )


def strip(text: str, dtype: str) -> list[str]:
    """The state of each stage in one precision."""
    found = text.partition(f'aria-label="{dtype}, stage by stage"')[2].partition("</ol>")[0]
    page = Page(found.partition("<ol>")[2])
    return [text for attributes, text in page.of("span") if attributes["class"] == "word"]


def test_the_strip_has_the_state_of_each_stage(
    agreeing: str, disagreeing: str, tmp_path: Path
) -> None:
    assert strip(agreeing, "float64") == [
        *["identical", "identical", "not compared", "within bound"],
        *["within bound", "identical", "identical"],
    ]
    states = strip(disagreeing, "float64")
    assert "differs first" in states and states != strip(agreeing, "float64")
    assert "stage by stage" not in write(tmp_path, dataset(), backends=("flax",))


def test_a_run_that_was_cut_short_says_so_first_and_is_called_neither_good_nor_bad(
    tmp_path: Path,
) -> None:
    of = dataset()
    report, records, twins = run(of)
    del records["float32"]["flax"]
    report["lenses"][1] = compared(records["float32"], {**twins["float32"]}, of.test_labels)
    report["cut_short"] = "flax float32 was interrupted"
    text = write_report_page(tmp_path, report, records, of, twins).read_text("utf-8")
    assert heading(text).endswith("The run was cut short") and flaws(text) == []
    assert next(Page(text).of("h1"))[0]["class"] == "plain"
    assert "flax float32 was interrupted." in text
    assert "torch alone; nothing was compared." in text


def test_how_sure_the_verdict_is_depends_on_what_was_compared(
    agreeing: str, disagreeing: str
) -> None:
    assert "all within their bounds; the largest gap is" in agreeing
    assert "exceed their bounds; the largest gap is" in disagreeing
    assert "exceed their" not in agreeing
    assert (
        "No twins were trained: float64" in agreeing
        and "The losses of the twins (2 of torch and 2 of flax) differ from" in agreeing
    )


def test_the_charts_say_what_they_show(agreeing: str, disagreeing: str) -> None:
    assert said(agreeing, "Training loss, float32") == (
        "Training loss, float32, in nats over 40 steps: torch falls from 2.3 to 1.1; flax falls "
        "from 2.3 to 1.1."
    )
    assert "flax falls from 2.3 to 2." in said(disagreeing, "Training loss, float32")
    assert "The runs diverge at step 1: loss." in said(
        disagreeing, "Gap between the two training losses, float64"
    )
    float64, float32 = said(agreeing, "Gap").split("Gap between the two training losses, ")[1:]
    assert "diverge at" not in said(agreeing, "Gap")
    assert "Twins of one framework differ" not in float64
    assert "Twins of one framework differ by up to" in float32
    assert "The learning rate is 0.01 in every step of all runs." in agreeing
    assert "torch rises from 0.5 to 4" in said(agreeing, "Gradient norm")
    assert "float64: both confusion matrices are equal." in agreeing
    assert said(agreeing, "Difference of the two confusion matrices, float32").endswith(
        "more often."
    )


def test_what_is_not_finite_is_said_from_its_first_step_on() -> None:
    of = dataset()
    runs = {"torch": record("torch", "float64", of), "flax": record("flax", "float64", of)}
    runs["flax"].loss[7:] = np.inf
    assert (
        "flax falls from 2.3 to 2.115; flax is not finite from step 7 on"
        in alt_text.series_text("Loss", runs, "loss")
    )
    runs["flax"].loss[:] = np.nan
    assert "; flax is not finite from step 0 on." in alt_text.series_text("Loss", runs, "loss")


def test_where_they_diverge_is_shown_with_what_usually_causes_that(
    agreeing: str, disagreeing: str
) -> None:
    for said_of_it in (
        "What differs",
        "Likely cause",
        "padding (Flax pads SAME by default)",
    ):
        assert said_of_it in disagreeing and said_of_it not in agreeing
    assert "3 of 6 tensors of the forward pass of that step differ: all biases" in disagreeing


def test_the_images_on_which_the_predictions_differ_are_counted_and_shown(agreeing: str) -> None:
    assert "All 30 predictions are equal." in agreeing
    assert "28 of 30 predictions are equal." in agreeing
    place = agreeing.index("float32: the predictions differ on 2 of 30 test images")
    shown = list(
        Page(agreeing[place:].partition("<ul")[2].partition("</ul>")[0].partition(">")[2]).of("img")
    )
    assert [attributes["alt"] for attributes, _ in shown] == [
        "test image 0: plane",
        "test image 1: car",
    ]


def test_the_command_and_where_the_run_comes_from_are_shown(agreeing: str) -> None:
    assert "python compare.py --data &#39;a folder&#39;" in agreeing
    rows = [" ".join(text.split()) for _, text in Page(agreeing).of("tr")]
    assert {"schedule.period100", "nesterovno", "compiledyes", "commitnone", "digestabc"} <= set(
        rows
    )


def test_names_are_shown_escaped_and_not_obeyed(tmp_path: Path) -> None:
    text = write(tmp_path, dataset(HOSTILE))
    assert text.count("<script") == 1 and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "$x_1$ costs $" in text and r"\x1b[31mred" in text and r"猫\n\udce9" in text


def test_the_charts_are_drawn_in_the_colours_of_the_page(agreeing: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", agreeing, re.DOTALL))
    styles = "".join(re.findall(r'style="[^"]*"', drawn))
    assert not re.search("#[0-9a-f]{6}", styles)
    assert {
        f"var({name})" for name in ("--torch", "--flax", "--text", "--line", "--band", "--bound")
    } <= set(re.findall(r"var\([^)]*\)", styles))
    assert all(f"{name}: #" in agreeing for name in VARIABLES.values())


def test_the_numbers_of_a_long_run_are_thinned_but_for_the_first_and_the_last_step() -> None:
    runs = {name: record(name, "float64", dataset(), steps=20_000) for name in BOTH}
    rows = tables.losses("float64", runs, 400).rows
    steps = [row[0] for row in rows]
    assert 40 < len(rows) <= tables.ROWS and steps[:3] == ["0", "1", "2"] and steps[-1] == "19,999"
    assert rows[0][3] == "-" and rows[-1][3] == four_digits(runs["torch"].loss[-400:].mean())


def test_a_table_of_gaps_has_the_bound_of_each_step() -> None:
    of = dataset()
    report, records, twins = run(of)
    table = tables.gap(report["lenses"][1], records["float32"], twins["float32"])
    bounds = {row.start: row.bound for row in chart_data.loss_bounds(report["lenses"][1])}
    assert set(bounds) == {start for start, _ in windows(STEPS)}
    last = [row[-1] for row in table.rows if int(row[0]) in bounds]
    assert last == [tables.number(bound) for bound in bounds.values()]


# --- What is drawn


def test_a_confusion_matrix_counts_every_image_once_and_leaves_out_what_is_no_class() -> None:
    labels, predictions = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 7, -1])
    assert chart_data.confusion_counts(predictions, labels, 3).tolist() == [
        [1, 1, 0],
        [0, 1, 0],
        [0, 0, 0],
    ]
    assert chart_data.confusion_counts(predictions[:2], labels, 3).sum() == 2


def test_the_shares_of_a_class_add_up_to_one_unless_it_has_no_images() -> None:
    shares = chart_data.shares(np.array([[1, 3], [0, 0]]))
    assert shares.tolist() == [[0.25, 0.75], [0, 0]]


def test_of_many_classes_the_weakest_and_the_strongest_are_drawn() -> None:
    found: Any = {
        "per_class_accuracy": {"torch": {name: (index or None) for index, name in enumerate(MANY)}}
    }
    by_accuracy = chart_data.by_accuracy(found, MANY)
    assert by_accuracy[0] == "class 1" and by_accuracy[-1] == "class 0"
    shown, note = chart_data.shown_classes(found, MANY)
    assert shown[:3] == [1, 2, 3] and shown[-2:] == [119, 0] and len(shown) == 40
    assert note == "the 20 weakest and the 20 strongest of 120 classes"
    assert chart_data.shown_classes(found, MANY[:40]) == (list(range(40)), "")


def test_the_spread_of_twins_is_the_largest_so_far_and_unknown_without_them() -> None:
    of = dataset()
    run, twin = record("torch", "float64", of), record("torch", "float64", of, 1)
    twin.loss[:] = run.loss + np.r_[1, 3, 2, np.zeros(STEPS - 3)]
    spread = chart_data.twin_spread({"torch": run}, {"torch": [twin]})
    assert spread is not None and spread[:4] == pytest.approx([1, 3, 3, 3])
    assert chart_data.twin_spread({"torch": run}, {}) is None


@pytest.mark.parametrize("logarithmic", [False, True])
def test_thinned_indices_keep_both_ends(logarithmic: bool) -> None:
    kept = chart_data.subsample(100_000, logarithmic, 50)
    assert (kept[0], kept[-1]) == (0, 99_999) and len(kept) <= 50 and (np.diff(kept) > 0).all()
    assert chart_data.subsample(50, logarithmic, 50).tolist() == list(range(50))


def test_nothing_half_written_is_left_where_the_folder_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError, match="--out"):
        write(tmp_path / "file", dataset())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
