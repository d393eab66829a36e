"""What a fault is, and how one is put in and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from lockstep.common.config import Config
from lockstep.common.data import Dataset

# puts a value into an attribute, as pytest's `monkeypatch.setattr`
SetAttr = Callable[[object, str, Any], None]
Apply = Callable[[SetAttr, Config, Dataset], None]


@dataclass(frozen=True)
class Fault:
    """One mistake, and where its first difference lies: which the report should name, whether it
    does or not."""

    name: str  # lower case, with dashes
    description: str  # what is wrong
    stage: str  # one of `lockstep.common.protocol.STAGES`
    # a name or a pattern such as `momentum of *`; None where no tensor of the stage is to blame
    tensor: str | None
    source: str  # where the mistake, or what it goes against, is documented
    apply: Apply  # for a configuration that is resolved, and the data that the run is given
    options: dict[str, Any]  # fields of Config without which it does not show
    # shows at the end of an epoch, so that only the first so many images are trained on
    train_images: int | None
    needs_color_images: bool  # on grey images there is no difference
    changes_function: bool  # False where exact arithmetic would give the same numbers, and rounding alone is at fault
    lens: str | None  # the only lens that has this fault; None where all have it


@contextmanager
def inject(fault: Fault, config: Config, dataset: Dataset) -> Iterator[None]:
    """Within the context, the Flax side has this fault. Build, train and evaluate in it: programs
    are traced late."""
    with ExitStack() as stack:
        fault.apply(
            lambda target, name, value: stack.enter_context(mock.patch.object(target, name, value)),
            config,
            dataset,
        )
        yield


REGISTRY: list[Fault] = []


def fault(
    stage: str,
    tensor: str | None,
    source: str,
    *,
    train_images: int | None = None,
    needs_color_images: bool = False,
    changes_function: bool = True,
    lens: str | None = None,
    **options: Any,
) -> Callable[[Apply], Apply]:
    """Add a function to the catalogue: its name is the fault's name, its docstring the description,
    `options` Config's."""

    def collect(function: Apply) -> Apply:
        REGISTRY.append(
            Fault(
                name=function.__name__.replace("_", "-"),
                description=" ".join((function.__doc__ or "").split()),
                stage=stage,
                tensor=tensor,
                source=source,
                apply=function,
                options=options,
                train_images=train_images,
                needs_color_images=needs_color_images,
                changes_function=changes_function,
                lens=lens,
            )
        )
        return function

    return collect
