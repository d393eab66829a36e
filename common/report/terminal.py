"""What a run prints: plain lines, a progress bar, and at the end the verdict with its tables."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

from lockstep.common.config import BACKENDS
from lockstep.common.protocol import STAGES
from lockstep.common.verdict.comparison import common_nonfinite_step, format_distinct

NAME_WIDTH = 16  # letters of a class name in a picture
PAGE_WIDTH = 80  # columns of what goes to a file or a pipe
MAX_CLASSES = 100  # more are not listed: report.json has them
# stages that are looked into during the first steps only
OPENING = "data", "weights", "forward", "backward"


def safe(text: object, encoding: str = "utf-8") -> str:
    r"""`text` with everything that is not printable, or not in `encoding`, as an escape such as
    `\x1b`."""
    letters = (letter if letter.isprintable() else _escape(letter) for letter in str(text))
    return "".join(letters).encode(encoding, "backslashreplace").decode(encoding)


def cut(text: str, width: int, ellipsis: str = "...") -> str:
    """`text` in at most `width` terminal columns."""
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return text
    while text and cell_len(text) + len(ellipsis) > width:
        text = text[:-1]
    return text + ellipsis


def number(value: float | None, missing: str = "not finite") -> str:
    """Two digits of a gap or a bound; None stands for what JSON cannot hold."""
    if value is None:
        return missing
    if value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"  # counts, such as of predictions
    if 0.1 <= abs(value) < 100:
        return f"{value:.2g}"
    return f"{value:.1e}".replace(".0e", "e")


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def percent(value: float | None) -> str:
    return "no images" if value is None else f"{100 * value:.1f} %"


def sentence(report: dict[str, Any]) -> str:
    """The result in plain words. Of a run that was cut short: where, and what its finished lenses
    say."""
    lenses = report["lenses"]
    if reason := report.get("cut_short"):
        return f"The run was cut short: {reason.rstrip('.')}. {_so_far(lenses)}"
    return _outcome(lenses, report["verdict"])


def _so_far(lenses: list[dict[str, Any]]) -> str:
    verdicts = {lens["verdict"] for lens in lenses}
    found = next((v for v in ("disagree", "diverged", "agree") if v in verdicts), None)
    return _outcome(lenses, found) if found else "Nothing was compared."


def _outcome(lenses: list[dict[str, Any]], verdict: str) -> str:
    if verdict == "single":
        names = [name for name in BACKENDS if any(name in lens["accuracy"] for lens in lenses)]
        ends = (
            f"ended where its loss is not finite ({_broken_off(lenses)})"
            if _broken_off(lenses)
            else ""
        )
        return f"Trained {' and '.join(names)} alone; {ends or 'nothing to compare it with'}."
    if verdict == "agree":
        return f"The two runs agree: {'; '.join(_agreement(lens) for lens in lenses)}."
    apart = [lens for lens in lenses if lens["verdict"] == "disagree"]
    agreeing = [_agreement(lens) + "." for lens in lenses if lens["verdict"] == "agree"]
    diverged = [lens for lens in lenses if lens["verdict"] == "diverged"]
    if not apart:
        steps = ", ".join(f"{lens['dtype']}: step {lens['diverged_at']:,}" for lens in diverged)
        ends = (
            "Both runs diverge at the same step, where a loss or a gradient norm is not finite "
            f"({steps}); up to there they agree: choose a smaller --lr."
        )
        return " ".join([ends, *agreeing])
    return " ".join(["The two runs disagree.", *map(_parting, apart), *agreeing])


def _in_short(lens: dict[str, Any]) -> str:
    """One precision in one line: its verdict, the accuracy, and how many predictions are equal."""
    heading = {"agree": "agree", "disagree": "DISAGREE", "diverged": "diverge together"}.get(
        lens["verdict"], "one run"
    )
    accuracy = ", ".join(f"{name} {percent(lens['accuracy'][name])}" for name in _backends(lens))
    text = f"{lens['dtype']}: {heading} over {counted(lens['steps'], 'step')}; accuracy {accuracy}"
    if lens["predictions_equal"] is not None:
        equal, total = lens["predictions_equal"], lens["predictions_total"]
        text += f"; predictions equal: {equal:,} of {total:,}"
    return f"{text}."


def _broken_off(lenses: list[dict[str, Any]]) -> str:
    steps = {lens["dtype"]: _ended_at(lens) for lens in lenses}
    return ", ".join(f"{dtype}: step {step:,}" for dtype, step in steps.items() if step is not None)


def _ended_at(lens: dict[str, Any]) -> int | None:
    """The step whose loss is not finite, if all runs ended there; older reports do not say."""
    return common_nonfinite_step(lens.get("broken", {}).values())


class Terminal:
    """Where a run speaks: results to standard output, the progress bar to standard error, and that
    only on a terminal.

    Nothing is read as markup, and what could steer a terminal is escaped. Where the output is no
    terminal, it is plain text of tables and paragraphs of at most 80 columns. With `quiet`, the
    verdict's first sentence is all that is printed; with `verbose`, all tables are. With `aside`, standard output is left to
    something else, such as a report in JSON, and all of this goes to standard error.
    """

    def __init__(
        self,
        quiet: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        aside: bool = False,
        verbose: bool = False,
    ) -> None:
        self.quiet, self.verbose = quiet, verbose
        self._err = _console(sys.stderr if stderr is None else stderr)
        self._out = self._err if aside else _console(sys.stdout if stdout is None else stdout)
        self._fancy = self._out.is_terminal and self._out.encoding.lower().startswith("utf")
        self._bar: Any = None
        self._turn = threading.RLock()  # what another process says is printed by another thread

    def line(self, text: str) -> None:
        """Print `text` as one line, above the progress bar."""
        if not self.quiet:
            self._print(self._safe(text), soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, float], None]]:
        """Show a bar for `total` steps; call what it yields with the steps done since, and their
        mean loss, in nats."""
        if self.quiet or not self._err.is_terminal or self._err.is_dumb_terminal:
            yield lambda steps, loss: None
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TextColumn("{task.fields[loss]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._err,
            redirect_stdout=False,  # what goes to standard output must not end up in standard error
            refresh_per_second=4,
            transient=True,
            expand=True,
        )
        name = cut(safe(title, self._err.encoding), 24)
        task = bar.add_task(name, total=total, rate="", loss="")
        done, running, started = 0, math.nan, time.monotonic()

        def advance(steps: int, loss: float) -> None:
            nonlocal done, running
            # A mean over about the last fiftieth of the run: single batches say little.
            share = 1.0 if done == 0 else min(1.0, 50 * steps / max(1, total))
            running = loss if share == 1 else running + share * (loss - running)
            done += steps
            speed = bar.tasks[0].speed or done / max(1e-9, time.monotonic() - started)
            shown = f"loss {running:.3f}" if math.isfinite(running) else "loss not finite"
            bar.update(task, advance=steps, rate=f"{_rate(speed)} steps/s", loss=shown)

        with self._turn:
            bar.start()
            self._bar = bar
        try:
            yield advance
        finally:
            with self._turn:
                self._bar = None
                bar.stop()

    def conclusion(self, text: str) -> None:
        """Print what is said even with `quiet`."""
        self._paragraph(text, "bold")

    def verdict(self, report: dict[str, Any], path: object = None) -> None:
        """Print the result. The last lines say the verdict, the place, the likely cause, and where
        the report is; with `verbose`, all tables stand before them.

        Args:
            path: of the report, for the last line.
        """
        if self.quiet:
            self._sentence(report)
            return
        for lens in report["lenses"]:
            if self.verbose:
                self._details(lens, report["data"]["classes"])
            else:
                self._paragraph(_in_short(lens))
        if self.verbose and report["lenses"]:
            self._print("")
        self._sentence(report)
        for lens in report["lenses"]:
            if lens.get("located"):
                self._place(lens["located"])
        if path is not None:
            self.line(f"Report: {path}")

    def _details(self, lens: dict[str, Any], classes: list[str]) -> None:
        """All tables of one precision."""
        heading = {
            "agree": "the runs agree",
            "disagree": "the runs DISAGREE",
            "diverged": "the runs diverge together",
        }.get(lens["verdict"], "one run")
        self._print("")
        self._paragraph(f"{lens['dtype']}, {counted(lens['steps'], 'step')}: {heading}", "bold")
        if lens["ladder"]:
            self._ladder(lens["ladder"])
        if lens["stretches"]:
            self._stretches(lens["stretches"])
        if (rule := lens["bound"].get("rule")) and (lens["ladder"] or lens["stretches"]):
            self._print("")
            self._paragraph(f"Bounds: {rule.rstrip('.')}.")
        if lens.get("located"):
            self._offenders(lens["located"])
        self._accuracy(lens, classes)
        self._print("")
        self._closing(lens, classes)

    def located(self, found: dict[str, Any]) -> None:
        """Where two runs differ first, the largest differences there, and what usually causes
        such."""
        self._place(found)
        self._offenders(found)

    def _place(self, found: dict[str, Any]) -> None:
        self._paragraph(f"Where they differ first: {found['message']} ({found['how']}).", "bold")
        if found["pattern"]:
            self._paragraph(f"In {found['tensor']}: {found['pattern']}.")
        for trap in found["causes"]:
            self._paragraph(f"A likely cause: {trap}.")

    def _offenders(self, found: dict[str, Any]) -> None:
        """The largest differences in the tensor that differs first."""
        if not found["offenders"]:
            return
        self._print("")
        names = [name for name in BACKENDS if name in found["offenders"][0]]
        tensor = cut(self._safe(found["tensor"]), 22, self._ellipsis)
        table = self._table(f"largest differences in {tensor}", *(f"{name}>" for name in names))
        for entry in found["offenders"]:
            place = ", ".join(map(str, entry["index"]))
            values = [entry[name] for name in names]
            shown = ["not finite" if value is None else f"{value:.9g}" for value in values]
            if None not in values and shown[0] == shown[1]:
                shown = list(format_distinct(*values))
            self._row(table, f"[{place}]", *shown)
        self._show(table)

    def _sentence(self, report: dict[str, Any]) -> None:
        verdicts = {lens["verdict"] for lens in report["lenses"]}
        fine = verdicts == {"agree"} and not report.get("cut_short")
        self._paragraph(
            sentence(report),
            "bold red" if "disagree" in verdicts else "bold green" if fine else "bold",
        )

    def _ladder(self, rows: list[dict[str, Any]]) -> None:
        groups = itertools.groupby(condense(rows), key=lambda entry: entry[0])
        table = None
        for when, group in groups:
            if table is None:
                table = self._table(when, "worst tensor", "step>", "gap>", "bound>", "ok")
            else:
                table.add_section()
                self._row(table, when, style="bold")
            for _, row, agrees in group:
                cells = [row["stage"], row["tensor"], f"{row['step']:,}", number(row["gap"])]
                self._row(table, *cells, number(row["bound"], "none"), _mark(agrees))
        self._show(table)

    def _stretches(self, rows: list[dict[str, Any]]) -> None:
        drifts = any(row["drift"] is not None for row in rows)
        table = self._table(
            "over the run", "steps>", "gap>", *["twins' drift>"] * drifts, "bound>", "ok"
        )
        for row in merge(rows):
            last = max(row["start"], row["stop"] - 1)
            steps = f"{row['start']:,}" + (f" to {last:,}" if last > row["start"] else "")
            cells = [row["quantity"].replace("_", " "), steps, number(row["gap"])]
            cells += [number(row["drift"], "-")] * drifts
            self._row(table, *cells, number(row["bound"], "none"), _mark(row["agrees"]))
        self._show(table)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table of its own; a column is aligned to the right where its name ends in `>`."""
        table = self._table(*columns)
        for row in rows:
            self._row(table, *row)
        if not self.quiet:
            self._show(table)

    def _accuracy(self, lens: dict[str, Any], classes: list[str]) -> None:
        names = _backends(lens)
        # Two networks that drifted apart differ class by class, too: how exactly, the interval
        # says; why, the twins.
        differences = lens.get("class_differences", {})
        columns = ["difference, 99 % interval>"] if differences else []
        table = self._table("test images", *(f"{name}>" for name in names), *columns)
        self._row(table, "all classes", *(percent(lens["accuracy"][name]) for name in names))
        table.add_section()
        by_class = lens["per_class_accuracy"]
        for label in classes if len(classes) <= MAX_CLASSES else ():
            cells = [percent(by_class[name].get(label)) for name in names]
            if found := differences.get(label):
                low, high = 100 * found["low"], 100 * found["high"]
                cells.append(f"{100 * found['difference']:+.1f} ({low:+.1f} to {high:+.1f})")
            self._row(table, label, *cells)
        table.add_section()
        for title, key in (("test loss, nats", "test_loss"), ("last batch, nats", "final_loss")):
            values = [lens[key][name] for name in names]
            self._row(table, title, *(_loss(value) for value in values))
        self._show(table)

    def _closing(self, lens: dict[str, Any], classes: list[str]) -> None:
        names = _backends(lens)
        for title, weakest in (("Weakest", True), ("Strongest", False)):
            found = []
            for name in names:
                by_class = lens["per_class_accuracy"][name]
                label = extreme(by_class, classes, weakest)
                found.append(
                    f"{name} none"
                    if label is None
                    else f"{name} {label} ({percent(by_class[label])})"
                )
            self._paragraph(f"{title} class: {', '.join(found)}.")
        if lens["predictions_equal"] is not None:
            text = (
                f"Predictions equal: {lens['predictions_equal']:,} of {lens['predictions_total']:,}"
            )
            twins = []
            for name in BACKENDS:
                if runs := lens.get("twins", {}).get(name):
                    twins.append(
                        f"{name} {', '.join(format(twin['predictions_equal'], ',') for twin in runs)}"
                    )
            self._paragraph(text + (f" (twins: {'; '.join(twins)})" if twins else "") + ".")
        speeds = (f"{name} {_rate(lens['steps_per_second'].get(name))}" for name in names)
        self._paragraph(f"Steps per second: {', '.join(speeds)}.")

    @property
    def _ellipsis(self) -> str:
        return "\N{HORIZONTAL ELLIPSIS}" if self._fancy else "..."

    def _safe(self, text: object) -> str:
        return safe(text, self._out.encoding)

    def _table(self, *columns: str) -> Any:
        """A table. Columns whose name ends in `>` hold numbers: aligned to the right, and never
        broken.

        Names in the others take a second line where the table would be wider than the page.
        """
        from rich import box
        from rich.table import Table

        plain = box.Box("    \n    \n -- \n    \n -- \n -- \n    \n    \n", ascii=True)
        shape = box.HORIZONTALS if self._fancy else plain
        table = Table(box=shape, pad_edge=False, show_edge=False, header_style="bold")
        for column in columns:
            numbers = column.endswith(">")
            justify = "right" if numbers else "left"
            table.add_column(column.rstrip(">"), justify=justify, no_wrap=numbers, overflow="fold")
        return table

    def _row(self, table: Any, *cells: str, style: str = "") -> None:
        from rich.text import Text

        styles = {"ok": "green", "NO": "bold red", "not finite": "bold red"}
        table.add_row(*(Text(self._safe(cell), style=styles.get(cell, style)) for cell in cells))

    def _show(self, table: Any) -> None:
        self._print("")
        self._print(table)

    def _paragraph(self, text: str, style: str = "") -> None:
        from rich.text import Text

        for line in textwrap.wrap(self._safe(text), self._out.width, break_on_hyphens=False):
            self._print(Text(line, style=style), soft_wrap=True)

    def _print(self, item: Any, soft_wrap: bool = False) -> None:
        with self._turn:
            if self._bar is not None:
                self._bar.stop()  # wiped, then drawn again below the line
            try:
                # When the reader has gone, rich exits with 1, which would say that the runs differ.
                with contextlib.suppress(SystemExit):
                    if self._out.is_terminal:
                        self._out.print(item, soft_wrap=soft_wrap)
                    else:
                        self._plain(item, soft_wrap)
                    self._out.file.flush()
            finally:
                if self._bar is not None:
                    self._bar.start()

    def _plain(self, item: Any, soft_wrap: bool) -> None:
        """Print `item` without the spaces that rich fills lines with."""
        with self._out.capture() as capture:
            self._out.print(item, soft_wrap=soft_wrap)
        for line in capture.get().splitlines():
            self._out.print(line.rstrip(), soft_wrap=True)


