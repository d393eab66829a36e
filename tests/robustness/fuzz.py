"""Damaged and hostile inputs of every kind that the program reads: each is read, or refused in one
line.

    python -m tests.robustness.fuzz                           all kinds; the report goes to results/fuzz
    python -m tests.robustness.fuzz --count 500 --seed 3      fewer, others
    python -m tests.robustness.fuzz --only record:17          one input again, with what happens in full

An input that is refused ends in a LockstepError of one printable line that names the remedy. One
that is accepted must be fit for use, as its kind in `tests.robustness.inputs` says. All else is a failure:
another exception, a warning, a word on standard output or standard error, more than 10 s, more than
1 GB, a file opened for writing elsewhere, something unpickled, a program started. Inputs are read
in processes of their own, so that a crash is one input's failure.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lockstep.common.errors import LockstepError
from lockstep.common.system import environment
from tests.robustness import inputs

COUNT = 10_500
PATIENCE = 20.0  # seconds after which a process that does not even hear its alarm is ended
CHUNK = 25  # inputs that a process is given at a time
WORKERS = 2
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STARTING = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


class Answer(NamedTuple):
    """What became of one input."""

    kind: str
    number: int
    outcome: str  # "accepted", "refused" or "failed"
    what: str  # was done to the input
    detail: str  # of the refusal or failure
    seconds: float
    memory: int  # bytes


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    slowest: float = 0.0  # seconds
    largest: int = 0  # bytes
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        self.inputs += 1
        self.refused += answer.outcome == "refused"
        self.accepted += answer.outcome == "accepted"
        self.slowest, self.largest = (
            max(self.slowest, answer.seconds),
            max(self.largest, answer.memory),
        )
        if answer.outcome == "failed":
            self.failures.append(
                {"number": answer.number, "what": answer.what, "detail": answer.detail}
            )


class Overtime(BaseException):
    """Raised in the middle of whatever takes too long."""


# --- One input


class Reader:
    """Reads the inputs of one kind, in this process, and says what became of each."""

    def __init__(self, name: str, kind: inputs.Kind, seed: int, room: Path, watch: Watch) -> None:
        """
        Args:
            room: an empty folder, which becomes the working directory.
        """
        os.chdir(room)
        self.name, self.kind, self.seed, self.watch = name, kind, seed, watch
        kind.prepare()
        self.warm_up()

    def warm_up(self) -> None:
        """Read the valid input, so that what is loaded once is not counted."""
        folder = Path(tempfile.mkdtemp(dir="."))
        self.kind.valid(folder)
        for _ in range(2):
            self.kind.read(folder, forged=False)

    def answer(self, number: int) -> Answer:
        generator = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), number])
        with tempfile.TemporaryDirectory(
            dir=".", prefix="input-", ignore_cleanup_errors=True
        ) as made:
            folder = Path(made)
            what, forged = self.kind.make(generator, folder)
            outcome, detail, seconds, memory = self.attempt(folder, forged)
        return Answer(self.name, number, outcome, what, detail, seconds, memory)

    def attempt(self, folder: Path, forged: bool) -> tuple[str, str, float, int]:
        began = time.perf_counter()
        outcome, detail = "accepted", ""
        with self.watch.watching(folder, self.kind):
            try:
                self.kind.read(folder, forged)
            except LockstepError as error:
                outcome, detail = "refused", str(error)
                if fault := wrong_with(error):
                    outcome, detail = "failed", f"{fault}: {detail[:300]!a}"
            except Overtime:
                outcome, detail = "failed", f"takes longer than {self.kind.seconds:g} s"
            except Exception as error:  # a traceback, for a user: what this looks for
                where = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(where.filename).name}:{where.lineno}"
                outcome, detail = (
                    "failed",
                    f"{type(error).__name__}: {str(error)[:300]!a} at {place}",
                )
        seconds, memory = time.perf_counter() - began, self.watch.memory
        if outcome == "failed":
            pass
        elif seconds > self.kind.seconds:
            outcome, detail = "failed", f"takes {seconds:.1f} s"
        elif memory > self.kind.memory:
            outcome, detail = "failed", f"takes {memory:,} bytes"
        elif self.watch.seen(outcome):
            outcome, detail = "failed", f"{self.watch.seen(outcome)[0]} ({detail[:100]!a})"
        return outcome, detail, seconds, memory


def wrong_with(error: LockstepError) -> str | None:
    """What is wrong with a refusal, if anything is."""
    text = str(error)
    if not text.isprintable():
        return "a refusal that is not one printable line"
    if len(text.partition(": ")[2]) < 8:
        return "a refusal without a remedy"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return "memory was asked for that is not there"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


class Watch:
    """What a process does while it reads an input: time, memory, warnings, words, files,
    programs."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.active, self.folder, self.memory = False, "", 0
        sys.dont_write_bytecode = True
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGALRM, _ring)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "pickle.find_class":
            self.events.append(("unpickled", f"unpickles {arguments[0]}.{arguments[1]}"))
        elif (
            event.startswith(STARTING) and arguments[0] != "git"
        ):  # which a report asks for the commit
            self.events.append(("started", f"{event} {arguments[0]!a}"))
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            path = (
                os.path.abspath(os.fsdecode(arguments[0]))
                if not isinstance(arguments[0], int)
                else ""
            )
            if path and not path.startswith((self.folder, "/dev/")):
                self.events.append(("wrote", f"opens {path!a} for writing"))

    @contextlib.contextmanager
    def watching(self, folder: Path, kind: inputs.Kind) -> Iterator[None]:
        """Within the context all is noted, and time and memory are limited as `kind` says."""
        self.events, self.folder = [], os.path.abspath(folder)
        before = _memory("VmRSS")
        _forget_peak()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        with warnings.catch_warnings(record=True) as warned, _words() as words:
            warnings.simplefilter("always")
            try:
                if size := _memory("VmSize"):
                    resource.setrlimit(resource.RLIMIT_AS, (size + kind.memory, limits[1]))
                signal.setitimer(signal.ITIMER_REAL, kind.seconds)
                self.active = True
                yield
            finally:
                self.active = False
                signal.setitimer(signal.ITIMER_REAL, 0)
                resource.setrlimit(resource.RLIMIT_AS, limits)
        self.memory = max(0, _memory("VmHWM") - before)
        self.events += [("said", f"{w.category.__name__}: {w.message!s:.200}") for w in warned]
        self.events += [("said", f"says {text[:300]!a}") for text in words if text]

    def seen(self, outcome: str) -> list[str]:
        """What should not have been seen; data whose digest is right may be unpickled."""
        return [
            text
            for kind, text in self.events
            if not (kind == "unpickled" and outcome == "accepted")
        ]


