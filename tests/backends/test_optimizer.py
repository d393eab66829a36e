"""`optax`, completed, takes the steps of `torch.optim.SGD`; snapshots carry an optimizer from one
backend to the other.

Gradients and losses are given, so that nothing but the optimizers and the schedules is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn

from lockstep.backends.flax_backend import optimizer as flax_side
from lockstep.backends.flax_backend.backend import configure_determinism
from lockstep.backends.torch_backend import optimizer as torch_side
from lockstep.common.config import SCHEDULES, Config, Schedule
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import Arrays, Snapshot
from tests.marks import slow_except

STEPS = 100
SIZES = {"conv1.kernel": (2, 2, 1, 2), "fc1.bias": (3,)}


@pytest.fixture(scope="module", autouse=True)
def float64_in_jax() -> None:
    configure_determinism("cpu")


class Path(NamedTuple):
    """Where an optimizer went."""

    parameters: np.ndarray  # (steps, numbers), after each step
    lr: np.ndarray  # (steps,), used by each step


class Course(NamedTuple):
    """What an optimizer is given."""

    start: Arrays
    gradients: Arrays  # (steps, ...) each
    losses: np.ndarray  # (steps,)


def course(seed: int, steps: int = STEPS) -> Course:
    """Normal gradients; losses that fall, then stay, under noise, so that plateaus come early and
    late."""
    generator = np.random.default_rng(seed)
    start = {name: generator.standard_normal(size) for name, size in SIZES.items()}
    gradients = {name: generator.standard_normal((steps, *size)) for name, size in SIZES.items()}
    losses = (
        1
        + np.exp(-np.arange(steps) / 15)
        + generator.choice([0.02, 0.3]) * generator.standard_normal(steps)
    )
    return Course(start, gradients, losses)


def torch_path(config: Config, given: Course) -> Path:
    """`torch.optim.SGD` itself, under the scheduler of the torch side."""
    model = nn.ParameterList([nn.Parameter(torch.tensor(array)) for array in given.start.values()])
    options = {
        field: getattr(config, field)
        for field in ("momentum", "dampening", "weight_decay", "nesterov")
    }
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, maximize=config.maximize, **options
    )
    assert torch_side.make_optimizer(config, model).state_dict() == optimizer.state_dict()
    scheduler = torch_side.Scheduler(config, optimizer)
    parameters, lr = [], []
    for step, loss in enumerate(given.losses):
        for parameter, gradient in zip(model, given.gradients.values(), strict=True):
            parameter.grad = torch.tensor(gradient[step])
        lr.append(scheduler.lr)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        scheduler.step(torch.tensor(loss))
        parameters.append(
            np.concatenate([parameter.detach().numpy().ravel() for parameter in model])
        )
    return Path(np.array(parameters), np.array(lr))


def flax_path(config: Config, given: Course, optimizer: Any = None) -> Path:
    """The optimizer of the Flax side, or another, in one compiled loop, as training is."""
    optimizer = optimizer or flax_side.make_optimizer(config, jnp.float64)

    def step(carry: Any, batch: Any) -> Any:
        (parameters, state, count), (gradients, loss) = carry, batch
        lr = flax_side.learning_rate(config, state, count)
        updates, state = optimizer.update(gradients, state, parameters, value=loss)
        parameters = optax.apply_updates(parameters, updates)
        return (parameters, state, count + 1), (parameters, lr)

    @jax.jit
    def run(start: Any, gradients: Any, losses: Any) -> Any:
        carry = start, optimizer.init(start), jnp.zeros((), jnp.int32)
        return jax.lax.scan(step, carry, (gradients, losses))[1]

    parameters, lr = run(*given)
    columns = [np.asarray(parameters[name]).reshape(len(given.losses), -1) for name in SIZES]
    return Path(np.concatenate(columns, axis=1), np.asarray(lr))


def parameter_gap(first: Path, second: Path) -> float:
    """The largest over steps and numbers, relative to the largest parameter so far where that is
    above 1."""
    scale = np.maximum.accumulate(np.abs(first.parameters).max(axis=1)).clip(min=1)
    return float((np.abs(first.parameters - second.parameters).max(axis=1) / scale).max())


def lr_gap(config: Config, first: Path, second: Path) -> float:
    """Relative to the first learning rate: cosine's recurrence loses digits, not size, as lr falls
    to 0."""
    return float(np.abs(first.lr - second.lr).max() / config.lr)


# measured over 400 drawn configurations: 2.5e-15; the smallest fault below: 4.0e-07
PARAMETER_BOUND, PARAMETER_FAULT = 1e-12, 1e-9
# measured over 400 drawn configurations: 2.9e-15; PyTorch's recurrence for cosine is off by 5.8e-15
# at most over 99 steps of periods up to 300; the int32 step count: 1.5e-08 (step), 3.9e-07
# (exponential)
LR_BOUND = 2e-14


# The same steps


@st.composite
def schedules(draw: Any, lr: float) -> Schedule:
    kind = draw(st.sampled_from(list(SCHEDULES)))
    gammas = st.floats(0.05, 0.95)
    options: dict[str, Any] = {
        "constant": dict,
        "step": lambda: {"period": draw(st.integers(1, 120)), "gamma": draw(st.floats(0.05, 1.0))},
        "multistep": lambda: {
            "milestones": tuple(sorted(draw(st.sets(st.integers(1, 110), min_size=1, max_size=4)))),
            "gamma": draw(st.floats(0.05, 1.0)),
        },
        "exponential": lambda: {"gamma": draw(st.floats(0.8, 1.0))},
        "cosine": lambda: {
            "period": draw(st.integers(STEPS, 300)),
            "min_lr": draw(st.floats(0, 1)) * lr,
        },
        "warmup-cosine": lambda: {
            "warmup": draw(st.integers(1, 120)),
            "start": draw(st.floats(0.001, 1.0)),
            "period": draw(st.integers(STEPS, 300)),
            "min_lr": draw(st.floats(0, 1)) * lr,
        },
        "plateau": lambda: {
            "window": draw(st.integers(1, 7)),
            "patience": draw(st.integers(0, 4)),
            "gamma": draw(gammas),
            "threshold": draw(st.floats(1e-5, 0.2)),
            "cooldown": draw(st.integers(0, 3)),
            "min_lr": draw(st.sampled_from([0.0, 0.1, 0.5])) * lr,
        },
    }[kind]()
    return Schedule(kind, **options)


@st.composite
def configs(draw: Any) -> Config:
    lr = draw(st.floats(1e-4, 0.3))
    momentum = draw(st.one_of(st.just(0.0), st.floats(0.01, 0.99)))
    nesterov = momentum > 0 and draw(st.booleans())
    return Config(
        lr=lr,
        momentum=momentum,
        dampening=0.0 if nesterov else draw(st.one_of(st.just(0.0), st.floats(-0.5, 1.5))),
        weight_decay=draw(st.one_of(st.just(0.0), st.floats(1e-5, 0.3))),
        nesterov=nesterov,
        maximize=draw(st.booleans()),
        clip_norm=draw(
            st.one_of(st.none(), st.floats(0.1, 5.0))
        ),  # gradients have a norm of 3.2, more or less
        schedule=draw(schedules(lr)),
    )


SHARP_STEP = Schedule("step", period=49, gamma=0.5)  # 49 * (1 / 49) is less than 1
WARM = Schedule("warmup-cosine", warmup=30, start=0.01, period=STEPS - 30, min_lr=0.001)
TO_THE_END = Schedule("cosine", period=STEPS - 1, min_lr=0.0)  # the last step has lr 0


@settings(
    max_examples=25,
    deadline=None,
    database=None,
    derandomize=True,  # each example is compiled: a quarter of a second
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@example(Config(lr=0.1, schedule=SHARP_STEP), 0)
@example(Config(lr=0.1, momentum=0.9, schedule=TO_THE_END), 0)
@example(Config(lr=0.1, momentum=0.9, schedule=WARM), 0)
@example(Config(lr=0.1, schedule=replace(WARM, warmup=1, period=STEPS - 2, min_lr=0.0)), 0)
@example(Config(lr=0.1, momentum=0.9, dampening=1.0, weight_decay=0.1, maximize=True), 0)
@given(config=configs(), seed=st.integers(0, 2**32 - 1))
def test_a_hundred_steps_are_those_of_torchs_sgd(config: Config, seed: int) -> None:
    given = course(seed)
    ours, theirs = flax_path(config, given), torch_path(config, given)
    assert np.isfinite(theirs.parameters).all()
    assert parameter_gap(theirs, ours) <= PARAMETER_BOUND
    assert lr_gap(config, theirs, ours) <= LR_BOUND


def test_a_warm_up_is_torchs_sequential_schedulers_step_by_step() -> None:
    """From the schedulers' documentation: a line from `start` to all of `lr`, then a cosine that
    begins at `lr`."""
    warmup, start, period, low, lr = 4, 0.1, 8, 0.05, 0.5
    schedule = Schedule("warmup-cosine", warmup=warmup, start=start, period=period, min_lr=low)
    config = Config(lr=lr, steps=warmup + period, schedule=schedule)
    expected = [lr * (start + (1 - start) * step / warmup) for step in range(warmup)]
    expected += [
        low + (lr - low) * (1 + np.cos(np.pi * step / period)) / 2 for step in range(period + 1)
    ]
    given = course(0, steps=len(expected))
    theirs, ours = torch_path(config, given).lr, flax_path(config, given).lr
    assert theirs[warmup] == ours[warmup] == lr  # the milestone's step
    np.testing.assert_allclose(theirs, expected, rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(ours, expected, rtol=1e-15, atol=1e-15)
    own = optax.warmup_cosine_decay_schedule(lr * start, lr, warmup, warmup + period, low)
    of_optax = [float(np.asarray(own(jnp.float64(step)))) for step in range(len(expected))]
    np.testing.assert_allclose(of_optax, ours, rtol=1e-15, atol=1e-15)
    later = flax_path(replace(config, schedule=replace(schedule, warmup=warmup + 1)), given).lr
    assert np.abs(later - theirs).max() > 0.05  # control


# Controls: what a port gets wrong, each in one place of the chain

LINKS = ("clip", "precision", "maximize", "weight_decay", "dampening", "sgd", "plateau")


def assemble(config: Config, order: tuple[str, ...] = LINKS, **links: Any) -> Any:
    """`make_optimizer`, with other links or in another order."""
    identity = optax.identity()
    parts = {
        "clip": flax_side.clip_gradients(config.clip_norm)
        if config.clip_norm is not None
        else identity,
        "precision": flax_side.upcast_gradients(),
        "maximize": optax.scale(-1.0) if config.maximize else identity,
        "weight_decay": optax.add_decayed_weights(config.weight_decay),
        "dampening": flax_side.dampen(config.dampening) if config.dampening else identity,
        "sgd": optax.sgd(flax_side.make_schedule(config), config.momentum, config.nesterov),
        "plateau": flax_side.reduce_on_plateau(config)
        if config.schedule.kind == "plateau"
        else identity,
    }
    return optax.named_chain(*((name, (parts | links)[name]) for name in order))


def plain(**fields: Any) -> Config:
    return Config(lr=0.05, momentum=0.9, **fields)


COSINE = Schedule("cosine", period=STEPS, min_lr=0.001)
PLATEAU = Schedule(
    "plateau", window=3, patience=1, gamma=0.5, threshold=1e-3, cooldown=1, min_lr=0.0
)


def momentum_089(config: Config) -> Any:
    return assemble(replace(config, momentum=0.89))


def dampening_ignored(config: Config) -> Any:
    return assemble(replace(config, dampening=0.0))


def dampening_on_the_first_step(config: Config) -> Any:
    return assemble(config, dampening=optax.scale(1 - config.dampening))


def decoupled_weight_decay(config: Config) -> Any:
    decay = optax.add_decayed_weights(-config.lr * config.weight_decay)
    return assemble(config, ("precision", "sgd", "weight_decay", "plateau"), weight_decay=decay)


def weight_decay_after_momentum(config: Config) -> Any:
    links = {
        "trace": optax.trace(config.momentum),
        "sgd": optax.sgd(flax_side.make_schedule(config)),
    }
    return assemble(config, ("precision", "trace", "weight_decay", "sgd", "plateau"), **links)


def nesterov_missing(config: Config) -> Any:
    return assemble(replace(config, nesterov=False))


def maximize_after_weight_decay(config: Config) -> Any:
    return assemble(config, ("precision", "weight_decay", "maximize", "sgd", "plateau"))


def lr_in_the_buffer(config: Config) -> Any:
    links = {
        "sgd": optax.sgd(flax_side.make_schedule(config)),
        "trace": optax.trace(config.momentum),
    }
    return assemble(config, ("precision", "sgd", "trace"), **links)


def clipped_without_epsilon(config: Config) -> Any:
    assert config.clip_norm is not None
    return assemble(config, clip=optax.clip_by_global_norm(config.clip_norm))


def clipped_after_weight_decay(config: Config) -> Any:
    return assemble(config, ("precision", "maximize", "weight_decay", "clip", "sgd", "plateau"))


def clipped_after_momentum(config: Config) -> Any:
    links = {
        "trace": optax.trace(config.momentum),
        "sgd": optax.sgd(flax_side.make_schedule(config)),
    }
    return assemble(config, ("precision", "trace", "clip", "sgd", "plateau"), **links)


def schedule_off_by_one(config: Config) -> Any:
    rate = flax_side.make_schedule(config)
    return assemble(config, sgd=optax.sgd(lambda count: rate(count + 1), config.momentum))


def warm_up_off_by_one(config: Config) -> Any:
    rate, warmup = flax_side.make_schedule(config), config.schedule.warmup

    def early(count: Any) -> Any:
        return rate(jnp.where(count < warmup, count + 1, count))

    return assemble(config, sgd=optax.sgd(early, config.momentum))


def staircase_by_division(config: Config) -> Any:
    schedule: Any = config.schedule
    rate = optax.exponential_decay(config.lr, schedule.period, schedule.gamma, staircase=True)
    return assemble(
        config, sgd=optax.sgd(lambda count: rate(jnp.asarray(count, jnp.float64)), config.momentum)
    )


def plateau_with_optax_timing(config: Config) -> Any:
    schedule: Any = config.schedule
    options = {
        "factor": schedule.gamma,
        "patience": schedule.patience + 1,
        "rtol": schedule.threshold,
    }
    plateau = optax.contrib.reduce_on_plateau(
        **options, cooldown=schedule.cooldown, accumulation_size=schedule.window
    )
    return assemble(config, plateau=plateau)


def plateau_with_optax_patience(config: Config) -> Any:
    schedule: Any = config.schedule
    impatient = replace(config, schedule=replace(schedule, patience=schedule.patience - 1))
    return assemble(config, plateau=flax_side.reduce_on_plateau(impatient))


def int32_step_count(config: Config) -> Any:
    schedule: Any = config.schedule
    rate = optax.exponential_decay(
        config.lr, 1, schedule.gamma
    )  # int32 by int32 is float32 in JAX, even with x64
    return assemble(config, sgd=optax.sgd(rate, config.momentum))


# the fault, a configuration that shows it, and the gap that was measured
FAULTS = [
    (momentum_089, plain(), 9.7e-2),
    (dampening_ignored, plain(dampening=0.3), 5.4e-1),
    (dampening_on_the_first_step, plain(dampening=0.3), 4.7e-2),
    (decoupled_weight_decay, plain(weight_decay=0.01, schedule=COSINE), 9.8e-2),
    (weight_decay_after_momentum, plain(weight_decay=0.01), 2.0e-1),
    (nesterov_missing, plain(nesterov=True), 1.1e-1),
    (maximize_after_weight_decay, plain(weight_decay=0.01, maximize=True), 3.5e-1),
    (lr_in_the_buffer, plain(schedule=COSINE), 2.2e-1),
    (clipped_without_epsilon, plain(clip_norm=1.0), 4.0e-7),
    (clipped_after_weight_decay, plain(clip_norm=1.0, weight_decay=0.1), 7.0e-1),
    (clipped_after_momentum, plain(clip_norm=1.0), 8.2e-1),
    (schedule_off_by_one, plain(schedule=COSINE), 2.7e-2),
    (warm_up_off_by_one, plain(schedule=WARM), 5.4e-2),
    (staircase_by_division, plain(schedule=SHARP_STEP), 1.4e-2),
    (plateau_with_optax_timing, plain(schedule=PLATEAU), 2.3e-2),
    (plateau_with_optax_patience, plain(schedule=PLATEAU), 3.0e-1),
    (int32_step_count, plain(schedule=Schedule("exponential", gamma=0.97)), 1.1e-6),
]


@pytest.mark.parametrize(
    ("fault", "config", "measured"),
    FAULTS,
    ids=[fault.__name__.replace("_", "-") for fault, *_ in FAULTS],
)
def test_the_comparison_sees_a_fault(
    fault: Callable[[Config], Any], config: Config, measured: float
) -> None:
    given = course(1)
    theirs = torch_path(config, given)
    assert (
        parameter_gap(theirs, flax_path(config, given, assemble(config))) <= PARAMETER_BOUND
    )  # without the fault
    gap = parameter_gap(theirs, flax_path(config, given, fault(config)))
    assert gap > PARAMETER_FAULT
    assert measured / 3 < gap < measured * 3


# Precision of the buffer


def updated(optimizer: Any, dtype: Any) -> tuple[Any, Any]:
    """The state before and after an update, as shapes and dtypes."""
    parameters = {name: jax.ShapeDtypeStruct(size, dtype) for name, size in SIZES.items()}
    before = jax.eval_shape(optimizer.init, parameters)
    loss = jax.ShapeDtypeStruct((), jnp.float32)

    def update(gradients: Any, state: Any, parameters: Any, loss: Any) -> Any:
        return optimizer.update(gradients, state, parameters, value=loss)[1]

    return before, jax.eval_shape(update, parameters, before, parameters, loss)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_momentum_buffer_keeps_the_dtype_of_the_parameters(dtype: str, kind: str) -> None:
    config = plain(dampening=0.1, weight_decay=0.1, schedule=Schedule(kind).resolve(STEPS))
    before, after = updated(flax_side.make_optimizer(config, jnp.dtype(dtype)), jnp.dtype(dtype))
    assert {leaf.dtype for leaf in after["sgd"][0].trace.values()} == {jnp.dtype(dtype)}
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), before) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), after
    )


def test_without_an_accumulator_dtype_the_bfloat16_buffer_would_become_float32() -> None:
    """The control of the test above."""
    _, after = updated(assemble(plain()), jnp.bfloat16)
    assert {leaf.dtype for leaf in after["sgd"][0].trace.values()} == {jnp.dtype("float32")}


def test_a_bfloat16_buffer_goes_through_a_scan() -> None:
    config = plain(nesterov=True, schedule=COSINE)
    given = course(0, steps=5)
    halves = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), given)

    def path(optimizer: Any) -> Path:
        return flax_path(config, halves, optimizer)

    assert path(flax_side.make_optimizer(config, jnp.bfloat16)).parameters.dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="carry"):
        path(assemble(config))  # control: the scan refuses a buffer that changes its dtype


# Snapshots

CUT, REST, BATCH = (
    5,
    7,
    2,
)  # 5 steps, the snapshot, 7 more; 5 is in the middle of a plateau's window of 2
JOURNEYS = {
    "plain": Config(lr=0.05),
    "step-nesterov-maximize": Config(
        lr=0.001,
        momentum=0.9,
        nesterov=True,
        maximize=True,
        schedule=Schedule("step", period=5, gamma=0.5),
    ),
    "multistep-dampening": plain(
        dampening=0.3,
        weight_decay=0.01,
        schedule=Schedule("multistep", milestones=(3, 5, 7), gamma=0.5),
    ),
    "exponential": plain(schedule=Schedule("exponential", gamma=0.9)),
    "cosine": plain(schedule=Schedule("cosine", period=CUT + REST, min_lr=0.001)),
    "warmup-cosine, cut in the warm-up": plain(schedule=replace(WARM, warmup=CUT + 2, period=5)),
    "warmup-cosine, cut between the two": plain(schedule=replace(WARM, warmup=CUT, period=REST)),
    "warmup-cosine, cut in the cosine": plain(
        clip_norm=0.5, schedule=replace(WARM, warmup=2, period=10)
    ),
    "plateau": plain(
        schedule=Schedule(
            "plateau", window=2, patience=0, gamma=0.5, threshold=1e-3, cooldown=1, min_lr=0.001
        )
    ),
}
# measured over the journeys: 5.6e-16; the smallest of what is forgotten below: 2.6e-02
JOURNEY_BOUND, JOURNEY_FAULT = 1e-12, 1e-9


def largest_gap(first: Snapshot, second: Snapshot) -> float:
    assert first.step == second.step
    gaps = []
    for field in ("parameters", "optimizer_tensors", "schedule"):
        one, other = getattr(first, field), getattr(second, field)
        assert one.keys() == other.keys()
        gaps += [np.abs(np.subtract(one[name], other[name])).max() for name in one]
    return float(np.nanmax(gaps))


@pytest.mark.parametrize("kind", sorted(SCHEDULES.keys() - {"plateau"}))
def test_a_schedule_that_is_restored_before_any_step_goes_on_bit_for_bit(kind: str) -> None:
    """As the compiled loop of PyTorch takes it, of which `optimizer.step` is no part; a warning
    would be an error."""
    schedule = Schedule(kind, warmup=4) if kind == "warmup-cosine" else Schedule(kind)
    config = plain(schedule=schedule.resolve(CUT + REST))

    def scheduler() -> torch_side.Scheduler:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
        made = torch_side.Scheduler(config, optimizer)
        optimizer.step()
        return made

    straight = scheduler().advance(CUT + REST)
    for step in range(1, CUT + REST):
        before = scheduler()
        before.advance(step)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
        after = torch_side.Scheduler(config, optimizer)
        torch_side.restore_schedule(after, torch_side.export_schedule(before), step)
        assert after.advance(CUT + REST - step).tolist() == straight[step:].tolist()
        if (
            kind == "warmup-cosine" and step > 4
        ):  # control: the two schedulers in it are not put forward
            forgotten = torch_side.Scheduler(config, optimizer)
            forgotten.schedule.last_epoch = step
            forgotten.optimizer.param_groups[0]["lr"] = straight[step]
            optimizer.step()
            assert (
                step == CUT + REST - 1
                or forgotten.advance(CUT + REST - step).tolist() != straight[step:].tolist()
            )


@pytest.mark.parametrize("dampening", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_a_restored_state_is_one_of_its_optimizer(momentum: float, dampening: float) -> None:
    config = replace(plain(), momentum=momentum, dampening=dampening)
    parameters = {name: jnp.ones(size) for name, size in SIZES.items()}
    fresh = flax_side.make_optimizer(config, np.dtype(np.float64)).init(parameters)
    restored = flax_side.restore_schedule(config, fresh, {"lr": config.lr}, 7)
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    counts = {int(leaf) for leaf in jax.tree.leaves(restored) if leaf.dtype == jnp.int32}
    assert counts == {7}
    # a buffer is part of a snapshot from the first step on, if there is one
    exported = [flax_side.export_slots(config, restored, step) for step in (0, 1)]
    names = [{slot: set(tensors) for slot, tensors in slots.items()} for slots in exported]
    assert names == [{}, {"momentum": set(SIZES)} if momentum else {}]


@pytest.mark.parametrize(("lr", "scale"), [(0.5, 0.2), (2.0, 0.05)])
def test_a_plateau_stops_at_its_smallest_learning_rate(lr: float, scale: float) -> None:
    schedule = Schedule("plateau", window=1, patience=0, gamma=0.1, min_lr=0.1)
    config = replace(plain(), lr=lr, schedule=schedule.resolve(STEPS))
    plateau = flax_side.reduce_on_plateau(config)
    state: Any = plateau.init({"w": jnp.ones(1)})
    for _ in range(30):
        _, state = plateau.update({"w": jnp.ones(1)}, state, {"w": jnp.ones(1)}, value=1.0)
    assert float(state.scale) == pytest.approx(scale)


@pytest.mark.parametrize(
    "journey", slow_except(JOURNEYS, "plain", "multistep-dampening", "plateau")
)
def test_a_snapshot_goes_on_in_the_other_backend(journey: str, build: Callable) -> None:
    config = JOURNEYS[journey]
    generator = np.random.default_rng(0)
    images = generator.standard_normal((CUT + REST, BATCH, 32, 32, 3))
    labels = generator.integers(0, 10, (CUT + REST, BATCH))

    def train(backend: Any, snapshot: Snapshot, steps: range) -> Snapshot:
        state = backend.init(snapshot)
        for step in steps:
            state, _ = backend.train_step(state, images[step], labels[step])
        return backend.export(state)

    backends = {name: build(name, config) for name in ("torch", "flax")}
    start = Snapshot.start(initial_weights(backends["torch"].shapes(), 0, "float64"))
    halfway = {name: train(backend, start, range(CUT)) for name, backend in backends.items()}
    through = {
        name: train(backends[name], halfway[name], range(CUT, CUT + REST)) for name in backends
    }
    straight = {
        name: train(backend, start, range(CUT + REST)) for name, backend in backends.items()
    }
    assert (through["torch"].schedule["lr"] < config.lr) == (config.schedule.kind != "constant")
    for name, other in (("torch", "flax"), ("flax", "torch")):
        crossed = train(backends[other], halfway[name], range(CUT, CUT + REST))
        assert largest_gap(straight[name], crossed) <= JOURNEY_BOUND
        assert largest_gap(straight[name], through[name]) <= JOURNEY_BOUND
        # controls: a snapshot that lost something
        forgotten = [halfway[name]._replace(parameters=start.parameters)]
        if config.momentum:
            forgotten.append(halfway[name]._replace(slots={}))
        if config.schedule.kind == "plateau":
            forgotten.append(halfway[name]._replace(schedule=halfway[name].schedule | {"count": 0}))
            forgotten.append(
                halfway[name]._replace(schedule=halfway[name].schedule | {"cooldown": 5})
            )
        elif config.schedule.kind != "constant":
            forgotten.append(halfway[name]._replace(schedule={"lr": config.lr}, step=CUT - 1))
        for snapshot in forgotten:
            arrived = train(backends["torch"], snapshot, range(CUT, CUT + REST))._replace(
                step=CUT + REST
            )
            assert largest_gap(straight[name], arrived) > JOURNEY_FAULT
