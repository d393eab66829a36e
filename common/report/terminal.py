"""The output of a run: plain lines, a progress bar, and at the end the verdict with its tables."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from lockstep.common.report.json import (
    CheckJson,
    ComparisonJson,
    LocationJson,
    ReportJson,
    WindowJson,
)
from lockstep.common.report.summary import (
    difference_cells,
    entry_cells,
    entry_names,
    extreme,
    failing_text,
    heading,
    in_short,
    merge_equal,
    notes,
    own_names_text,
    sentence,
    tensor_text,
    trained,
    worst_per_stage,
)
from lockstep.common.report.text import (
    escape,
    loss,
    number,
    ok,
    percent,
    rate,
    steps_text,
    truncate,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress
    from rich.table import Table

PAGE_WIDTH = 80  # columns of a file or a pipe
MAX_CLASSES = 100  # of more classes the table lists none: report.json has them


class Terminal:
    """Prints results to standard output, and a progress bar to standard error if that is a
    terminal.

    Text is never read as markup, and control characters are escaped. A file or a pipe gets plain
    text of at most 80 columns. `quiet` prints the verdict's sentence alone, `verbose` all tables.
    `to_stderr` leaves standard output to something else, such as a report in JSON.
    """

    def __init__(
        self,
        quiet: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        to_stderr: bool = False,
        verbose: bool = False,
    ) -> None:
        self.quiet, self.verbose = quiet, verbose
        self._err = _console(sys.stderr if stderr is None else stderr)
        self._out = self._err if to_stderr else _console(sys.stdout if stdout is None else stdout)
        self._fancy = self._out.is_terminal and self._out.encoding.lower().startswith("utf")
        self._bar: Progress | None = None
        # Another thread prints the lines of a worker process.
        self._turn = threading.RLock()

    def line(self, text: str) -> None:
        """Print `text` as one line, above the progress bar."""
        if not self.quiet:
            self._print(self._escaped(text), soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, float], None]]:
        """Show a bar for `total` steps.

        Yields a function to call with the number of steps since its last call, and their mean loss
        in nats.
        """
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
            redirect_stdout=False,  # results must not end up in standard error
            refresh_per_second=4,
            transient=True,
            expand=True,
        )
        name = truncate(escape(title, self._err.encoding), 24)
        task = bar.add_task(name, total=total, rate="", loss="")
        done, running, started = 0, math.nan, time.monotonic()

        def advance(steps: int, mean_loss: float) -> None:
            nonlocal done, running
            # A mean over about the last fiftieth of the run: single batches say little.
            weight = 1.0 if done == 0 else min(1.0, 50 * steps / max(1, total))
            running = mean_loss if weight == 1 else running + weight * (mean_loss - running)
            done += steps
            speed = bar.tasks[0].speed or done / max(1e-9, time.monotonic() - started)
            shown = f"loss {running:.3f}" if math.isfinite(running) else "loss not finite"
            bar.update(task, advance=steps, rate=f"{rate(speed)} steps/s", loss=shown)

        with self._turn:
            bar.start()
            self._bar = bar
        try:
            yield advance
        finally:
            with self._turn:
                self._bar = None
                bar.stop()

    def paragraph(self, text: str, style: str = "") -> None:
        """Print `text`, wrapped, even with `quiet`."""
        self._paragraph(text, style)

    def print_always(self, text: str) -> None:
        """Print `text` even with `quiet`."""
        self._paragraph(text, "bold")

    def verdict(self, report: ReportJson, path: object = None) -> None:
        """Print the result. The last lines are the verdict, the place where the runs diverge, the
        likely cause, and the path of the report; `verbose` prints all tables before them.

        Args:
            path: of the report, for the last line.
        """
        if self.quiet:
            self._sentence(report)
            return
        for comparison in report["lenses"]:
            if self.verbose:
                self._details(comparison, report["data"]["classes"])
            else:
                self._paragraph(in_short(comparison))
            for note in notes(comparison):
                self._paragraph(note)
        if self.verbose and report["lenses"]:
            self._print("")
        self._sentence(report, placed=True)
        for comparison in report["lenses"]:
            if location := comparison.get("located"):
                self._place(location)
        if path is not None:
            self.line(f"Report: {path}")

    def _details(self, comparison: ComparisonJson, classes: list[str]) -> None:
        """All tables of one precision."""
        self._print("")
        self._paragraph(heading(comparison, "DISAGREE"), "bold")
        if comparison["ladder"]:
            self._checks(comparison["ladder"])
        if comparison["stretches"]:
            self._windows(comparison["stretches"])
        compared = comparison["ladder"] or comparison["stretches"]
        if compared and (rule := comparison["bound"].get("rule")):
            self._print("")
            self._paragraph(f"How large a gap may be: {rule.rstrip('.')}.")
        if location := comparison.get("located"):
            self._worst_entries(location)
        self._accuracy(comparison, classes)
        self._print("")
        self._closing(comparison, classes)

    def located(self, found: LocationJson) -> None:
        """Where two runs diverge, the largest differences there, and what usually causes that."""
        self._place(found)
        self._worst_entries(found)

    def _place(self, found: LocationJson) -> None:
        self._paragraph(f"Where they differ first: {found['message']} ({found['how']}).", "bold")
        if found["pattern"]:
            self._paragraph(f"In {found['tensor']}: {found['pattern']}.")
        for text in (failing_text(found), own_names_text(found)):
            if text is not None:
                self._paragraph(f"{text}.")
        for cause in found["causes"]:
            self._paragraph(f"A likely cause: {cause}.")
        for code in found.get("fixes", ()):
            self._paragraph(f"Try: {code}")

    def _worst_entries(self, found: LocationJson) -> None:
        """The largest differences in the tensor that differs first."""
        if not found["offenders"]:
            return
        names = entry_names(found["offenders"][0])
        tensor = truncate(self._escaped(found["tensor"]), 22, self._ellipsis)
        table = self._table(f"largest differences in {tensor}", *(f"{name}>" for name in names))
        for entry in found["offenders"]:
            self._row(table, *entry_cells(entry))
        self._show(table)

    def _sentence(self, report: ReportJson, placed: bool = False) -> None:
        """The verdict.

        Args:
            placed: whether lines with the place of a divergence follow.
        """
        verdicts = {comparison["verdict"] for comparison in report["lenses"]}
        fine = verdicts == {"agree"} and not report.get("cut_short")
        self._paragraph(
            sentence(report, placed),
            "bold red" if "disagree" in verdicts else "bold green" if fine else "bold",
        )

    def _checks(self, rows: Sequence[CheckJson]) -> None:
        groups = itertools.groupby(worst_per_stage(rows), key=lambda entry: entry[0])
        table = None
        for when, group in groups:
            if table is None:
                table = self._table(when, "worst tensor", "step>", "gap>", "bound>", "ok")
            else:
                table.add_section()
                self._row(table, when, style="bold")
            for _, row, agrees in group:
                cells = [row["stage"], tensor_text(row), f"{row['step']:,}", number(row["gap"])]
                mark = ok(agrees, row.get("power", True))
                self._row(table, *cells, number(row["bound"], "none"), mark)
        if table is not None:
            self._show(table)

    def _windows(self, rows: Sequence[WindowJson]) -> None:
        spreads = any(row["drift"] is not None for row in rows)
        table = self._table(
            "over the run", "steps>", "gap>", *["twins' spread>"] * spreads, "bound>", "ok"
        )
        for row in merge_equal(rows):
            cells = [row["quantity"].replace("_", " "), steps_text(row["start"], row["stop"])]
            cells += [number(row["gap"]), *[number(row["drift"], "-")] * spreads]
            mark = ok(row["agrees"], row.get("power", True))
            self._row(table, *cells, number(row["bound"], "none"), mark)
        self._show(table)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table; a column whose name ends in `>` is aligned to the right."""
        table = self._table(*columns)
        for row in rows:
            self._row(table, *row)
        if not self.quiet:
            self._show(table)

    def _accuracy(self, comparison: ComparisonJson, classes: list[str]) -> None:
        names = trained(comparison)
        # Two networks that drifted apart differ class by class, too: the twins show why.
        differences = comparison.get("class_differences", {})
        columns = ["difference>", "differ (twins), %>"] if differences else []
        shown = "test images" if classes else "test data"
        table = self._table(shown, *(f"{name}>" for name in names), *columns)
        if classes:
            accuracy = (percent(comparison["accuracy"][name]) for name in names)
            self._row(table, "all classes", *accuracy)
            table.add_section()
        by_class = comparison["per_class_accuracy"]
        for label in classes if len(classes) <= MAX_CLASSES else ():
            cells = [percent(by_class[name].get(label)) for name in names]
            if differences:
                difference, differing, twins, _ = difference_cells(differences.get(label))
                cells += [difference, f"{differing} ({twins})"]
            self._row(table, label, *cells)
        table.add_section()
        unit = ", nats" if classes else ""
        for title, values in (
            (f"test loss{unit}", comparison["test_loss"]),
            (f"last batch{unit}", comparison["final_loss"]),
        ):
            self._row(table, title, *(loss(values[name]) for name in names))
        self._show(table)

    def _closing(self, comparison: ComparisonJson, classes: list[str]) -> None:
        names = trained(comparison)
        extremes = (("Weakest", True), ("Strongest", False)) if classes else ()
        for title, weakest in extremes:
            found = []
            for name in names:
                by_class = comparison["per_class_accuracy"][name]
                label = extreme(by_class, classes, weakest)
                found.append(
                    f"{name} none"
                    if label is None
                    else f"{name} {label} ({percent(by_class[label])})"
                )
            self._paragraph(f"{title} class: {', '.join(found)}.")
        if comparison["predictions_equal"] is not None:
            equal, total = comparison["predictions_equal"], comparison["predictions_total"]
            twins = []
            for name in names:
                if runs := comparison["twins"].get(name):
                    counts = ", ".join(f"{twin['predictions_equal']:,}" for twin in runs)
                    twins.append(f"{name} {counts}")
            note = f" (twins: {'; '.join(twins)})" if twins else ""
            self._paragraph(f"Predictions equal: {equal:,} of {total:,}{note}.")
        speeds = (f"{name} {rate(comparison['steps_per_second'].get(name))}" for name in names)
        self._paragraph(f"Steps per second: {', '.join(speeds)}.")

    @property
    def _ellipsis(self) -> str:
        return "\N{HORIZONTAL ELLIPSIS}" if self._fancy else "..."

    def _escaped(self, text: object) -> str:
        return escape(text, self._out.encoding)

    def _table(self, *columns: str) -> Table:
        """A table. Columns whose name ends in `>` hold numbers, which stand right and on one line;
        a long name in another column continues on a second line."""
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

    def _row(self, table: Table, *cells: str, style: str = "") -> None:
        from rich.text import Text

        styles = {"ok": "green", "NO": "bold red", "not finite": "bold red"}
        table.add_row(*(Text(self._escaped(cell), style=styles.get(cell, style)) for cell in cells))

    def _show(self, table: Table) -> None:
        self._print("")
        self._print(table)

    def _paragraph(self, text: str, style: str = "") -> None:
        from rich.text import Text

        for line in textwrap.wrap(self._escaped(text), self._out.width, break_on_hyphens=False):
            self._print(Text(line, style=style), soft_wrap=True)

    def _print(self, item: RenderableType, soft_wrap: bool = False) -> None:
        with self._turn:
            if self._bar is not None:
                self._bar.stop()  # removed, then drawn again below the line
            try:
                # Where a pipe is closed, rich exits with status 1, which means that runs disagree.
                with contextlib.suppress(SystemExit):
                    if self._out.is_terminal:
                        self._out.print(item, soft_wrap=soft_wrap)
                    else:
                        self._plain(item, soft_wrap)
                    self._out.file.flush()
            finally:
                if self._bar is not None:
                    self._bar.start()

    def _plain(self, item: RenderableType, soft_wrap: bool) -> None:
        """Print `item` without the spaces with which rich fills lines."""
        with self._out.capture() as capture:
            self._out.print(item, soft_wrap=soft_wrap)
        for line in capture.get().splitlines():
            self._out.print(line.rstrip(), soft_wrap=True)


def _console(file: TextIO) -> Console:
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
