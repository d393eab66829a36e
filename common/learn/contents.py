"""The order of the page: what a reader wants first stands first, and open; the rest is folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lockstep.common.learn.outline import SECTIONS, Pair, Section
from lockstep.common.learn.sources import SourceError

# The parts of the page, and their sections by key.
PARTS: Mapping[str, Sequence[str]] = {
    "The training": (
        "model",
        "step",
        "loss",
        "optimizer",
        "schedule",
        "fused",
        "evaluation",
        "adaptive",
    ),
    "Networks and tensors": ("networks", "conversion", "probe", "files"),
    "Data and set-up": ("data", "setup"),
}
# The definitions that are not folded, by PyTorch's name, or Flax's where there is no other.
OPEN = (
    "models/net.py:Net",
    "models/net.py:Net.__init__",
    "models/net.py:Net.forward",
    "backend.py:Backend._step",
    "backend.py:Backend._forward",
    "backend.py:Backend._model",
    "backend.py:Backend.train_step",
    "losses.py:cross_entropy",
    "optimizer.py:make_optimizer",
    "optimizer.py:make_schedule",
    "backend.py:Backend.train_steps",
    "compiled.py:ManySteps._scan",
    "backend.py:Backend.evaluate",
    "models/resnet20.py:Block.__init__",
    "models/resnet20.py:Block.forward",
    "convert.py:kernel_to_canonical",
    "backend.py:Backend.init",
    "backend.py:Backend.probe",
    "inputs.py:Inputs.images",
    "device.py:configure_determinism",
)


def ordered(
    parts: Mapping[str, Sequence[str]] = PARTS, sections: Sequence[Section] = SECTIONS
) -> dict[str, list[Section]]:
    """The sections of each part, in the order of the page.

    Raises:
        SourceError: if a section is in no part, or in two, or if `OPEN` names a definition that is
            in no section.
    """
    by_key = {section.key: section for section in sections}
    listed = [key for keys in parts.values() for key in keys]
    if sorted(listed) != sorted(by_key):
        wrong = sorted({*listed} ^ {*by_key}) or sorted(k for k in listed if listed.count(k) > 1)
        raise SourceError(f"contents.py does not have each section once: see {wrong[0]!r}")
    names = {pair.torch or pair.flax for section in sections for pair in section.pairs}
    if missing := [name for name in OPEN if name not in names]:
        raise SourceError(f"contents.py opens {missing[0]}, which is in no section: change it")
    return {title: [by_key[key] for key in keys] for title, keys in parts.items()}


def halves(section: Section) -> tuple[list[Pair], list[Pair]]:
    """What is open in a section, and what is folded."""
    opened = [pair for pair in section.pairs if (pair.torch or pair.flax) in OPEN]
    return opened, [pair for pair in section.pairs if pair not in opened]
