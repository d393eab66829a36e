"""Which tensor of one recording is which of the other.

Two scripts call their tensors by other names, and store them in other layouts. The steps, each for
what the ones before have left:

1. **A names file** says so.
2. **Equal values.** Both scripts usually start from the same weights. Tensors with the same numbers
   in any order meet by a digest; then their layout is found: first by permuting and reshaping axes,
   then by looking up single values (`values.py`). Several with equal numbers (two layers from one
   seed) are told apart by step 5's scores.
3. **Parts.** A tensor whose values lie within a larger one of the other side is a part of it: q, k
   and v of a packed projection, the layers of a stack.
4. **Equal gradients.** Zeros and ones are alike in every layer, but their gradients in step 0 are
   not (or what the first steps added, where no gradients were recorded).
5. **Siblings and names.** Each match votes that the modules round its two tensors are one, and so
   on outwards (`kinship.py`). Names count by common terms (`likeness.py`), roles (weight, scale,
   kernel), numbers and the order of definition.

Where most tensors have no equal partner, the two start from other weights: `same_start` is False,
and names decide.

Equal values are not always right. What a wrong converter put into the wrong place must be matched
with what it should equal, so that the verdict can name it: q loaded from k's values is matched with
q, because their names say so; a square kernel that was not transposed, where all others of its kind
are, is compared as if it were. `differing` then says what its values are instead.

The layout of a match without equal values is that of its kind (`conventions.py`); that of a bias
follows from the weight next to it.
"""

from __future__ import annotations

from collections.abc import Mapping

from lockstep.common.recorder.matched import Difference, Match, Matching
from lockstep.common.recorder.matcher import Matcher
from lockstep.common.recorder.names import expand, split_key
from lockstep.common.recorder.recording import Recording
from lockstep.common.recorder.summary import summary

__all__ = ["Difference", "Match", "Matching", "match"]
NAMES_FILE = "names: "  # how a message about a line begins


def match(a: Recording, b: Recording, names: Mapping[str, str] | None = None) -> Matching:
    """Match the tensors in `weights` of two recordings.

    Args:
        a: one recording, whose names and layouts are the common ones.
        b: the other.
        names: A's name: B's name, of tensors or modules, as from `names.read_names`.

    Raises:
        ConfigError: if `names` has what is not there.
    """
    matcher = Matcher(a, b)
    lines = [(NAMES_FILE, split_key(one), other) for one, other in (names or {}).items()]
    matcher.by_names_file(expand(lines, a, b))
    matcher.by_value()
    matcher.by_parts()
    matcher.by_gradients()
    matcher.by_roles()
    matcher.by_siblings()
    return summary(matcher)
