"""Names files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lockstep.common.errors import ConfigError
from lockstep.common.recorder.matching import match
from lockstep.common.recorder.names import lines, read_names
from tests.recorder.recordings import recording

DRAW = np.random.default_rng(0).normal
A = recording(
    {f"net.{i}.weight": DRAW(size=(4, 4)) for i in (0, 2, 4)}
    | {f"net.{i}.bias": np.zeros(4) for i in (0, 2, 4)}
    | {"qkv.weight": DRAW(size=(9, 3))}
)
B = recording(
    {f"Dense_{i}.kernel": DRAW(size=(4, 4)) for i in range(3)}
    | {f"Dense_{i}.bias": np.zeros(4) for i in range(3)}
    | {f"{name}.kernel": DRAW(size=(3, 3)) for name in ("one", "two", "three")},
    "jax",
)


def written(folder: Path, text: str) -> Path:
    path = folder / "names.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_line_names_two_tensors_or_two_modules(tmp_path: Path):
    path = written(tmp_path, "# theirs\nnet.0.weight Dense_2.kernel  # the last\n\nnet.4 Dense_0\n")
    assert read_names(path, A, B) == {
        "net.0.weight": "Dense_2.kernel",
        "net.4.weight": "Dense_0.kernel",
        "net.4.bias": "Dense_0.bias",
    }


def test_stars_count_numbers_by_their_order(tmp_path: Path):
    names = read_names(written(tmp_path, "net.*.weight Dense_*.kernel"), A, B)
    assert names == {f"net.{2 * i}.weight": f"Dense_{i}.kernel" for i in range(3)}


def test_the_file_decides_against_names_and_order(tmp_path: Path):
    names = read_names(written(tmp_path, "net.0 Dense_2\nnet.4 Dense_0\n"), A, B)
    found = {m.a: (m.b, m.how) for m in match(A, B, names).matches}
    assert found["net.0.weight"] == ("Dense_2.kernel", "names file")
    assert found["net.4.bias"] == ("Dense_0.bias", "names file")
    assert found["net.2.weight"] == ("Dense_1.kernel", "name")
    control = {m.a: m.b for m in match(A, B).matches}
    assert control["net.0.weight"] == "Dense_0.kernel"


@pytest.mark.parametrize("packed_first", [True, False])
def test_a_line_for_each_part_divides_a_packed_tensor(tmp_path: Path, packed_first: bool):
    parts = ("two", "one", "three")
    text = "\n".join(
        f"qkv.weight {part}.kernel" if packed_first else f"{part}.kernel qkv.weight"
        for part in parts
    )
    a, b = (A, B) if packed_first else (B, A)
    found = match(a, b, read_names(written(tmp_path, text), a, b))
    rows = np.arange(27.0).reshape(9, 3)
    for i, part in enumerate(parts):
        m = next(m for m in found.matches if f"{part}.kernel" in (m.a, m.b))
        assert m.how == "names file"
        taken = m.of_a(rows) if packed_first else m.of_b(rows)
        np.testing.assert_array_equal(taken, rows[3 * i : 3 * i + 3].T)


WRONG = {
    "an unknown name of A": ("net.1.weight Dense_0.kernel", "line 1: .*did you mean net"),
    "an unknown name of B": (
        "\nnet.0.weight Dense_0.kernle",
        "line 2: .*did you mean Dense_0.kernel",
    ),
    "one word": ("net.0.weight", "line 1: write two names"),
    "three words": ("net.0.weight Dense_0.kernel x", "line 1: write two names"),
    "a star on one side": ("net.*.weight Dense_0.kernel", "as many stars"),
    "a number that is not there": ("net.*.weight Dense_*.kernel\nnet.0.* Dense_0.*", "has no net"),
    "no role in common": ("net.0.weight Dense_0.bias\nqkv Dense_0.bias", "no tensors of one role"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_line_is_refused_with_its_number(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        read_names(written(tmp_path, text), A, B)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_names(path, A, B)


def test_tensors_of_other_sizes_are_refused():
    with pytest.raises(ConfigError, match="sizes"):
        match(A, B, {"net.0.weight": "one.kernel"})
    with pytest.raises(ConfigError, match="no permutation"):
        match(
            recording({"x.weight": DRAW(size=(4, 6))}),
            recording({"y.kernel": DRAW(size=(8, 3))}),
            {"x.weight": "y.kernel"},
        )


def test_an_unknown_name_is_refused_without_a_file_too():
    with pytest.raises(ConfigError, match=r"names: torch\.py has no x"):
        match(A, B, {"x": "Dense_0.kernel"})


def test_proposals_become_lines_with_stars():
    proposals = {f"net.{i}.weight": f"layers.{i}.kernel" for i in range(3)} | {"a": "b"}
    assert lines(proposals) == ["net.*.weight layers.*.kernel", "a b"]
