"""The terminal: a run that was cut short, a standard output left to JSON, and tables that fit
whatever they hold."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest

from lockstep.common.report import Terminal, sentence
from lockstep.common.report.summary import notes
from lockstep.common.report.text import ok
from tests.report.helpers import HOSTILE, PLAIN, Tty, found, make, printed

CUT = "flax float32 was interrupted at step 12 of 500"
LONG = tuple(f"{k}-" + "abcdefghij" * 6 for k in range(10))
COLUMNS = 80


def large(*verdicts: str, classes: tuple[str, ...] = LONG) -> Any:
    """A report whose every table holds the widest that a run can put there."""
    report = make(*verdicts, classes=classes)
    for each in report["lenses"]:
        row = {
            "stage": "update",
            "step": 37_499,
            "tensor": "momentum of layer4.block2.conv1.kernel",
            "bound": 1.2e-300,
        }
        each["steps"] = 37_500
        each["ladder"] += [
            row | {"gap": gap, "agrees": gap is not None} for gap in (2.5e-300, None)
        ]
        each["ladder"].append(
            row | {"stage": "evaluate", "tensor": f"accuracy of {classes[0]}", "gap": 0.1234} | GOOD
        )
        span = {
            "start": 1_000_000,
            "stop": 3_750_000,
            "drift": 1.3e-300,
            "bound": 2.4e-300,
            "agrees": True,
        }
        each["stretches"] += [
            span | {"quantity": name, "gap": None} for name in ("gradient_norm", "mean loss")
        ]
        each["twins"] = {name: [{"predictions_equal": 10_000}] * 6 for name in ("torch", "flax")}
        wide = {"difference": -1.0, "low": -1.0, "high": 1.0, "gap": 1, "spread": 1, "bound": 2}
        each["class_differences"] = dict.fromkeys(classes, wide)
        each["per_class_accuracy"] = {
            name: dict.fromkeys(classes, 1.0) for name in ("torch", "flax")
        }
        each["final_loss"] = {"torch": 1e300, "flax": None}
    return report


GOOD = {"agrees": True}


def unfit(text: str) -> list[str]:
    """The lines that do not fit the page, were cut to fit it, are filled with spaces, or hold what
    is not printable."""
    marks = ("...", "\N{HORIZONTAL ELLIPSIS}")
    return [
        line
        for line in text.split("\n")
        if len(line) > COLUMNS
        or not line.isprintable()
        or any(mark in line for mark in marks)
        or line.endswith(" ")
    ]


def first_column(text: str) -> str:
    """What stands at the beginning of the lines: a name that took several of them is whole
    again."""
    return "".join(line.split(" ")[0] for line in text.splitlines())


def on_a_terminal(report: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a window of 80 columns and 24 lines shows, without its colours and what fills the
    lines."""
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    out = Tty()
    Terminal(stdout=out, stderr=Tty(), verbose=True).verdict(report)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    return "\n".join(line.rstrip() for line in plain.split("\n"))


# --- A run that was cut short


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ((), "Nothing was compared."),
        (("single",), "Nothing was compared."),
        (("agree",), "The two runs agree: float64 within 1.1e-15 over 40 steps (bound 1e-12)."),
        (("disagree",), "The two runs disagree. float64: loss: step 17: torch=2.3019 flax=2.3044"),
        (("agree", "single"), "float32 not compared, torch and flax alone."),
    ],
    ids=["nothing", "single", "agree", "disagree", "agree and single"],
)
def test_a_run_that_was_cut_short_says_so_and_then_what_is_known(
    verdicts: tuple[str, ...], said: str
) -> None:
    report = make(*verdicts or ("agree",))
    if not verdicts:
        report["lenses"] = []
    whole = None if not verdicts else sentence(report)
    report |= {"cut_short": CUT, "verdict": "agree"}
    assert sentence(report).startswith(f"The run was cut short: {CUT}. ") and said in sentence(
        report
    )
    assert whole is None or "cut short" not in whole
    text = printed(report, verbose=False)
    assert " ".join(text.split()).endswith(sentence(report)) and not unfit(text)


