"""The errors that a user can cause. Each message says what to do; the command line prints it and
exits with 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

MAX_SHOWN = 4  # names in one line


class LockstepError(Exception):
    """A request that cannot be carried out; the message says what to do."""


class ConfigError(LockstepError):
    """An option, or a combination of options, that does not describe a run."""


class DataError(LockstepError):
    """Data that are missing, damaged, or unsuitable for the run."""


class RecordError(LockstepError):
    """A record of a run that is missing, damaged, stale, or of another run."""


class BackendError(LockstepError):
    """A framework or device that is not there, or cannot train the network."""


class RankFailed(BackendError):
    """One of the processes that train a run together died, hung, or raised an error: the run ends,
    and can be resumed."""


class ScriptError(LockstepError):
    """A training script of the user's that cannot be run, or cannot be recorded."""


def printable(text: object) -> str:
    """One line without control characters, whatever a file or an option is called."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))


def reason(error: BaseException) -> str:
    """The kind of an error and the first line of its message, for an error of user code."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@contextmanager
def user_code(text: str, remedy: str = "") -> Iterator[None]:
    """Turn an exception of user code into a ConfigError of one line: `text (its reason): remedy`."""
    try:
        yield
    except LockstepError:
        raise
    except Exception as error:  # user code may raise anything
        raise ConfigError(": ".join(filter(None, [f"{text} ({reason(error)})", remedy]))) from error


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The word that was probably meant; None if none is similar."""
    import difflib  # only after an error

    return next(iter(difflib.get_close_matches(word, list(known), 1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The word that was probably meant, if any, and all known words."""
    known = list(known)
    proposal = nearest(word, known)
    there_are = f"choose one of {', '.join(known)}"
    return f"did you mean {proposal}? Or {there_are}" if proposal else there_are


def shorten(names: Iterable[str], between: str = ", ") -> str:
    """The first names, shortened, without control characters, and how many more there are."""
    names = [printable(name) for name in names]
    names = [name if len(name) <= 60 else f"{name[:57]}..." for name in names]
    more = f"{between}and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return between.join(names[:MAX_SHOWN]) + more
