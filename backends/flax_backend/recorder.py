"""What a recorder has to know of JAX, and of the libraries built on it. Reads next to
backends/torch_backend/recorder.py."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
from flax import nnx
from jax.core import Tracer

from lockstep.backends.adapters.shards import own_rows, placed_like, whole
from lockstep.common.errors import ConfigError
from lockstep.common.protocol import Arrays
from lockstep.common.recorder.adapter import SCALARS_ROUNDING, SLOTS, Change, Keep, State, Tree

Path = tuple[str, ...]
# The last part of a path within nnx's variables, which names no part of the model.
WRAPPERS = ("value", "raw_value")


_CORRECTION = optax.tree.bias_correction


class Adapter:
    """Trees of arrays are what a script passes around; `nnx` objects are changed in place."""

    def __init__(self) -> None:
        self._objects: dict[int, Tree] = {}  # nnx modules and optimizers, by position
        self._prefixes: list[Path | None] = []  # of what `begin` was given; None: an optimizer
        self._several = False
        self._start: Arrays = {}
        self._trained: list[str] = []
        self._paths: dict[Path, str] = {}  # of the parameters
        self._keep: Keep = lambda name, array: None
        self._recording = True
        self._taps = 0  # in programs, so far
        self._latest: dict[str, int] = {}  # the tap of this step that counts, by name
        self._interceptors = contextlib.ExitStack()
        self._notes: list[str] = []

    def begin(self, state: State, change: Change, keep: Keep) -> State:
        self._keep = keep
        holders = [thing for thing in state if not _is_optimizer(thing)]
        self._several = len(holders) > 1
        found = []
        for thing in state:
            place = next((i for i, holder in enumerate(holders) if holder is thing), None)
            prefix = (str(place),) if self._several and place is not None else ()
            self._prefixes.append(None if place is None else prefix)
            if isinstance(thing, (nnx.Module, nnx.Optimizer)):
                found.append(self._begin_object(thing, prefix, change, place))
            else:
                found.append(self._begin_tree(thing, prefix, change, place))
        self._intercept()
        return tuple(found)

    def _begin_object(self, thing: Tree, prefix: Path, change: Change, place: int | None) -> Tree:
        state = nnx.state(thing)
        embeddings = _unpinned_embeddings(thing)
        new = _changed(state, _names(state, prefix), change)
        nnx.update(thing, new)
        for embedding in embeddings:
            embedding.dtype = embedding.embedding.dtype
        self._objects[len(self._objects)] = thing
        if place is not None:
            trained = {prefix + path for path, _ in _leaves(nnx.state(thing, nnx.Param))}
            self._add(_leaves(new, prefix), trained)
        return thing

    def _begin_tree(self, thing: Tree, prefix: Path, change: Change, place: int | None) -> Tree:
        new = _changed(thing, _names(thing, prefix), change)
        if place is not None:
            self._add(_leaves(new, prefix), None)
        return new

    def sync(self, state: State, change: Change) -> State:
        state = state or tuple(self._objects.values())
        if len(state) < len(self._prefixes):
            raise ConfigError(
                "run.sync() was given nothing, and run.begin a pytree: give it the same, and go on "
                "with what it returns"
            )
        found, taken = [], set[str]()
        for thing, prefix in zip(state, self._prefixes, strict=True):
            tree = _as_tree(thing)
            if prefix is None:
                names = self._slot_names(tree, taken)
                taken |= set(names.values())
            else:
                names = _names(tree, prefix)
            new = _changed(tree, names, change)
            if tree is thing:
                found.append(new)
            else:
                nnx.update(thing, new)
                found.append(thing)
        return tuple(found)

    def _add(self, leaves: Iterator[tuple[Path, Tree]], trained: set[Path] | None) -> None:
        for path, leaf in leaves:
            name = ".".join(path)
            self._start[name] = _copy(leaf)
            if trained is None or path in trained:
                if jnp.issubdtype(leaf.dtype, jnp.floating):
                    self._trained.append(name)
                self._paths[path] = name

    def _intercept(self) -> None:
        """Report the output of each module of linen and Haiku, which have a hook for that."""
        if (linen := sys.modules.get("flax.linen")) is not None:

            def of_linen(
                call: Callable[..., Tree], args: Tree, kwargs: Tree, context: Tree
            ) -> Tree:
                output = call(*args, **kwargs)
                if context.method_name == "__call__":
                    self.tap(".".join(context.module.path) or "output", output)
                return output

            self._interceptors.enter_context(linen.intercept_methods(of_linen))
        if (haiku := sys.modules.get("haiku")) is not None:

            def of_haiku(
                call: Callable[..., Tree], args: Tree, kwargs: Tree, context: Tree
            ) -> Tree:
                output = call(*args, **kwargs)
                if context.method_name == "__call__":
                    self.tap(context.module.module_name, output)
                return output

            self._interceptors.enter_context(haiku.intercept_methods(of_haiku))

    def move_scalars(self, share: float) -> None:
        """It changes optax itself, whose transforms look this function up at each call."""
        optax.tree.bias_correction = partial(_bias_correction, share) if share else _CORRECTION

    def start(self) -> Arrays:
        return dict(self._start)

    def weights(self, params: Tree = None) -> Arrays:
        if params is not None:
            return {".".join(path): _copy(leaf) for path, leaf in _leaves(params)}
        return self._live()

    def _live(self) -> Arrays:
        modules = [thing for thing in self._objects.values() if isinstance(thing, nnx.Module)]
        return {
            ".".join((str(i), *path) if self._several else path): _copy(leaf)
            for i, module in enumerate(modules)
            for path, leaf in _leaves(nnx.state(module))
        }

    def parameters(self) -> list[str]:
        return list(self._trained)

    def gradients(self, grads: Tree = None) -> Arrays:
        if grads is None:
            return {}
        return {".".join(path): _copy(leaf) for path, leaf in _leaves(grads)}

    def optimizer_state(self, opt_state: Tree = None) -> Arrays:
        optimizers = [o for o in self._objects.values() if isinstance(o, nnx.Optimizer)]
        states = _parts(opt_state) if opt_state is not None else map(nnx.state, optimizers)
        found: Arrays = {}
        for state in states:
            names = self._slot_names(state, found)
            found |= {names[path]: _copy(leaf) for path, leaf in _leaves(state) if path in names}
        return found

    def _slot_names(self, state: Tree, taken: Container[str]) -> dict[Path, str]:
        """What the arrays of one optimizer are called, "<slot> of <parameter>". Of several things
        that `begin` was given, an optimizer belongs to the first that its arrays fit and that has
        none yet."""
        count = 1 + max((int(path[0]) for path in self._paths), default=0) if self._several else 0
        best: dict[Path, str] = {}
        for owner in ((), *((str(i),) for i in range(count))):
            found = {}
            for path, leaf in _leaves(state):
                slot = self._slot(path, leaf.shape, owner)
                if slot is not None and slot not in taken:
                    found[path] = slot
            best = max(best, found, key=len)
        return best

    def _slot(self, path: Path, shape: tuple[int, ...], owner: Path) -> str | None:
        """ "<slot> of <parameter>": the longest end of a path that is a parameter's of `owner`; the
        slot stands before it."""
        for start in range(1, len(path)):
            name = self._paths.get(owner + path[start:])
            if name is not None and self._start[name].shape == shape:
                slots = [part for part in path[:start] if part in SLOTS]
                return f"{SLOTS[slots[-1]] if slots else path[start - 1]} of {name}"
        return None

    def learning_rate(self) -> float | None:
        return None

    def map_arrays(self, value: Tree, change: Change) -> Tree:
        def of_leaf(path: str, leaf: Tree) -> Tree:
            if not _is_array(leaf):
                return leaf
            array = own_rows(leaf)
            if (new := change(path, array)) is array:
                return leaf
            return placed_like(leaf, new)

        if _is_array(value):
            return of_leaf("", value)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: of_leaf(_path(path), leaf), value
        )

    def tap(self, name: str, value: Tree) -> None:
        if not self._recording:
            return
        array = next((leaf for leaf in jax.tree.leaves(value) if _is_float(leaf)), None)
        if array is None:
            return
        if not isinstance(array, Tracer):
            self._keep(name, _copy(array))
        elif _is_batched(array):
            self._notes.append(f"{name!r} is inside jax.vmap and is not recorded: tap it outside")
        else:
            self._taps += 1
            self._keep(name, None)
            jax.debug.callback(partial(self._arrived, name, self._taps), array)

    def _arrived(self, name: str, tap: int, array: Tree) -> None:
        """A program's tensors arrive in any order: of several calls, that counts which was traced
        last."""
        if tap >= self._latest.get(name, 0):
            self._latest[name] = tap
            self._keep(name, np.array(array))

    def wait(self) -> None:
        if self._taps:
            jax.effects_barrier()
        self._latest = {}

    def end_first_steps(self) -> None:
        """Compiled programs hold the taps; they are compiled anew without them."""
        self._recording = False
        self._keep = lambda name, array: None
        self._interceptors.close()
        if self._taps:
            jax.clear_caches()

    def random(self, numbers: np.ndarray, state: State) -> jax.Array:
        leaves = (leaf for thing in state for _, leaf in _leaves(_as_tree(thing)))
        first = next((leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)), None)
        if isinstance(jnp.zeros(()), Tracer):
            raise ConfigError(
                "run.random inside jax.jit would give the same numbers in each step: call it "
                "outside, and pass the numbers in"
            )
        return jnp.asarray(numbers, dtype=None if first is None else first.dtype)

    def detached(self, value: Tree) -> Tree:
        return value

    def notes(self) -> list[str]:
        return list(dict.fromkeys(self._notes))

    def describe(self) -> dict[str, object]:
        versions = {
            name: str(getattr(sys.modules[name], "__version__", "unknown"))
            for name in ("jax", "flax", "optax", "equinox", "haiku")
            if name in sys.modules
        }
        return {**versions, "device": jax.default_backend()}


def _bias_correction(share: float, moment: Tree, decay: Tree, count: Tree) -> Tree:
    """That of optax, with 1 - decay^count moved by a share of what float32 may round of it."""
    moved = 1 - share * SCALARS_ROUNDING / (1 - decay**count)
    found = _CORRECTION(moment, decay, count)
    return jax.tree.map(lambda array: array * jnp.asarray(moved, array.dtype), found)


# --- Trees of arrays


def _as_tree(thing: Tree) -> Tree:
    return nnx.state(thing) if isinstance(thing, (nnx.Module, nnx.Optimizer)) else thing


def _unpinned_embeddings(thing: Tree) -> list[nnx.Embed]:
    """Those that compute in the precision of their weights. `nnx.Embed` remembers that precision
    from its construction, unlike the other layers, so that it has to follow its weights."""
    if not isinstance(thing, nnx.Module):
        return []
    modules = (module for _, module in nnx.iter_modules(thing))
    embeddings = [module for module in modules if isinstance(module, nnx.Embed)]
    return [e for e in embeddings if e.dtype == e.embedding.dtype]


def _is_optimizer(thing: Tree) -> bool:
    """Whether it is an optimizer or the state of one, as optax has it."""
    if isinstance(thing, nnx.Optimizer):
        return True
    kinds = jax.tree.leaves(thing, is_leaf=lambda x: type(x).__module__.startswith("optax"))
    return (
        bool(kinds)
        and all(type(kind).__module__.startswith("optax") for kind in kinds if not _is_array(kind))
        and any(type(kind).__module__.startswith("optax") for kind in kinds)
    )


def _parts(opt_state: Tree) -> list[Tree]:
    """The states of several optimizers, where they were given as a tuple, a list or a dictionary."""
    if isinstance(opt_state, dict):
        return list(opt_state.values())
    return list(opt_state) if type(opt_state) in (tuple, list) else [opt_state]


def _leaves(tree: Tree, prefix: Path = ()) -> Iterator[tuple[Path, Tree]]:
    """The arrays of a tree with their paths; keys of random numbers are left out."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in flat:
        if _is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            parts = [_part(key) for key in path]
            while parts and parts[-1] in WRAPPERS:
                parts.pop()
            yield prefix + tuple(parts), leaf


