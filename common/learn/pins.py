"""Lines of the two backends that their authors pair, where the alignment by similarity errs.

A pin pairs one line of each side, or says of a line that it has no partner. `locate` checks all of
them against the sources.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lockstep.common.learn.notes import SourceLine, line_of
from lockstep.common.learn.outline import SECTIONS
from lockstep.common.learn.sources import Definition, SourceError


class Pin(NamedTuple):
    """Two lines that do the same, or one that has no partner."""

    torch: SourceLine | None
    flax: SourceLine | None


@dataclass
class Pinned:
    """The numbers of the pinned lines in one pair of definitions."""

    together: set[tuple[int, int]] = field(default_factory=set)
    alone: dict[str, set[int]] = field(default_factory=lambda: {"torch": set(), "flax": set()})


def both(definition: str, torch: str, flax: str) -> Pin:
    """Two lines in definitions of the same name."""
    return Pin(SourceLine(definition, torch), SourceLine(definition, flax))


def torch_only(definition: str, snippet: str) -> Pin:
    return Pin(SourceLine(definition, snippet), None)


_STEP = "backend.py:Backend._step"
_INIT = "backend.py:Backend.__init__"
_START = "backend.py:Backend.init"
_SCHEDULE = "optimizer.py:make_schedule"

PINS = (
    # One step. JAX's gradients are a function's results: there is nothing to clear.
    torch_only(_STEP, "convert.set_masks("),
    torch_only(_STEP, "optimizer.zero_grad()"),
    both(_STEP, "loss.backward()", "jax.value_and_grad("),
    both(_STEP, "optimizer.step()", "self.optimizer.update("),
    torch_only(_STEP, "scheduler.step(loss)"),
    both("convert.py:cast_to_compute", "tensor.to(dtype)", "tensor.astype(dtype)"),
    both("losses.py:cross_entropy", "F.cross_entropy(", "return losses.mean()"),
    both("layers.py:max_pooling", "return (Pool2x2", "return max_pool"),
    both("models/vit.py:ViT.__init__", "self.patches = ", "self.patches = "),
    # Optimizer and schedule
    both("optimizer.py:make_optimizer", "return SGD(", "optimizer = optax.sgd("),
    both(_SCHEDULE, "lr_scheduler.StepLR(", "period = schedule.period"),
    Pin(
        SourceLine(_SCHEDULE, "lr_scheduler.ExponentialLR("),
        SourceLine(_SCHEDULE, "optax.exponential_decay(", after='case "exponential"'),
    ),
    both(
        _SCHEDULE, "return lr_scheduler.CosineAnnealingLR(", "rate = optax.cosine_decay_schedule("
    ),
    both(_SCHEDULE, "falling = ", "falling = "),
    both(_SCHEDULE, "lr_scheduler.SequentialLR(", "optax.join_schedules("),
    both("optimizer.py:export_schedule", '"cooldown": ', '"cooldown": '),
    both("optimizer.py:export_slots", "return {slot", "return kept if"),
    torch_only("optimizer.py:restore_slots", "if name in tensors"),
    # Many steps, evaluation, probe
    torch_only("compiled.py:ManySteps.__call__", "return self._one_by_one("),
    torch_only("compiled.py:ManySteps.__call__", "state, others = "),
    both("compiled.py:ManySteps._scan", "return scan(", "return jax.lax.scan("),
    both("backend.py:Backend.evaluate", "logits = self._forward(", "self._compiled_evaluate("),
    torch_only("backend.py:Backend.probe", "convert.set_masks("),
    # Conversion
    both(_START, "optimizer = make_optimizer(", "self.optimizer.init("),
    both(_START, "restore_slots(", "restore_slots("),
    both(_START, "restore_schedule(", "restore_schedule("),
    both("convert.py:to_numpy", "return tensor.numpy().copy()", "return np.array(array)"),
    # Data and set-up
    both("inputs.py:Inputs.images", "movedim(-1, -self.axes)", "jnp.asarray(images, self.dtype)"),
    both("inputs.py:Inputs.labels", "torch.int64", "jnp.int32"),
    both("inputs.py:Inputs.__init__", "self._pixel_table = ", "self._pixel_table = "),
    both(_INIT, "self._template = build(", "network = build("),
    torch_only(_INIT, "self._dropout_layers = "),
    both("user_module.py:build", 'torch.device("meta")', "nnx.eval_shape("),
    both("user_module.py:build_module", "module = network(classes)", "module = adapters.built("),
    both("device.py:configure_determinism", "matmul.allow_tf32", "jax_default_matmul_precision"),
)


def locate(
    backends: Mapping[str, Mapping[str, Definition]], pins: Sequence[Pin] = PINS
) -> dict[tuple[str, str], Pinned]:
    """The pinned lines of each pair of definitions, by the names of the two.

    Raises:
        SourceError: if a definition or a line is gone, if a line is not the only one, or if the
            page does not show the two definitions of a pin next to each other.
    """
    partners = {
        (pair.torch, pair.flax)
        for section in SECTIONS
        for pair in section.pairs
        if pair.torch and pair.flax
    }
    found: dict[tuple[str, str], Pinned] = {}
    for pin in pins:
        lines = {
            side: line_of(backends, side, source_line, "a pin").number
            for side, source_line in (("torch", pin.torch), ("flax", pin.flax))
            if source_line is not None
        }
        pair = _pair_of(pin, partners)
        pinned = found.setdefault(pair, Pinned())
        if len(lines) == 2:
            pinned.together.add((lines["torch"], lines["flax"]))
        for side, number in lines.items():
            if len(lines) == 1:
                pinned.alone[side].add(number)
    return found


def _pair_of(pin: Pin, partners: Collection[tuple[str, str]]) -> tuple[str, str]:
    """The names of the two definitions that the page shows next to each other."""
    names = pin.torch and pin.torch.definition, pin.flax and pin.flax.definition
    for pair in partners:
        if all(name in (None, own) for name, own in zip(names, pair, strict=True)):
            return pair
    shown = " and ".join(filter(None, names))
    raise SourceError(f"a pin names {shown}, no pair of outline.py: change pins.py")
