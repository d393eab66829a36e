"""A fault, and how it is put in and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

from lockstep.common.config import Config
from lockstep.common.data import Dataset

# sets an attribute, as pytest's `monkeypatch.setattr` does
SetAttr = Callable[[object, str, object], None]
Apply = Callable[[SetAttr, Config, Dataset], None]


@dataclass(frozen=True)
class Fault:
    """One mistake, and where its first difference lies, which the report should name."""

    name: str  # lower case, with dashes
    description: str  # what is wrong
    stage: str  # one of `lockstep.common.protocol.STAGES`
    # a name or a pattern such as `momentum of *`; None where no tensor of the stage is to blame
    tensor: str | None
    source: str  # where the mistake, or the right way, is documented
    apply: Apply  # called with the resolved configuration and the data of the run
    options: Mapping[str, object]  # fields of Config that the fault needs in order to show
    # for a fault that shows at the end of an epoch: train on the first so many images only
    train_images: int | None
    needs_color_images: bool  # on grey images there is no difference
    changes_function: bool  # False: exact arithmetic would give the same numbers; rounding differs
    precision: str | None  # the only precision that has this fault; None where all have it

    @property
    def held_out(self) -> bool:
        """Whether no rule of the verdict was set with it; see `lockstep.backends.faults.held_out`."""
        return self.apply.__module__.endswith(".held_out")


@contextmanager
def inject(fault: Fault, config: Config, dataset: Dataset) -> Iterator[None]:
    """Within the context, the backend (Flax, or a rank of PyTorch) has this fault. Build, train and
    evaluate inside it: JAX traces programs late."""
    with ExitStack() as stack:

        def set_attr(target: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        fault.apply(set_attr, config, dataset)
        yield


LATE = 30  # the step of faults that happen once
REGISTRY: list[Fault] = []


def fault(
    stage: str,
    tensor: str | None,
    source: str,
    *,
    train_images: int | None = None,
    needs_color_images: bool = False,
    changes_function: bool = True,
    precision: str | None = None,
    into: list[Fault] = REGISTRY,
    **options: object,
) -> Callable[[Apply], Apply]:
    """Add a function to the catalogue, or to the list `into`. Its name is the fault's name, its
    docstring the description; `options` are fields of Config."""

    def collect(function: Apply) -> Apply:
        into.append(
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
                precision=precision,
            )
        )
        return function

    return collect