def test_a_run_that_was_cut_short_is_never_green(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def opening(**changes: str) -> str:
        out = Tty()
        Terminal(quiet=True, stdout=out, stderr=Tty()).verdict(make("agree") | changes)
        return out.getvalue().partition("The ")[0]

    assert (opening(), opening(cut_short=CUT)) == ("\x1b[1;32m", "\x1b[1m")


# --- A standard output that is left to the report


def everything(terminal: Terminal) -> None:
    terminal.line("hello")
    with terminal.progress("torch float64", 10) as advance:
        advance(5, math.log(10))
        terminal.line("half")
    terminal.table(["name", "count>"], [["one", "1"]])
    terminal.verdict(make("disagree", "agree"))


@pytest.mark.parametrize("stream", [io.StringIO, Tty], ids=["pipe", "terminal"])
def test_with_a_report_in_json_every_line_goes_to_standard_error(
    stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out, err = stream(), stream()
    everything(Terminal(stdout=out, stderr=err, to_stderr=True, verbose=True))
    assert out.getvalue() == ""
    seen = err.getvalue()
    for said in (
        "hello",
        "half",
        "count",
        "The two runs disagree.",
        "test images",
        "Predictions equal",
    ):
        assert said in seen
    out, err = stream(), stream()
    everything(Terminal(stdout=out, stderr=err))
    assert "hello" in out.getvalue() and "hello" not in err.getvalue()


def test_a_quiet_terminal_with_json_prints_the_sentence_on_standard_error() -> None:
    out, err = io.StringIO(), io.StringIO()
    Terminal(True, out, err, to_stderr=True).verdict(make("agree"))
    assert (out.getvalue(), err.getvalue()) == ("", sentence(make("agree")) + "\n")


# --- Tables that fit


@pytest.mark.parametrize("classes", [PLAIN, LONG, HOSTILE[:-1]], ids=["plain", "long", "hostile"])
def test_a_pipe_gets_tables_of_eighty_columns_in_which_nothing_is_cut(
    classes: tuple[str, ...],
) -> None:
    text = printed(large("agree", "disagree", classes=classes))
    assert unfit(text) == []
    assert (
        "37,499" in text
        and "1,000,000 to 3,749,999" in text
        and "-100.0" in text
        and "100.0 (100.0)" in text
    )
    equal = ", ".join(["10,000"] * 6)
    assert f"(twins: torch {equal}; flax {equal})." in " ".join(text.split())


@pytest.mark.parametrize("classes", [PLAIN, LONG], ids=["plain", "long"])
def test_a_window_of_eighty_columns_gets_the_same_numbers(
    classes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = large("agree", "disagree", classes=classes)
    text = on_a_terminal(report, monkeypatch)
    assert unfit(text) == []
    numbers = re.compile(r"[-+\d.,e]*\d[-+\d.,e]*")
    assert numbers.findall(text) == numbers.findall(printed(report))


def test_a_name_that_is_too_long_for_its_column_goes_on_below() -> None:
    table = printed(large("agree")).partition("test images")[2].partition("Weakest class")[0]
    assert all(name in first_column(table) and name not in table for name in LONG)
    assert "plane" in printed(large("agree", classes=PLAIN)).partition("test images")[2]


def test_what_does_not_fit_is_seen() -> None:
    fine = "x" * 80
    assert unfit(f"{fine}\nshort\n") == []
    for wrong in (
        "x" * 81,
        "cut...",
        "cut\N{HORIZONTAL ELLIPSIS}",
        "\x1b[1mbold\x1b[0m",
        "filled ",
        "a\tb",
    ):
        assert unfit(f"{fine}\n{wrong}\n") == [wrong]


def test_the_last_lines_are_verdict_place_cause_and_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = make("disagree", "agree")
    report["lenses"][0]["located"] = found()
    for verbose in (False, True):
        out = io.StringIO()
        Terminal(stdout=out, stderr=Tty(), verbose=verbose).verdict(report, "runs/x/report.html")
        words = " ".join(out.getvalue().split())
        marks = [
            "The two runs disagree in float64.",
            "Where they differ first: ",
            "A likely cause: ",
        ]
        places = [words.index(mark) for mark in [*marks, "Report: runs/x/report.html"]]
        assert places == sorted(places) and words.endswith("Report: runs/x/report.html")
        assert all(words.count(mark) == 1 for mark in marks[:2])


def test_tables_are_printed_only_where_they_are_asked_for() -> None:
    report = make("agree", "agree")
    short, long = printed(report, verbose=False), printed(report)
    assert len(short.splitlines()) <= 8 and "worst tensor" not in short
    assert "worst tensor" in long and "test images" in long
    assert "accuracy torch 60.0 %, flax 60.0 %" in " ".join(short.split())


def test_the_spread_of_twins_has_a_column_only_where_there_are_twins() -> None:
    report = make("agree")
    assert "twins' spread" not in printed(report)
    report["lenses"][0]["stretches"][0]["drift"] = 1e-15
    assert "twins' spread" in printed(report)


def test_the_first_steps_and_the_whole_run_have_each_their_rows() -> None:
    report = make("agree")
    row = {
        "step": 39,
        "stage": "update",
        "tensor": "momentum of conv1.kernel",
        "gap": 1e-17,
        "bound": 1e-14,
    }
    report["lenses"][0]["ladder"].append(row | {"agrees": True})
    lines = [" ".join(line.split()) for line in printed(report).splitlines()]
    places = [
        lines.index("first steps worst tensor step gap bound ok"),
        next(k for k, line in enumerate(lines) if line.startswith("forward")),
        lines.index("whole run"),
        lines.index("update momentum of conv1.kernel 39 1e-17 1e-14 ok"),
    ]
    assert places == sorted(places)
    assert "whole run" not in printed(make("agree"))


# --- What is printed


class Ascii(io.TextIOWrapper):
    """A pipe of a process whose locale knows ASCII only."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", errors="strict")

    def text(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode("ascii")


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


def located(found: Any) -> str:
    out = io.StringIO()
    Terminal(stdout=out, stderr=io.StringIO()).located(found)
    return out.getvalue()


def test_where_runs_diverge_is_shown_with_what_is_likely_and_the_entries_that_differ_most() -> None:
    text = located(found(pattern="flax is 3 times torch"))
    flat = " ".join(text.split())
    assert (
        "Where they differ first: forward: step 17: conv1: torch=1 flax=3, gap 2.0e+00 > 1.0e-07 "
        "(replayed: both" in flat
    )
    assert "In conv1: flax is 3 times torch." in flat
    assert flat.count("A likely cause: ") == 1 and "padding (Flax pads SAME by default)" in flat
    assert "differ:" not in flat and "calls it" not in flat  # the control of what follows
    together = {"failing": 3, "tensors": 6, "common": "all biases, no kernel"}
    own = {"torch": "conv1.weight", "flax": "conv1.kernel"}
    flat = " ".join(located(found(own_names=own, **together)).split())
    assert "3 of 6 tensors of the forward pass of that step differ: all biases, no kernel." in flat
    assert "torch calls it conv1.weight, flax calls it conv1.kernel." in flat
    rows = text[text.index("largest differences in conv1") :].splitlines()
    assert rows[0].split() == ["largest", "differences", "in", "conv1", "torch", "flax"]
    assert [row.split() for row in rows[2:5]] == [
        ["[1,", "0]", "-9", "3"],
        ["[1,", "1]", "4", "0.333333333"],
        ["[0,", "0]", "1", "3"],
    ]
    assert len(rows) == 5  # what is the same is no difference


def test_entries_that_are_not_finite_are_shown_with_their_own_cause() -> None:
    flat = " ".join(located(found(entry=math.nan)).split())
    assert "In conv1: not finite: 1 of 4 entries of torch, none of flax." in flat
    assert "[1, 0] not finite 3" in flat
    assert "A likely cause: a division by 0" in flat and "padding" not in flat


def test_where_runs_diverge_is_said_without_what_is_not_known() -> None:
    text = located(found(pattern=None, offenders=[], causes=[]))
    assert (
        text.startswith("Where they differ first: ")
        and "likely" not in text
        and "largest" not in text
        and "In " not in text
    )


def test_only_a_report_of_runs_that_disagree_shows_where_they_diverge() -> None:
    report = make("disagree", "agree")
    assert "Where they differ first" not in printed(report)
    report["lenses"][0]["located"] = found()
    assert printed(report).count("Where they differ first") == 1
    assert "Where they differ first" not in printed(report, quiet=True)


@pytest.mark.parametrize("name", [*HOSTILE, "w" * 70])
def test_where_runs_diverge_is_plain_text_of_eighty_columns_whatever_a_layer_is_called(
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


def test_the_spread_of_the_twins_stands_next_to_the_gap() -> None:
    report = make("agree", "agree")
    report["lenses"][1]["stretches"] = [
        report["lenses"][1]["stretches"][0] | {"gap": 3e-6, "drift": 2e-6, "bound": 1.6e-5},
        report["lenses"][1]["stretches"][0]
        | {"quantity": "mean loss", "gap": 1e-6, "drift": None, "bound": 1e-5},
    ]
    rows = [line.split() for line in printed(report).splitlines()]
    assert ["loss", "0", "to", "39", "3e-06", "2e-06", "1.6e-05", "ok"] in rows
    assert ["mean", "loss", "0", "to", "39", "1e-06", "-", "1e-05", "ok"] in rows


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


def test_what_can_see_nothing_and_what_is_not_reproducible_is_said() -> None:
    report = make("agree")
    quiet = notes(report["lenses"][0])
    assert quiet == []  # the control
    report["lenses"][0] |= {"no_power_from": 300, "not_reproducible": {"flax": 12}}
    said = notes(report["lenses"][0])
    assert "from step 300 on no check of the training could fail" in said[0]
    assert "flax is not reproducible: the same run again differs from step 12 on" in said[1]
    assert (ok(True), ok(False), ok(True, False), ok(False, False)) == (
        "ok",
        "NO",
        "no power",
        "NO",
    )
