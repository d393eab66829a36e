"""Pairs of training scripts as users write them: each agrees, and each planted fault is found where
it is."""

from __future__ import annotations

import importlib.util
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

import lockstep
from lockstep.common.report.scripts import ScriptResult

FOLDER = Path(__file__).resolve().parent.parent / "scripts"
AT_MOST = 1e-12  # between float64 losses; measured: 1.8e-15, and 5e-14 where the loss is near 50
STEPS = 60
STEPS_OF_FAULTS = 3  # each of them shows in the first two
LIBRARIES = ("linen", "nnx", "equinox", "haiku")
CALLS = ("lockstep.", "run.", "import lockstep", "lockstep)")


def load_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planted_faults", FOLDER / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


TABLE = load_table()
GPTS = [("gpt_torch.py", f"gpt_{library}.py") for library in LIBRARIES]
CLEAN = [*GPTS, *TABLE.PAIRS.values()]
FAULTS = {
    f"gpt {name}": ("gpt_torch.py", "gpt_linen_faults.py", name, fault)
    for name, fault in TABLE.GPT_FAULTS.items()
} | {
    f"{pair} {name}": (*TABLE.PAIRS[pair], name, fault)
    for (pair, name), fault in TABLE.PAIR_FAULTS.items()
}


def check(out: Path, a: str, b: str, *arguments: str, **options: object) -> ScriptResult:
    return lockstep.check(FOLDER / a, FOLDER / b, arguments=arguments, out=out, **options)  # pyright: ignore[reportArgumentType]


# --- Scripts that are the same run


@pytest.mark.slow
@pytest.mark.parametrize(("a", "b"), CLEAN, ids=lambda name: name.removesuffix(".py"))
def test_a_pair_agrees_in_float64_and_in_its_own_precision(a: str, b: str, tmp_path: Path) -> None:
    result = check(tmp_path, a, b, steps=STEPS)
    assert result, repr(result)
    assert [each["dtype"] for each in result.report["precisions"]] == ["float64", "float32"]
    gap = result.report["precisions"][0]["max_abs_loss_gap"]
    assert gap is not None
    assert gap < AT_MOST
    assert result.report["unmatched"] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--dropout", "0.1"), ("--accumulate", "2")], ids=" ".join)
def test_what_the_faults_are_planted_in_agrees_without_one(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    found = check(
        tmp_path, "gpt_torch.py", "gpt_linen_faults.py", *arguments, steps=10, precision="float64"
    )
    assert found, repr(found)


@pytest.mark.slow
def test_the_two_programs_of_the_lesson_agree_over_500_steps(tmp_path: Path) -> None:
    sides = "lesson_torch.py", "lesson_flax.py"
    found = check(tmp_path / "agree", *sides, precision="float64")
    assert found, repr(found)
    assert found.report["precisions"][0]["steps"] == 500
    # the control: momentum 0.89 first acts in the second step
    wrong = check(tmp_path / "disagree", *sides, "--fault", steps=3, precision="float64")
    place = wrong.report["precisions"][0]["first_divergence"]
    assert place is not None
    assert (place["stage"], place["step"]) == ("update", 1)


@pytest.mark.parametrize("name", sorted({name for pair in CLEAN for name in pair}))
def test_a_script_takes_at_most_eight_lines_of_lockstep(name: str) -> None:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    assert 5 <= sum(any(call in line for call in CALLS) for line in lines) <= 8


# --- Planted faults


def test_twenty_faults_are_planted_in_one_pair() -> None:
    assert len(TABLE.GPT_FAULTS) == 20
    assert {pair for pair, _ in TABLE.PAIR_FAULTS} == set(TABLE.PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_where_it_is(name: str, tmp_path: Path) -> None:
    a, b, option, fault = FAULTS[name]
    arguments = (*fault.arguments, "--fault", option)
    result = check(tmp_path, a, b, *arguments, steps=STEPS_OF_FAULTS, precision="float64")
    assert result.verdict == "disagree"
    place = result.report["precisions"][0]["first_divergence"]
    assert place is not None
    stage, _, step = fault.stage.partition(" ")
    assert (place["stage"], place["step"]) == (stage, int(step or 0)), place["message"]
    named = (place["tensor"], place["layer"], *place["names"])
    assert any(fnmatch(str(n), t) for n in named for t in fault.tensors), place["message"]
