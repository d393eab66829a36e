"""Ctrl-C and SIGTERM: what is under way is brought to an end that can be gone on from; a second one
stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

GRACE = 5.0  # seconds that training has to reach the end of a call; a compiler may need longer, and is stopped then

_signal: int | None = None  # the one that came
_patient = False  # whether what runs looks at `requested` by itself
_saving = False
_aloud = True
_further: Callable[[], object] | None = None  # is told of the signal, too


@contextlib.contextmanager
def handle_signals(aloud: bool = True) -> Iterator[None]:
    """Within the context, SIGINT and SIGTERM raise KeyboardInterrupt; within `deferred` only after a
    while.

    Args:
        aloud: whether to say so then.
    """
    global _signal, _aloud
    _signal, _aloud = None, aloud
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    before = {number: signal.signal(number, _came) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with warnings.catch_warnings():  # undoes what `_interrupt` sets
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the context, the first signal is only noted; KeyboardInterrupt follows if the context
    is not left soon."""
    global _patient
    before, _patient = _patient, True
    try:
        yield
    finally:
        _patient = before
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def masked() -> Iterator[None]:
    """Within the context, which must be short, the first signal raises nothing."""
    global _patient, _saving
    before, _patient, _saving = _patient, True, True
    try:
        yield
    finally:
        _patient, _saving = before, False


def forward_to(tell: Callable[[], object] | None) -> None:
    """Have the first signal tell another process as well; None: not any more."""
    global _further
    _further = tell
    if tell is not None and requested():
        tell()


def requested() -> bool:
    """Whether a signal came."""
    return _signal is not None


def status() -> int:
    """The exit status of a command that was interrupted: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (signal.SIGINT if _signal is None else _signal)


def _came(number: int, frame: Any) -> None:
    global _signal
    _signal = number
    for further in (signal.SIGINT, signal.SIGTERM):
        signal.signal(further, signal.SIG_DFL)
    if _further is not None:
        _further()
    if not _patient:
        _interrupt()
    if _aloud:  # not `print`: this may come in the middle of one
        os.write(2, b"\nstopping, and keeping a checkpoint; once more stops at once\n")
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, GRACE)


def _late(number: int, frame: Any) -> None:
    if _saving:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
    else:
        _interrupt()


def _interrupt() -> NoReturn:
    """Raise KeyboardInterrupt; what it makes a library warn of is not printed.

    PyTorch traces a backward pass in its anomaly mode when it compiles, and would print a "Traceback
    of forward call that caused the error".
    """
    warnings.simplefilter("ignore")
    raise KeyboardInterrupt
