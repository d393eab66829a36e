"""A script in several processes: rank 0 records, the digests of the others are compared with its
own, and a rank that fails ends the run."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lockstep
from lockstep import cli
from lockstep.common.errors import LockstepError, ScriptError
from lockstep.common.protocol import Arrays
from lockstep.common.recorder import launch, ranks, recording, script
from lockstep.common.recorder.recording import Recording
from lockstep.common.recorder.settings import Settings
from lockstep.common.report.scripts import ScriptResult
from lockstep.common.verdict.script_comparison import ScriptComparison
from lockstep.common.verdict.scripts import ScriptRuns, compare_scripts
from tests.recorder import made

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests" / "scripts"
TORCH, JAX = str(SCRIPTS / "ddp_torch.py"), str(SCRIPTS / "ddp_jax.py")
BUFFER = "net.norm.running_mean"
GROUPS = ("weights", "first_steps", "parameter_history", "final")

# --- What the digests say


def two_ranks(tmp_path: Path, group: str = "", name: str = "", **changes: Any) -> Recording:
    """A run whose rank 1 had these: another array in one place, or other fields."""
    of_rank0 = made.recording()
    weights = of_rank0.weights | {BUFFER: np.ones(3)}
    of_rank0 = replace(of_rank0, processes=2, weights=weights)
    of_rank1 = replace(of_rank0, **changes)
    out = str(tmp_path / "float64.safetensors")
    for rank, run in enumerate((of_rank0, of_rank1)):
        digests = ranks.Digests()
        for each in (*GROUPS, "series", "batch_digests", "results"):
            arrays: Arrays = dict(getattr(run, each))
            if rank and each == group:
                arrays[name] = np.nextafter(arrays[name], np.inf)
            digests.add(each, arrays)
        digests.write(ranks.path_of(out, rank), run.steps)
    return ranks.compared(of_rank0, out)


def test_equal_ranks_have_no_differences(tmp_path: Path) -> None:
    found = two_ranks(tmp_path)
    assert (found.rank_differences, found.local) == ([], [])


WEIGHT = "net.fc1.weight"
PLACES = {
    "at the start": ("weights", WEIGHT, 0, WEIGHT),
    "in a first step": ("first_steps", f"1/update/{WEIGHT}", 2, WEIGHT),
    "in what the optimizer keeps": (
        "first_steps",
        f"0/update/first moment of {WEIGHT}",
        1,
        f"first moment of {WEIGHT}",
    ),
    "later": ("parameter_history", f"10/{WEIGHT}", 10, WEIGHT),
    "at the end": ("final", WEIGHT, made.STEPS, WEIGHT),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_differs_in_the_last_bit_is_named_with_step_and_tensor(
    place: str, tmp_path: Path
) -> None:
    group, name, step, tensor = PLACES[place]
    [found] = two_ranks(tmp_path, group, name).rank_differences or []
    assert (found["rank"], found["step"], found["tensor"]) == (1, step, tensor)
    assert found["gap"] is None or 0 < found["gap"] < 1e-12


def test_buffers_may_differ_as_running_statistics_do(tmp_path: Path) -> None:
    assert two_ranks(tmp_path, "weights", BUFFER).rank_differences == []


def test_what_a_rank_has_of_its_own_is_listed_and_is_no_difference(tmp_path: Path) -> None:
    run = made.recording()
    found = two_ranks(
        tmp_path,
        batch_digests={n: d + 1 for n, d in run.batch_digests.items()},
        series=run.series | {"loss": run.series["loss"] + 1},
        first_steps={
            key: array + 1 if "/backward/" in key or "/forward/" in key else array
            for key, array in run.first_steps.items()
        },
    )
    assert found.rank_differences == []
    assert {"data/batch[0]", "losses/loss", "forward/output", f"backward/{WEIGHT}"} <= {
        *found.local
    }
    assert "losses/lr" not in found.local


def test_a_zero_of_either_sign_is_the_same(tmp_path: Path) -> None:
    digests = [ranks.Digests(), ranks.Digests()]
    for each, value in zip(digests, (0.0, -0.0), strict=True):
        each.add("weights", {"w": np.array([value])})
        each.write(tmp_path / str(value), 1)
    assert (tmp_path / "0.0").read_text() == (tmp_path / "-0.0").read_text()


def test_a_rank_that_took_other_steps_or_recorded_nothing_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match=r"rank 1 took 3 steps and rank 0 24"):
        two_ranks(tmp_path, series={"loss": np.zeros(3)})
    ranks.path_of(str(tmp_path / "float64.safetensors"), 1).unlink()
    with pytest.raises(ScriptError, match=r"rank 1 of 2 recorded nothing: call lockstep\.Run"):
        ranks.compared(
            replace(made.recording(), processes=2), str(tmp_path / "float64.safetensors")
        )


# --- Verdicts


def compare(a: dict[str, Any], b: dict[str, Any], fault: str = "") -> ScriptComparison:
    sides = made.recording("torch"), made.recording("jax", fault=fault)
    ours, theirs = (replace(run, **fields) for run, fields in zip(sides, (a, b), strict=True))
    return compare_scripts(ScriptRuns(ours), ScriptRuns(theirs), made.matching())


EQUAL = {"processes": 2, "rank_differences": []}
ROWS = {"local": ["data/batch[0]", "data/batch[1]", "losses/loss"]}


def test_ranks_that_differ_disagree_and_come_first_in_their_step() -> None:
    differs = [{"step": 1, "rank": 1, "tensor": "w", "gap": 0.5}]
    found = compare({"processes": 2, "rank_differences": differs}, EQUAL, fault="frozen layer")
    assert found.verdict == "disagree" and found.place is not None
    assert found.place.message == "update: step 0: w, rank 1 of train_torch.py: gap 5.0e-01 > 0"
    assert "gradients are not reduced" in found.place.causes[0]


def test_ranks_that_differ_in_no_mean_are_said_to_differ_in_a_bit() -> None:
    differs = [{"step": 0, "rank": 1, "tensor": "w", "gap": None}]
    found = compare({"processes": 2, "rank_differences": differs}, EQUAL)
    assert found.place is not None
    assert found.place.message.endswith("not equal to rank 0's to the bit")
    assert "not broadcast" in found.place.causes[0]


def test_rows_and_losses_of_one_rank_are_left_out_against_one_process() -> None:
    found = compare({**EQUAL, **ROWS}, {}, fault="batches in another order")
    assert "loss" not in {check.tensor for check in found.checks}
    [note] = [note for note in found.notes if note.startswith("not compared")]
    assert "each rank of train_torch.py has its own: batch[0], batch[1], loss" in note
    # the control: what the batches made of the parameters is compared all the same
    assert found.verdict == "disagree" and found.place is not None
    assert found.place.check.stage == "update"
    assert compare({**EQUAL, **ROWS}, {})


def test_rows_of_rank_0_are_compared_between_runs_of_as_many_processes() -> None:
    both = {**EQUAL, **ROWS}
    assert compare(both, both)
    found = compare(both, both, fault="batches in another order")
    assert found.place is not None and found.place.check.stage == "data"


def test_gradients_that_no_call_averaged_before_they_were_recorded_are_left_out() -> None:
    own = {**EQUAL, "local": [f"backward/{WEIGHT}"]}
    found = compare(own, {}, fault="frozen layer")
    assert "backward" not in {check.stage for check in found.checks}
    assert found.place is not None and found.place.check.stage == "update"


# --- Processes

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(source: str) -> str:
        (tmp_path / "train.py").write_text(textwrap.dedent(source))
        return str(tmp_path / "train.py")

    return write


def run(text: str, tmp_path: Path, **options: Any) -> Recording:
    settings = Settings(
        str(tmp_path / "out" / "float64.safetensors"), "train.py", "float64", processes=2
    )
    return launch.run_script(script.find(text), [], settings, **options)


TRAIN = """
import os
import jax.numpy as jnp
import lockstep

