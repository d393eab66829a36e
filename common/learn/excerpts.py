"""The lines of the two backends that the walk-through shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from lockstep.common.config import BACKENDS
from lockstep.common.learn import alignment
from lockstep.common.learn.notes import SourceLine
from lockstep.common.learn.sources import Definition, SourceError, find

_STEP = "backend.py:Backend._step"
_MAKE = "optimizer.py:make_optimizer"
EXCERPTS: dict[str, dict[str, list[SourceLine]]] = {
    "images": {
        "torch": [SourceLine("inputs.py:Inputs.images", "movedim(-1, -self.axes)")],
        "flax": [SourceLine("inputs.py:Inputs.images", "jnp.asarray(images")],
    },
    "labels": {
        "torch": [SourceLine("inputs.py:Inputs.labels", "torch.int64")],
        "flax": [SourceLine("inputs.py:Inputs.labels", "jnp.int32")],
    },
    "conv1": {
        "torch": [SourceLine("models/net.py:Net.forward", "self.conv1(x)")],
        "flax": [SourceLine("models/net.py:Net.__call__", "self.conv1(x)")],
    },
    "logits": {
        "torch": [SourceLine("models/net.py:Net.forward", "return self.fc3(x)")],
        "flax": [SourceLine("models/net.py:Net.__call__", "return self.fc3(x)")],
    },
    "loss": {
        "torch": [SourceLine("losses.py:cross_entropy", "F.cross_entropy")],
        "flax": [SourceLine("losses.py:cross_entropy", ".mean()")],
    },
    "gradient": {
        "torch": [SourceLine(_STEP, "optimizer.zero_grad()"), SourceLine(_STEP, "loss.backward()")],
        "flax": [SourceLine(_STEP, "jax.value_and_grad(loss_of, has_aux=True)")],
    },
    "momentum": {
        "torch": [SourceLine(_STEP, "optimizer.step()")],
        "flax": [SourceLine(_STEP, "self.optimizer.update(")],
    },
    "parameter": {
        "torch": [SourceLine(_STEP, "optimizer.step()")],
        "flax": [SourceLine(_STEP, "optax.apply_updates(")],
    },
    "lr": {
        "torch": [SourceLine(_MAKE, "lr=config.lr,")],
        "flax": [SourceLine(_MAKE, "optax.sgd(")],
    },
    "momentum option": {
        "torch": [SourceLine(_MAKE, "momentum=config.momentum,")],
        "flax": [SourceLine(_MAKE, "optax.sgd(")],
    },
    "dampening": {
        "torch": [SourceLine(_MAKE, "dampening=config.dampening,")],
        "flax": [SourceLine(_MAKE, '("dampening", dampen(')],
    },
    "weight_decay": {
        "torch": [SourceLine(_MAKE, "weight_decay=config.weight_decay,")],
        "flax": [SourceLine(_MAKE, '"weight_decay",')],
    },
    "nesterov": {
        "torch": [SourceLine(_MAKE, "nesterov=config.nesterov,")],
        "flax": [SourceLine(_MAKE, "optax.sgd(")],
    },
}


def excerpt(
    backends: Mapping[str, Mapping[str, Definition]],
    source_lines: Mapping[str, Sequence[SourceLine]],
) -> dict[str, list[Markup]]:
    """Lines of the sources, highlighted, by side.

    Raises:
        SourceError: if one is gone.
    """
    return {
        side: [_line(backends[side], source_line) for source_line in source_lines[side]]
        for side in BACKENDS
    }


def _line(definitions: Mapping[str, Definition], source_line: SourceLine) -> Markup:
    if source_line.definition not in definitions:
        raise SourceError(
            f"{source_line.definition}, which the walk-through shows, is gone: change excerpts.py"
        )
    definition = definitions[source_line.definition]
    line = find(definition, source_line.definition, source_line.snippet)
    tokens = alignment.highlight(definition)[line.number]
    return alignment.markup(tokens[1:] if tokens[0][1].isspace() else tokens)
