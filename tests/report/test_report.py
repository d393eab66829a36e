"""What a run prints and leaves behind: the verdict's sentences, plain text in pipes, pictures that
are whole."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from lockstep.common.config import BACKENDS
from lockstep.common.data import Dataset
from lockstep.common.errors import RecordError
from lockstep.common.report import Terminal, jsonable, safe, sentence, write_json, write_pictures
from lockstep.common.report.charts import loss_gap, running_mean
from lockstep.common.report.figures import COLOURS, drawing, label, new_figure, to_png, to_svg
from lockstep.common.report.terminal import condense, extreme, merge
from lockstep.common.runs.record import Record
from lockstep.common.verdict import locate
from lockstep.common.verdict.comparison import Divergence

HOSTILE = (
    "<script>alert(1)</script>",
    "\x1b[31mred\x1b[0m",
    "$x_1$ costs $",
    "[red]bold[/red]",
    "猫\n\udce9",
)
PLAIN = ("plane", "car", "bird", "cat", "deer")
STEPS = 40
PICTURES = [
    "samples.png", "predictions.png", "losses.png", "losses.svg", "classes.png", "classes.svg",
    "confusion.png", "confusion.svg", "course.png", "course.svg",
]  # fmt: skip


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


class Ascii(io.TextIOWrapper):
    """A pipe of a process whose locale knows ASCII only."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", errors="strict")

    def text(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode("ascii")


def record(backend: str, dtype: str, noise: float = 0.0, twin: int | None = None) -> Record:
    loss = np.linspace(2.3, 1.1, STEPS)
    loss = loss + noise * np.sin(np.arange(STEPS)) * np.arange(STEPS)
    ones, guesses = np.ones(STEPS), np.arange(10) % 3
    made = Record(backend, dtype, twin, {}, {}, {}, "", loss, ones, ones, guesses, 1.2, 3.0, 1234.5)
    return dataclasses.replace(made, batch_digests=np.arange(STEPS))


def lens(
    dtype: str, verdict: str, classes: tuple[str, ...], backends: tuple[str, ...]
) -> dict[str, Any]:
    both, bad = len(backends) == 2, verdict == "disagree"
    message = "loss: step 17: torch=2.3019 flax=2.3044, gap 2.5e-03 > 4.0e-07"
    row = {
        "step": 0,
        "stage": "forward",
        "tensor": "logits",
        "gap": 1e-16,
        "bound": 1e-13,
        "agrees": True,
    }
    stretch = {
        "quantity": "loss",
        "start": 0,
        "stop": STEPS,
        "gap": 1.1e-15,
        "drift": None,
        "bound": 1e-12,
    }
    first = {
        "step": 17,
        "stage": "loss",
        "tensor": "loss",
        "gap": 2.5e-3,
        "bound": 4e-7,
        "torch": 2.3,
        "flax": 2.3,
    }
    return {
        "dtype": dtype,
        "steps": STEPS,
        "verdict": verdict,
        "score": (2.5 if bad else 0.25) if both else None,
        "max_abs_loss_gap": 1.1e-15 if both else None,
        "bound": {
            "rule": "a hundred times the largest gap that was measured over 37,500 steps of the same network"
        },
        "first_divergence": first | {"message": message} if bad else None,
        "ladder": [row, row | {"tensor": "conv1", "gap": None, "agrees": not bad}] if both else [],
        "stretches": [stretch | {"agrees": not bad}] if both else [],
        "final_loss": dict.fromkeys(backends, 1.1),
        "test_loss": dict.fromkeys(backends, None),
        "accuracy": dict.fromkeys(backends, 0.6),
        "per_class_accuracy": {
            name: {c: k / 5 if k else None for k, c in enumerate(classes)} for name in backends
        },
        "predictions_equal": 9 if both else None,
        "predictions_total": 10,
        "twins": {name: [{"max_abs_loss_gap": 0.1, "predictions_equal": 8}] for name in backends}
        if both
        else {},
        "steps_per_second": dict.fromkeys(backends, 1234.5),
        "seconds": dict.fromkeys(backends, 3.0),
    }


def found(tensor: str = "conv1", **changes: Any) -> dict[str, Any]:
    """What `locate` says of where two runs part."""
    first = Divergence(17, "forward", tensor, 2.0, 1e-7, BACKENDS, (1.0, 3.0))
    pair = np.array([[1.0, 2.0], [np.nan, 4.0]]), np.array([[3.0, 2.0], [3.0, 1 / 3]])
    how = "replayed: both took step 17 from the state that torch had before it"
    return locate.describe(first, pair, how).to_json() | changes


def make(
    *verdicts: str, classes: tuple[str, ...] = PLAIN, backends: tuple[str, ...] = ("torch", "flax")
) -> dict[str, Any]:
    lenses = [
        lens(dtype, v, classes, backends)
        for dtype, v in zip(("float64", "float32"), verdicts, strict=False)
    ]
    verdict = "disagree" if "disagree" in verdicts else verdicts[0]
    return {"schema": 1, "verdict": verdict, "data": {"classes": list(classes)}, "lenses": lenses}


def dataset(classes: tuple[str, ...] = PLAIN) -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    labels = np.arange(10) % len(classes)
    return Dataset("small", pixels, labels, pixels, labels, classes)


def pictures(
    folder: Path, classes: tuple[str, ...] = PLAIN, backends: tuple[str, ...] = ("torch", "flax")
) -> list[Path]:
    both = len(backends) == 2
    report = make(
        *(("disagree", "agree") if both else ("single", "single")),
        classes=classes,
        backends=backends,
    )
    noise = {"torch": 0.0, "flax": 1e-6}
    records = {d: {b: record(b, d, noise[b]) for b in backends} for d in ("float64", "float32")}
    twins = {"float32": {b: [record(b, "float32", 1e-5, 1)] for b in backends}} if both else {}
    return write_pictures(folder, report, records, dataset(classes), twins, np.arange(10)[::-1])


def printed(report: dict[str, Any], quiet: bool = False, verbose: bool = True) -> str:
    out = io.StringIO()
    Terminal(quiet, out, io.StringIO(), verbose=verbose).verdict(report)
    return out.getvalue()


def test_the_verdict_of_runs_that_agree_names_each_lens_and_its_bound() -> None:
    assert sentence(make("agree", "agree")) == (
        "The two runs agree: float64 within 1.1e-15 over 40 steps (bound 1e-12); float32 within what rounding explains."
    )


def test_the_verdict_of_runs_that_disagree_says_where_they_part() -> None:
    assert sentence(make("disagree", "agree")) == (
        "The two runs disagree. float64: loss: step 17: torch=2.3019 flax=2.3044, gap 2.5e-03 > 4.0e-07. "
        "float32 within what rounding explains."
    )


def test_without_a_named_divergence_the_verdict_falls_back_to_the_first_stretch_that_fails() -> (
    None
):
    report = make("disagree")
    report["lenses"][0]["first_divergence"] = None
    assert (
        sentence(report)
        == "The two runs disagree. float64: loss: steps 0 to 39: gap 1.1e-15 > 1e-12."
    )


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_the_verdict_of_a_single_run_compares_nothing(backend: str) -> None:
    report = make("single", "single", backends=(backend,))
    assert sentence(report) == f"Trained {backend} alone; nothing to compare it with."
    assert "Predictions equal" not in printed(report)


@pytest.mark.parametrize(
    "verdicts", [("agree", "agree"), ("disagree", "agree"), ("single",)], ids="-".join
)
@pytest.mark.parametrize(
    "classes",
    [PLAIN, HOSTILE, tuple("w" * 50 + c for c in PLAIN)],
    ids=["plain", "hostile", "long"],
)
def test_what_goes_to_a_pipe_is_plain_text_of_eighty_columns(
    verdicts: tuple[str, ...], classes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    text = printed(
        make(
            *verdicts,
            classes=classes,
            backends=("torch", "flax") if len(verdicts) == 2 else ("flax",),
        )
    )
    assert max(map(len, text.splitlines())) <= 80
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_a_failure_is_marked_in_words_and_what_is_not_finite_says_so() -> None:
    text = printed(make("disagree"))
    assert "DISAGREE" in text and " NO\n" in text and "not finite" in text and "no images" in text
    assert " NO\n" not in printed(make("agree"))


def located(found: dict[str, Any]) -> str:
    out = io.StringIO()
    Terminal(stdout=out, stderr=io.StringIO()).located(found)
    return out.getvalue()


def test_where_runs_part_is_shown_with_what_is_likely_and_the_entries_that_differ_most() -> None:
    text = located(found(pattern="flax is 3 times torch"))
    flat = " ".join(text.split())
    assert (
        "Where they differ first: forward: step 17: conv1: torch=1 flax=3, gap 2.0e+00 > 1.0e-07 (replayed: both"
        in flat
    )
    assert "In conv1: flax is 3 times torch." in flat
    assert flat.count("A likely cause: ") == 2 and "padding (Flax pads SAME by default)" in flat
    rows = text[text.index("largest differences in conv1") :].splitlines()
    assert rows[0].split() == ["largest", "differences", "in", "conv1", "torch", "flax"]
    assert [row.split() for row in rows[2:5]] == [
        ["[1,", "0]", "not", "finite", "3"],
        ["[1,", "1]", "4", "0.333333333"],
        ["[0,", "0]", "1", "3"],
    ]
    assert len(rows) == 5  # what is the same is no difference


def test_where_runs_part_is_said_without_what_is_not_known() -> None:
    text = located(found(pattern=None, offenders=[], causes=[]))
    assert (
        text.startswith("Where they differ first: ")
        and "likely" not in text
        and "largest" not in text
        and "In " not in text
    )


def test_a_report_of_runs_that_disagree_shows_where_they_part_and_one_of_runs_that_agree_does_not() -> (
    None
):
    report = make("disagree", "agree")
    assert "Where they differ first" not in printed(report)
    report["lenses"][0]["located"] = found()
    assert printed(report).count("Where they differ first") == 1
    assert "Where they differ first" not in printed(report, quiet=True)


@pytest.mark.parametrize("name", [*HOSTILE, "w" * 70])
def test_where_runs_part_is_plain_text_of_eighty_columns_whatever_a_layer_is_called(
    name: str,
) -> None:
    text = located(found(name, pattern=name))
    assert max(map(len, text.splitlines())) <= 80
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert text.splitlines()[-1].split() == [
        "[0,",
        "0]",
        "1",
        "3",
    ]  # a long name leaves room for the numbers


def test_the_drift_of_the_twins_stands_beside_the_gap() -> None:
    report = make("agree", "agree")
    report["lenses"][1]["stretches"] = [
        report["lenses"][1]["stretches"][0] | {"gap": 3e-6, "drift": 2e-6, "bound": 1.6e-5},
        report["lenses"][1]["stretches"][0]
        | {"quantity": "mean loss", "gap": 1e-6, "drift": None, "bound": 1e-5},
    ]
    rows = [line.split() for line in printed(report).splitlines()]
    assert ["loss", "0", "to", "39", "3e-06", "2e-06", "1.6e-05", "ok"] in rows
    assert ["mean", "loss", "0", "to", "39", "1e-06", "-", "1e-05", "ok"] in rows


def test_float64_runs_that_needed_twins_say_that_rounding_was_amplified() -> None:
    report = make("agree")
    report["lenses"][0]["bound"]["twins"] = 4
    report["lenses"][0]["max_abs_loss_gap"] = 3e-9
    assert sentence(report) == (
        "The two runs agree: float64 within what rounding explains, which this run amplifies to 3e-09."
    )


def test_neighbouring_stretches_that_read_alike_are_one_row_and_others_are_not() -> None:
    row = {
        "quantity": "lr",
        "start": 0,
        "stop": 1,
        "gap": 0.0,
        "drift": 0.0,
        "bound": 1e-13,
        "agrees": True,
    }
    rows = [row, row | {"start": 1, "stop": 3}, row | {"start": 3, "stop": 10, "gap": 1e-16}]
    rows += [
        row | {"start": 3, "stop": 10, "quantity": "loss"},
        row | {"start": 30, "stop": 40, "quantity": "loss"},
    ]
    assert [(each["quantity"], each["start"], each["stop"]) for each in merge(rows)] == [
        ("lr", 0, 3),
        ("lr", 3, 10),
        ("loss", 3, 10),
        ("loss", 30, 40),
    ]


def test_hostile_names_are_shown_escaped_and_not_obeyed() -> None:
    text = printed(make("agree", classes=HOSTILE))
    assert "\x1b" not in text and r"\x1b[31mred" in text
    assert (
        "<script>" in text
        and "[red]bold" in text
        and "$x_1$ costs $" in text
        and r"猫\n\udce9" in text
    )


def test_a_pipe_that_knows_only_ascii_gets_escapes_instead_of_a_traceback() -> None:
    out = Ascii()
    terminal = Terminal(stdout=out, stderr=io.StringIO(), verbose=True)
    terminal.line("caf\u00e9 [bold] \x07")
    terminal.verdict(make("agree", classes=HOSTILE))
    assert out.text().startswith(r"caf\xe9 [bold] \x07" + "\n\nfloat64, 40 steps")
    assert r"\u732b\n" in out.text()


def test_a_quiet_terminal_prints_the_sentence_alone() -> None:
    out, err = io.StringIO(), Tty()
    terminal = Terminal(True, out, err)
    terminal.line("hello")
    with terminal.progress("torch float64", 10) as advance:
        advance(10, 2.3)
    terminal.verdict(make("single", backends=("torch",)))
    assert out.getvalue() == "Trained torch alone; nothing to compare it with.\n"
    assert err.getvalue() == ""


def test_a_pipe_gets_no_progress_bar() -> None:
    out, err = io.StringIO(), io.StringIO()
    terminal = Terminal(stdout=out, stderr=err)
    with terminal.progress("torch float64", 10) as advance:
        advance(5, 2.3)
        terminal.line("half")
    assert (out.getvalue(), err.getvalue()) == ("half\n", "")


def test_a_terminal_gets_a_bar_on_standard_error_and_the_lines_on_standard_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    out, err = Tty(), Tty()
    terminal = Terminal(stdout=out, stderr=err)
    with terminal.progress("[red]torch\x07", 10) as advance:
        advance(5, 2.25)
        terminal.line("half")
        advance(5, math.nan)
    assert out.getvalue() == "half\n"
    assert (
        "5/10" in err.getvalue()
        and "loss 2.250" in err.getvalue()
        and "loss not finite" in err.getvalue()
    )
    assert "[red]torch" in err.getvalue() and "\x07" not in err.getvalue()


def test_colour_is_for_terminals_and_never_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Tty()
    Terminal(stdout=out, stderr=Tty(), verbose=True).verdict(make("disagree"))
    assert "\x1b[" in out.getvalue() and "NO" in out.getvalue()


def test_the_condensed_ladder_keeps_the_worst_row_of_each_stage() -> None:
    row = {"step": 0, "stage": "forward", "tensor": "a", "gap": 1e-3, "bound": 1.0, "agrees": True}
    rows = [
        row,
        row | {"tensor": "b", "gap": 1e-9, "bound": 1e-8},
        row | {"tensor": "c", "gap": 0.0, "bound": 0.0},
    ]
    rows += [
        row | {"stage": "loss", "gap": 2.0, "agrees": False},
        row | {"stage": "loss", "tensor": "d", "gap": None},
    ]
    rows += [
        row | {"stage": "update", "step": 9, "tensor": "e"},
        row | {"stage": "evaluate", "tensor": "f"},
    ]
    seen = [
        (when, worst["stage"], worst["tensor"], agrees) for when, worst, agrees in condense(rows)
    ]
    assert seen == [
        ("first steps", "forward", "b", True),
        ("first steps", "loss", "a", False),
        ("whole run", "update", "e", True),
        ("whole run", "evaluate", "f", True),
    ]


def test_the_weakest_and_the_strongest_class_leave_out_classes_without_images() -> None:
    accuracy = {"a": None, "b": 0.4, "c": 0.9}
    assert (
        extreme(accuracy, ["a", "b", "c"], True),
        extreme(accuracy, ["a", "b", "c"], False),
    ) == ("b", "c")
    assert extreme({"a": None}, ["a"], True) is None


def test_numbers_that_are_not_finite_become_null_and_numpy_becomes_plain() -> None:
    value = {
        1: np.float32(0.5),
        "n": [math.nan, np.inf, np.int64(3), np.bool_(True)],
        "a": np.array([1.0, -np.inf]),
    }
    assert jsonable(value) == {"1": 0.5, "n": [None, None, 3, True], "a": [1.0, None]}
    assert jsonable((np.array(2), Path("x"), "text", None, True)) == [2, "x", "text", None, True]
    assert type(jsonable(np.bool_(True))) is bool and type(jsonable(np.array(2))) is int


def test_the_report_is_json_that_any_parser_reads(tmp_path: Path) -> None:
    path = write_json(make("agree", classes=HOSTILE) | {"x": math.nan}, tmp_path / "new")
    read = json.loads(path.read_text("ascii"), parse_constant=pytest.fail)
    assert (
        path.name == "report.json"
        and read["x"] is None
        and read["data"]["classes"] == list(HOSTILE)
    )


@pytest.mark.parametrize(
    ("classes", "backends"),
    [(PLAIN, ("torch",)), (HOSTILE, ("torch", "flax")), (("", " ", "car"), ("torch", "flax"))],
    ids=["plain", "hostile", "nameless"],
)
def test_pictures_are_drawn_and_equal_runs_give_equal_bytes(
    tmp_path: Path, classes: tuple[str, ...], backends: tuple[str, ...]
) -> None:
    first, second = (
        pictures(tmp_path / "a", classes, backends),
        pictures(tmp_path / "b", classes, backends),
    )
    assert [path.name for path in first] == PICTURES
    for one, other in zip(first, second, strict=True):
        start = b"\x89PNG\r\n\x1a\n" if one.suffix == ".png" else b'<?xml version="1.0"'
        assert one.read_bytes().startswith(start) and 5_000 < one.stat().st_size < 400_000
        assert one.read_bytes() == other.read_bytes()


def test_the_samples_are_the_images_in_their_order(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).permutation(250)[: 10 * 3].reshape(10, 3).astype(np.uint8)
    plain = np.broadcast_to(colours[:, None, None], (10, 32, 32, 3))
    small = Dataset("small", plain, np.zeros(10, np.int64), plain, np.zeros(10, np.int64), PLAIN)
    report, records = (
        make("agree"),
        {"float64": {b: record(b, "float64") for b in ("torch", "flax")}},
    )
    write_pictures(tmp_path, report, records, small, None, np.arange(10)[::-1])
    picture = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB"))
    middles = []
    for colour in colours[::-1]:
        rows, columns = np.nonzero((picture == colour).all(axis=-1))
        assert len(rows) == pytest.approx(
            126**2, rel=0.05
        )  # 32 by 32, each four dots wide, less the frame
        middles.append((round(rows.mean(), -1), columns.mean()))
    assert middles == sorted(middles)  # eight in the first row, two in the second
    assert [row for row, _ in middles] == [middles[0][0]] * 8 + [middles[8][0]] * 2


def test_a_figure_is_laid_out_once_and_as_matplotlib_would(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    def drawn() -> Any:
        figure = new_figure(3, 2)
        for axes in figure.subplots(1, 2):
            axes.set_title("a title\nof two lines")
            axes.set_ylabel("a label")
        return figure

    execute, laid_out = ConstrainedLayoutEngine.execute, []
    monkeypatch.setattr(
        ConstrainedLayoutEngine,
        "execute",
        lambda engine, figure: (laid_out.append(figure), execute(engine, figure)),
    )
    with drawing():
        figure, theirs, without = drawn(), io.BytesIO(), drawn()
        png, svg = to_png(figure), to_svg(figure)
        assert laid_out == [figure]
        drawn().savefig(theirs, metadata={"Software": None})
        without.set_layout_engine(None)
        assert png == theirs.getvalue() != to_png(without)
        assert svg != to_svg(without)


def test_runs_that_blow_up_or_coincide_can_be_drawn(tmp_path: Path) -> None:
    report = make("agree", "agree")
    wild = record("torch", "float64")
    wild.loss[:] = [1e300, *[np.inf] * 10, *[np.nan] * (STEPS - 11)]
    records = {
        "float64": {"torch": wild, "flax": wild},
        "float32": {b: record(b, "float32") for b in ("torch", "flax")},
    }
    for lens in report["lenses"]:
        lens["stretches"] = []
    assert len(write_pictures(tmp_path, report, records, dataset(), None, None)) == len(PICTURES)


def test_a_run_of_one_step_can_be_drawn(tmp_path: Path) -> None:
    one = record("torch", "float64")
    short = Record(
        **{
            **vars(one),
            **{name: getattr(one, name)[:1] for name in ("loss", "gradient_norm", "lr")},
        }
    )
    report = make("agree")
    assert len(
        write_pictures(tmp_path, report, {"float64": {"torch": short, "flax": short}}, dataset())
    ) == len(PICTURES)


def test_nothing_half_written_is_left_where_the_folder_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError, match="--out"):
        pictures(tmp_path / "file")
    with pytest.raises(RecordError, match="--out"):
        write_json({}, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_a_picture_is_never_a_formula_nor_a_missing_glyph(name: str) -> None:
    assert "$" not in label(name).replace(r"\$", "") and label(name).isprintable()
    assert len(label("w" * 50)) == 16


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_an_svg_is_text_and_no_markup(name: str) -> None:
    with drawing():
        figure = new_figure(3, 2)
        figure.subplots().set_title(label(name, 60))
        svg = to_svg(figure)
    texts = [
        element.text
        for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert label(name, 60).replace(r"\$", "$") in texts and "<script" not in svg


def test_one_svg_differs_from_another_where_the_figures_do() -> None:
    def drawn(colour: str) -> str:
        with drawing():
            figure = new_figure(3, 2)
            figure.subplots().plot([0, 1], [0, 1], color=colour)
            return to_svg(figure)

    assert drawn(COLOURS["torch"]) == drawn(COLOURS["torch"]) != drawn(COLOURS["flax"])


def test_escapes_show_what_a_terminal_would_obey() -> None:
    assert safe("a\x1b[0m\u202e\t\u00e9") == "a\\x1b[0m\\u202e\\t\u00e9"
    assert safe("\u00e9", "ascii") == r"\xe9"


def test_the_running_mean_ends_at_the_step_it_is_drawn_at() -> None:
    x, y = running_mean(np.arange(5.0), 2)
    assert x.tolist() == [1, 2, 3, 4] and y.tolist() == [0.5, 1.5, 2.5, 3.5]


def test_the_gap_of_losses_that_are_not_finite_is_unknown_not_zero() -> None:
    one, other = record("torch", "float64"), record("flax", "float64")
    one.loss[3] = other.loss[3] = np.inf
    gap = loss_gap(one, other)
    assert np.isnan(gap[3]) and not np.delete(gap, 3).any()


def test_neither_rich_nor_matplotlib_is_loaded_before_it_is_used() -> None:
    code = "import sys, lockstep.common.config, lockstep.common.report; print([m for m in ('rich', 'matplotlib') if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