def merge(stretches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring stretches of one quantity that read alike as one: a constant learning rate needs
    one row."""
    merged: list[dict[str, Any]] = []
    for row in stretches:
        alike = merged and all(
            merged[-1][key] == row[key] for key in ("quantity", "gap", "drift", "bound", "agrees")
        )
        if alike and merged[-1]["stop"] == row["start"]:
            merged[-1] = merged[-1] | {"stop": row["stop"]}
        else:
            merged.append(row)
    return merged


def condense(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], bool]]:
    """The worst row of each stage, once for the first steps and once for the whole run, and whether
    all agree.

    Worst is what disagrees, then what is not finite, then the largest gap over its bound.
    """
    opening = max((row["step"] for row in rows if row["stage"] in OPENING), default=-1)
    groups: dict[tuple[bool, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        stage = row["stage"]
        late = row["step"] > opening or stage == "evaluate"
        rank = STAGES.index(stage) if stage in STAGES else len(STAGES)
        groups.setdefault((late, rank, stage), []).append(row)
    condensed = []
    for (late, _, _), group in sorted(groups.items(), key=lambda item: item[0]):
        agrees = all(row["agrees"] for row in group)
        condensed.append(("whole run" if late else "first steps", max(group, key=_badness), agrees))
    return condensed


def extreme(accuracy: dict[str, float | None], classes: list[str], weakest: bool) -> str | None:
    """The class with the lowest or the highest accuracy, the first of equals; None if no class has
    any."""
    known = [(value, label) for label in classes if (value := accuracy.get(label)) is not None]
    if not known:
        return None
    return (min if weakest else max)(known, key=lambda pair: pair[0])[1]


def _badness(row: dict[str, Any]) -> tuple[bool, float]:
    gap, bound = row["gap"], row["bound"]
    if gap is None:
        return (not row["agrees"], math.inf)
    if bound is None:
        return (not row["agrees"], 0.0)
    return (not row["agrees"], gap / bound if bound else math.inf if gap else 0.0)


def _agreement(lens: dict[str, Any]) -> str:
    if lens["verdict"] == "single":
        return f"{lens['dtype']} not compared, {' and '.join(lens['accuracy'])} alone"
    if lens["dtype"] != "float64":
        return f"{lens['dtype']} within what rounding explains"
    if lens["bound"].get("twins"):
        gap = number(lens["max_abs_loss_gap"])
        return f"{lens['dtype']} within what rounding explains, which this run amplifies to {gap}"
    over = f"over {counted(lens['steps'], 'step')}"
    rows = [row for row in lens["stretches"] if row["quantity"] == "loss"]
    rows = rows or [row for row in lens["ladder"] if row["stage"] == "loss"]
    bounds = [row["bound"] for row in rows if row["bound"] is not None]
    bound = f" (bound {number(max(bounds))})" if bounds else ""
    return f"{lens['dtype']} within {number(lens['max_abs_loss_gap'])} {over}{bound}"


def _parting(lens: dict[str, Any]) -> str:
    if first := lens["first_divergence"]:
        alone = (
            " in evaluation alone, the training trajectories agree"
            if first["stage"] == "evaluate"
            else ""
        )
        return f"{lens['dtype']}{alone}: {first['message'].rstrip('.')}."
    for row in lens["stretches"]:
        if not row["agrees"]:
            last = max(row["start"], row["stop"] - 1)
            gap = f"gap {number(row['gap'])} > {number(row['bound'], 'none')}"
            return f"{lens['dtype']}: {row['quantity']}: steps {row['start']:,} to {last:,}: {gap}."
    return f"{lens['dtype']}: apart by more than the bounds allow."


def _backends(lens: dict[str, Any]) -> list[str]:
    return [name for name in BACKENDS if name in lens["accuracy"]]


def _mark(agrees: bool) -> str:
    return "ok" if agrees else "NO"


def _loss(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4f}" if abs(value) < 1e6 else number(value)


def _rate(speed: float | None) -> str:
    if speed is None:
        return "not measured"
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def _console(file: TextIO) -> Any:
    from rich.console import Console

    terminal = file.isatty()
    # Settings such as FORCE_COLOR must not put escape codes into a file.
    return Console(
        file=file,
        force_terminal=terminal,
        force_jupyter=False,
        width=None if terminal else PAGE_WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
    )