def _part(key: Tree) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _names(tree: Tree, prefix: Path) -> dict[Path, str]:
    """What the arrays of a tree are called, by their paths in it."""
    return {path: ".".join(prefix + path) for path, _ in _leaves(tree)}


def _changed(tree: Tree, names: Mapping[Path, str], change: Change) -> Tree:
    """The tree with each float array that has a name passed through `change`."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = {id(leaf): names[path] for path, leaf in _leaves(tree) if path in names}
    new = []
    for _, leaf in flat:
        if id(leaf) in named and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = placed_like(leaf, change(named[id(leaf)], whole(leaf)))
        new.append(leaf)
    return jax.tree_util.tree_unflatten(structure, new)


def _path(keys: tuple[Tree, ...]) -> str:
    """ "[0].image", as the adapter of PyTorch writes it."""
    texts = (jax.tree_util.keystr((key,), simple=True) for key in keys)
    sequences = (isinstance(key, jax.tree_util.SequenceKey) for key in keys)
    return "".join(
        f"[{text}]" if sequence else f".{text}"
        for text, sequence in zip(texts, sequences, strict=True)
    )


def _is_array(leaf: Tree) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def _is_float(leaf: Tree) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_batched(tracer: Tree) -> bool:
    """Whether the tracer, or one that it wraps, belongs to `jax.vmap`."""
    while tracer is not None:
        if type(tracer).__name__ == "BatchTracer":
            return True
        tracer = getattr(tracer, "primal", None)
    return False


def _copy(array: Tree) -> np.ndarray:
    return np.array(whole(array))