rank = int(os.environ["RANK"])
run = lockstep.Run()
params = run.begin({"w": jnp.ones(3)})
for step in range(4):
    own = run.batch(jnp.arange(3.0) + step + rank)
    grads = {"w": jnp.arange(3.0) + step}
    params = {"w": params["w"] - 0.1 * grads["w"] - FAULT}
    run.step((params["w"] * own).sum(), params=params, grads=grads)
print(*(os.environ.get(name) for name in
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID")))
"""


def test_rank_0_records_and_the_others_are_compared_with_it(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of another launcher")
    path = write(TRAIN.replace("FAULT", "0"))
    found = run(path, tmp_path)
    assert (found.processes, found.rank_differences) == (2, [])
    assert found.local == ["data/batch[0]", "losses/loss"]
    assert recording.read(tmp_path / "out" / "float64.safetensors").local == found.local
    left = sorted(each.name for each in (tmp_path / "out").iterdir())
    assert left == ["float64.log", "float64.rank1.log", "float64.safetensors"]
    for rank, name in enumerate(left[:2]):
        assert (tmp_path / "out" / name).read_text() == f"{rank} {rank} 2 2 127.0.0.1 None\n"


@pytest.mark.slow
def test_record_names_the_step_at_which_a_rank_goes_its_own_way(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(TRAIN.replace("FAULT", "1e-12 * rank * (step > 0)"))
    assert cli.main(["record", path, "--processes", "2", "--out", str(tmp_path / "out")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "The ranks differ: float64: update: step 1: w, rank 1 of train.py" in said


ENDS = {  # what rank 1 does while rank 0 waits, and what the line says
    "is killed": ("os.kill(os.getpid(), 9)", "rank 1 of 2 of its float64 run was ended by SIGKILL"),
    "raises": ("1 / 0", "failed in rank 1 of 2 of its float64 run (exit status 1)"),
    "exits": ("os._exit(0)", "ended rank 1 of 2 of its float64 run by os._exit"),
    "is refused": (
        "import lockstep; lockstep.Run().step(1.0)",
        "run.step was called before run.begin",
    ),
    "is stopped": (
        "os.kill(os.getpid(), 19)",
        "rank 1 of 2 of its float64 run has shown no sign of life for 1 s",
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_rank_that_fails_ends_the_run_and_all_of_its_processes(
    how: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SILENCE", 1)
    action, words = ENDS[how]
    path = write(f"""
        import os, time
        open(os.path.join({str(tmp_path)!r}, "pid" + os.environ["RANK"]), "w").write(str(os.getpid()))
        while len([name for name in os.listdir({str(tmp_path)!r}) if name.startswith("pid")]) < 2:
            time.sleep(0.01)
        if os.environ["RANK"] == "1":
            {action}
        time.sleep(100)
    """)
    with pytest.raises(ScriptError) as caught:
        run(path, tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


def test_of_two_ranks_that_fail_the_one_that_was_killed_is_named(
    write: Write, tmp_path: Path
) -> None:
    path = write("""
        import os, time
        if os.environ["RANK"] == "0":
            raise ConnectionError("closed by peer")
        time.sleep(0.3)
        os.kill(os.getpid(), 9)
    """)
    with pytest.raises(ScriptError, match=r"rank 1 of 2 of its float64 run was ended by SIGKILL"):
        run(path, tmp_path)


# --- Under torchrun

LAUNCHED = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
REFUSED = {
    "several machines": ({"LOCAL_WORLD_SIZE": "1"}, [], "runs scripts on one machine"),
    "another number": ({}, ["--processes", "3"], "torchrun started 2 processes"),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    def launched(changes: dict[str, str]) -> None:
        for name, value in (LAUNCHED | changes).items():
            monkeypatch.setenv(name, value)

    yield launched


def test_under_torchrun_the_command_of_rank_0_alone_does_something(
    launched: Callable[[dict[str, str]], None], write: Write, tmp_path: Path
) -> None:
    launched({})
    assert cli.main(["record", write("1 / 0"), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_torchrun_on_several_machines_or_in_another_number_is_refused(
    name: str,
    launched: Callable[[dict[str, str]], None],
    write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variables, options, words = REFUSED[name]
    launched(variables)
    assert cli.main(["record", write("pass"), *options]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


# --- Two scripts that train a network in two processes


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a recording in float64, made once."""
    folder = tmp_path_factory.mktemp("recorded")
    made_so_far: dict[tuple[object, ...], Path] = {}

    def recorded(path: str, processes: int, *arguments: str) -> Path:
        key = (path, processes, *arguments)
        if key not in made_so_far:
            made_so_far[key] = folder / str(len(made_so_far))
            lockstep.record(path, made_so_far[key], processes=processes, arguments=arguments)
        return made_so_far[key]

    return recorded


PAIRS = {
    "two processes in PyTorch and in JAX": ((TORCH, 2), (JAX, 2, "--global-batch"), []),
    "one process and two": ((TORCH, 1), (TORCH, 2), ["batch[0]"]),
    "losses of one rank": ((TORCH, 1), (TORCH, 2, "--own-loss"), ["batch[0]", "loss"]),
    "gradients averaged by calls": (
        (TORCH, 2, "--by-hand"),
        (JAX, 2, "--global-batch", "--clip", "100"),
        [],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_runs_by_several_processes_agree(
    name: str, recorded: Callable[..., Path], tmp_path: Path
) -> None:
    a, b, left_out = PAIRS[name]
    found = lockstep.diff(recorded(*a), recorded(*b), out=tmp_path)
    assert isinstance(found, ScriptResult)
    assert found, repr(found)
    [precision] = found.report["precisions"]
    assert any(row.get("stage") == "backward" for row in precision["ladder"])
    gap = precision["max_abs_loss_gap"]
    assert gap is None if "loss" in left_out else gap is not None and gap < 1e-14
    said = [note for note in precision["notes"] if note.startswith("not compared")]
    assert [word in said[0] for word in left_out] == [True] * len(left_out)


@pytest.mark.slow
def test_a_script_whose_ranks_do_not_synchronise_is_found(
    recorded: Callable[..., Path], tmp_path: Path
) -> None:
    wrong = recorded(TORCH, 2, "--no-sync")
    found = lockstep.diff(wrong, recorded(JAX, 2, "--global-batch"), out=tmp_path)
    assert isinstance(found, ScriptResult)
    assert not found and found.place is not None
    assert found.place.startswith("update: step 0: momentum of 0.weight, rank 1 of ddp_torch.py")


SHARDED = ("params=params, grads=grads", "params=params, grads=spread(own[0], rows)")


@pytest.mark.slow
def test_a_gradient_that_is_split_over_processes_is_refused_in_one_line(tmp_path: Path) -> None:
    source = Path(JAX).read_text()
    assert SHARDED[0] in source
    (tmp_path / "ddp_jax.py").write_text(source.replace(*SHARDED))
    with pytest.raises(LockstepError) as caught:
        lockstep.record(tmp_path / "ddp_jax.py", tmp_path / "out", processes=2)
    assert "is split over processes" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_torchrun_alone_records_nothing_and_around_record_it_records(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environ = os.environ | {"PYTHONPATH": str(ROOT / ".package")}
    alone = subprocess.run(
        [*torchrun, TORCH, "--steps", "3"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0 and alone.stdout.count("final loss") == 2, alone.stderr
    assert not list(tmp_path.iterdir())
    command = [str(ROOT / "compare.py"), "record", TORCH, "--out", "out", "--", "--steps", "3"]
    around = subprocess.run(
        [*torchrun, *command], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert around.returncode == 0, around.stderr
    assert around.stdout.count("Recorded: out") == 1
    assert recording.read(tmp_path / "out" / "float64.safetensors").processes == 2
