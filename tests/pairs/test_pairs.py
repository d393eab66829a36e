"""Two of the pairs here, as a user checks and trains them; `python -m tests.pairs` measures all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep import cli as compare
from lockstep.common.model import pair

FOLDER = Path(__file__).resolve().parent
TRAIN = ("--optimizer", "adamw", "--lr", "0.001", "--batch-size", "16", "--dtype", "float64")


@pytest.mark.slow
def test_a_pair_of_two_outputs_is_trained_within_the_bound(tmp_path: Path) -> None:
    arguments = ["--model", f"{FOLDER}/two_outputs.py:PAIR", *TRAIN, "--steps", "50"]
    assert compare.main([*arguments, "--out", str(tmp_path), "--quiet"]) == 0
    [lens] = json.loads((tmp_path / "report.json").read_text())["lenses"]
    assert lens["verdict"] == "agree" and lens["max_abs_loss_gap"] < 1e-12  # measured 4.4e-16


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True], ids=["as it is", "another epsilon"])
def test_a_gpt_of_linen_is_followed_layer_by_layer_and_a_wrong_one_is_named(
    wrong: bool, tmp_path: Path
) -> None:
    text = (FOLDER / "gpt.py").read_text()
    last = "use_bias=False)(linen.LayerNorm(epsilon=1e-5)(x))"
    assert last in text
    path = tmp_path / "gpt.py"
    path.write_text(text.replace(last, last.replace("1e-5", "1e-6")) if wrong else text)
    pair._load_users.cache_clear()
    status = compare.main(["pair", f"{path}:LINEN", "--out", str(tmp_path), "--quiet"])
    found = json.loads((tmp_path / "report.json").read_text())["first_difference"]
    assert status == int(wrong)
    assert found is None if not wrong else found["tensor"] == "LayerNorm_0"