def _ring(number: int, frame: Any) -> None:
    raise Overtime


def _memory(field: str) -> int:
    """Bytes of this process, where the system tells: VmSize, VmRSS, or VmHWM, the peak of the
    latter."""
    with contextlib.suppress(OSError):
        found = re.search(
            rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
        )
        return 1024 * int(found[1]) if found else 0
    return 0


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def _words() -> Iterator[list[str]]:
    """What is written to the standard streams, by Python or by a library, comes into this list."""
    said: list[str] = []
    kept = {number: os.dup(number) for number in (1, 2)}
    with tempfile.TemporaryFile() as file:
        _redirect({number: file.fileno() for number in kept})
        try:
            yield said
        finally:
            _redirect(kept)
            for descriptor in kept.values():
                os.close(descriptor)
            file.seek(0)
            said.append(file.read(2000).decode("utf-8", "replace"))


def _redirect(descriptors: dict[int, int]) -> None:
    """Let the standard streams of these numbers lead elsewhere from now on."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number, descriptor in descriptors.items():
        os.dup2(descriptor, number)


# --- Many inputs

READY = "ready"


def kinds_of(module: str) -> dict[str, type[inputs.Kind]]:
    """The table `KINDS` of a module."""
    return importlib.import_module(module).KINDS


def work(pipe: Connection, seed: int, kinds: str) -> None:
    """A process: reads the inputs that it is told to, and tells what became of each."""
    table, watch = kinds_of(kinds), Watch()
    reader: Reader | None = None
    with tempfile.TemporaryDirectory(prefix="lockstep-fuzz-", ignore_cleanup_errors=True) as room:
        while (order := pipe.recv()) is not None:
            kind, numbers = order
            if reader is None or reader.name != kind:
                reader = Reader(kind, table[kind](), seed, Path(tempfile.mkdtemp(dir=room)), watch)
            pipe.send(READY)
            for number in numbers:
                pipe.send(reader.answer(number))
            pipe.send(None)
        os.chdir("/")


@dataclass
class Worker:
    process: Any
    pipe: Connection
    kind: str = ""
    left: list[int] = field(default_factory=list)  # numbers that are not answered
    since: float = 0.0  # when it last said something
    ready: bool = False  # whether it has prepared what it needs for these


def run(
    count: int,
    seed: int,
    kinds: Sequence[str],
    workers: int = WORKERS,
    progress: Callable[[Answer], None] = lambda answer: None,
    module: str = "tests.robustness.inputs",
    patience: float = PATIENCE,
) -> dict[str, Tally]:
    """Read `count` inputs, shared out among the kinds, in `workers` processes."""
    table = kinds_of(module)
    tallies = {kind: Tally() for kind in kinds}
    orders = []
    for kind, inputs_of in shares(count, {kind: table[kind].share for kind in kinds}).items():
        orders += [
            (kind, list(range(start, min(start + CHUNK, inputs_of))))
            for start in range(0, inputs_of, CHUNK)
        ]
    context = multiprocessing.get_context("spawn")
    crew: list[Worker] = []

    def hire() -> Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, seed, module), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours, since=time.monotonic())

    def give(worker: Worker) -> bool:
        """Hand over the next chunk: one of the kind that the worker knows, or else of one that
        nobody is at."""
        taken = {other.kind for other in crew if other is not worker}
        wishes = (
            (lambda kind: kind == worker.kind),
            (lambda kind: kind not in taken),
            (lambda kind: True),
        )
        order = next((order for wish in wishes for order in orders if wish(order[0])), None)
        worker.since, worker.ready = time.monotonic(), False
        if order is None:
            worker.pipe.send(None)
            return False
        orders.remove(order)
        worker.kind, worker.left = order[0], list(order[1])
        worker.pipe.send(order)
        return True

    def failed(worker: Worker, detail: str) -> None:
        """The first input that is not answered ended its process; the others are for the next
        one."""
        number, *rest = worker.left
        answer = Answer(
            worker.kind, number, "failed", "see --only", detail, time.monotonic() - worker.since, 0
        )
        tallies[worker.kind].add(answer)
        progress(answer)
        if rest:
            orders.insert(0, (worker.kind, rest))
        worker.process.kill()
        worker.process.join()
        crew.remove(worker)

    while orders and len(crew) < workers:
        crew.append(hire())
        give(crew[-1])
    while crew:
        ready = wait([worker.pipe for worker in crew], timeout=1)
        for worker in list(crew):
            if worker.pipe not in ready:
                if worker.ready and time.monotonic() - worker.since > patience:
                    failed(worker, f"hangs: nothing is heard after {patience:g} s")
                continue
            try:
                said = worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                if not worker.ready:
                    raise RuntimeError(
                        f"{worker.kind} cannot be prepared ({worker.process.exitcode})"
                    ) from None
                failed(worker, f"ends its process with {worker.process.exitcode}")
                continue
            worker.since = time.monotonic()
            worker.ready = worker.ready or said == READY
            if isinstance(said, Answer):
                worker.left.remove(said.number)
                tallies[said.kind].add(said)
                progress(said)
            elif said is None and not give(worker):
                worker.process.join()
                crew.remove(worker)
        while orders and len(crew) < workers:
            crew.append(hire())
            give(crew[-1])
    return tallies


def shares(count: int, weights: dict[str, int]) -> dict[str, int]:
    """`count`, or a few more, divided in proportion."""
    return {kind: -(-count * weight // sum(weights.values())) for kind, weight in weights.items()}


# --- The command


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m tests.robustness.fuzz", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--count", type=int, default=COUNT, help="inputs, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(inputs.KINDS), help="these only")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one input, in this process")
    parser.add_argument(
        "--out", type=Path, default=Path("results/fuzz"), help="the report's folder"
    )
    options = parser.parse_args(given)
    if options.only:
        return again(options.only, options.seed)
    missing = {kind: why for kind, made in inputs.KINDS.items() if (why := made.missing())}
    kinds = [kind for kind in options.kinds or inputs.KINDS if kind not in missing]
    for kind, why in missing.items():
        print(f"Left out: {kind} ({why})")
    began = time.monotonic()
    tallies = run(options.count, options.seed, kinds, progress=_show)
    seconds = time.monotonic() - began
    report = report_of(given, options.seed, tallies, missing, seconds)
    print(table(report))

    from lockstep.common.report import write_json

    print(f"Report: {write_json(report, options.out)}")
    return 1 if report["failures"] else 0


def again(only: str, seed: int) -> int:
    kind, _, number = only.partition(":")
    with tempfile.TemporaryDirectory(prefix="lockstep-fuzz-", ignore_cleanup_errors=True) as room:
        answer = Reader(kind, inputs.KINDS[kind](), seed, Path(room), Watch()).answer(int(number))
        os.chdir("/")
    print(f"{only}, seed {seed}: {answer.what}\n{answer.outcome}: {answer.detail}")
    print(f"{answer.seconds:.2f} s, {answer.memory:,} bytes")
    return int(answer.outcome == "failed")


def _show(answer: Answer) -> None:
    if answer.outcome == "failed":
        print(f"{answer.kind}:{answer.number} ({answer.what!a:.200}): {answer.detail}", flush=True)


def report_of(
    given: Sequence[str],
    seed: int,
    tallies: dict[str, Tally],
    missing: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """report.json, as a dictionary."""
    return {
        "schema": 1,
        "command": ["-m", "tests.robustness.fuzz", *given],
        "environment": environment.describe(),
        "seed": seed,
        "limits": {"seconds": inputs.Kind.seconds, "bytes": inputs.Kind.memory},
        "seconds": round(seconds, 1),
        "inputs": sum(tally.inputs for tally in tallies.values()),
        "refused": sum(tally.refused for tally in tallies.values()),
        "accepted": sum(tally.accepted for tally in tallies.values()),
        "failures": sum(len(tally.failures) for tally in tallies.values()),
        "left_out": missing,
        "kinds": {
            kind: {
                "inputs": tally.inputs,
                "refused": tally.refused,
                "accepted": tally.accepted,
                "slowest_seconds": round(tally.slowest, 3),
                "largest_bytes": tally.largest,
                "failures": sorted(tally.failures, key=lambda failure: failure["number"]),
            }
            for kind, tally in tallies.items()
        },
    }


def table(report: dict[str, Any]) -> str:
    """The counts, a line for each kind."""
    line = "{:<14}{:>9}{:>9}{:>10}{:>9}{:>12}{:>12}"
    lines = [
        line.format("kind", "inputs", "refused", "accepted", "failed", "slowest", "most memory")
    ]
    for kind, row in [*report["kinds"].items(), ("all", report)]:
        seconds, size = row.get("slowest_seconds"), row.get("largest_bytes")
        failed = row["failures"] if isinstance(row["failures"], int) else len(row["failures"])
        last = ("", "") if size is None else (f"{seconds:.1f} s", f"{size / 1e6:,.0f} MB")
        lines.append(
            line.format(kind, f"{row['inputs']:,}", row["refused"], row["accepted"], failed, *last)
        )
    return "\n".join([*lines, f"Seed {report['seed']}, {report['seconds']:.0f} s."])


if __name__ == "__main__":
    sys.exit(main())
