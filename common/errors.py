"""The errors a user can cause. Each message names the remedy; the command line prints it and exits
with 2."""

from __future__ import annotations

from collections.abc import Iterable

MAX_SHOWN = 4  # names in one line


class LockstepError(Exception):
    """A request that cannot be carried out. Subclasses say which part of it; the message says what
    to do."""


class ConfigError(LockstepError):
    """An option, or a combination of options, that describes no run."""


class DataError(LockstepError):
    """Data that is missing, damaged, or not what the run needs."""


class RecordError(LockstepError):
    """A record of a run that is missing, damaged, stale, or of another run."""


class BackendError(LockstepError):
    """A framework or device that is not there."""


def printable(text: object) -> str:
    """One line that cannot command the terminal, whatever a file or an option was called."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The word that was probably meant; None if none is near."""
    import difflib  # only after an error

    return next(iter(difflib.get_close_matches(word, list(known), 1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A proposal for a misspelt word, and all words there are."""
    known = list(known)
    proposal = nearest(word, known)
    there_are = f"choose one of {', '.join(known)}"
    return f"did you mean {proposal}? Or {there_are}" if proposal else there_are


def shorten(names: Iterable[str], between: str = ", ") -> str:
    """Some names in one line, none of them longer than half of it, and none that commands the
    terminal."""
    names = [printable(name) for name in names]
    names = [name if len(name) <= 60 else f"{name[:57]}..." for name in names]
    more = f"{between}and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return between.join(names[:MAX_SHOWN]) + more
