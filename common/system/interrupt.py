"""Ctrl-C and SIGTERM: training stops where it can be resumed; a second signal stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn, Self, TextIO

GRACE = 5.0  # seconds that training has to finish a chunk; a compiler that needs longer is stopped
ANNOUNCEMENT = "Stopping after this chunk and saving a checkpoint; press Ctrl-C again to stop now."


class SignalHandler:
    """The SIGINT and SIGTERM of one run of the program, as a context manager.

    Inside the block the first signal raises KeyboardInterrupt; inside `deferred` it does so only
    after GRACE seconds. The second one ends the process. Outside the block, and in any thread but
    the main one, no signal is seen.

    Args:
        announce: whether to print a line when a signal is deferred.
    """

    def __init__(self, announce: bool = True) -> None:
        self.announce = announce
        self.patience = 0.0  # seconds after the first signal in which a second one is the same one
        self._received: int | None = None
        self._received_at = 0.0
        self._installed = False
        self._deferred = False
        self._masked = False
        self._interrupting = False
        self._forward: Callable[[], object] | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other one gets signals
            self._installed = True
            for number in (signal.SIGINT, signal.SIGTERM):
                self._undo.callback(signal.signal, number, signal.signal(number, self._on_signal))
            self._undo.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            self._silence_libraries()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.close()
        self._installed = False

    def requested(self) -> bool:
        """Whether a signal came."""
        return self._received is not None

    def status(self) -> int:
        """The exit status of an interrupted command: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (signal.SIGINT if self._received is None else self._received)

    def receive_for_a_rank(self, number: int) -> None:
        """A signal to a process that works for this one; it may have come here as well."""
        if not self.requested():
            os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer the first signal to the end of the block, or for GRACE seconds."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before
            if self._installed:
                signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def masked(self) -> Iterator[None]:
        """Raise nothing inside the block, which must be short."""
        before, self._deferred, self._masked = self._deferred, True, True
        try:
            yield
        finally:
            self._deferred, self._masked = before, False

    def forward_to(self, callback: Callable[[], object] | None) -> None:
        """Forward the first signal to `callback`; None stops forwarding."""
        self._forward = callback
        if callback is not None and self.requested():
            callback()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received, self._received_at = number, time.monotonic()
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, self._on_second_signal if self.patience else signal.SIG_DFL)
        if self._forward is not None:
            self._forward()
        if not self._deferred:
            self._interrupt()
        if self.announce:  # not `print`: this may come in the middle of one
            os.write(2, f"\n{ANNOUNCEMENT}\n".encode())
        self._undo.callback(signal.signal, signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        signal.signal(signal.SIGALRM, self._on_timeout)
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    def _on_second_signal(self, number: int, frame: FrameType | None) -> None:
        """Several processes of one run, and what started them, may all get or pass on the first."""
        del frame
        if time.monotonic() - self._received_at > self.patience:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _on_timeout(self, number: int, frame: FrameType | None) -> None:
        if self._masked:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        if self._deferred:  # again, if a library swallows this one
            signal.setitimer(signal.ITIMER_REAL, GRACE)
        self._interrupt()

    def _interrupt(self) -> NoReturn:
        self._interrupting = True
        raise KeyboardInterrupt

    def _silence_libraries(self) -> None:
        """Print nothing of what KeyboardInterrupt makes libraries say.

        PyTorch traces a backward pass in its anomaly mode when it compiles, and warns with a
        "Traceback of forward call that caused the error". A filter is not enough: a library that
        is inside `warnings.catch_warnings` removes it when it leaves. An exception that comes
        while an object is deleted is printed, too.
        """
        show_warning, show_unraisable = warnings.showwarning, sys.unraisablehook

        def show_unless_interrupting(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not self._interrupting:
                show_warning(message, category, filename, lineno, file, line)

        def unraisable(found: sys.UnraisableHookArgs) -> None:
            if not self._interrupting or found.exc_type is not KeyboardInterrupt:
                show_unraisable(found)

        def restore() -> None:
            warnings.showwarning, sys.unraisablehook = show_warning, show_unraisable

        self._undo.callback(restore)
        warnings.showwarning, sys.unraisablehook = show_unless_interrupting, unraisable
