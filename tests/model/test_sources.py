"""Which lines of a network's source are about a layer."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lockstep.backends import load
from lockstep.common.config import BACKENDS, Config
from lockstep.common.model.sources import excerpt


class Base:
    def __init__(self) -> None:
        self.stem = 1
        self.head = self.stem + 1


class Net(Base):
    def __call__(self) -> int:
        return self.head


def test_the_lines_that_mention_a_layer_are_found_in_the_class_and_its_bases() -> None:
    found = excerpt([nn.Linear, Net], "head.weight")
    assert found is not None and found.file == "test_sources.py"
    assert [text for _, text in found.lines] == ["self.head = self.stem + 1", "return self.head"]
    numbers = [number for number, _ in found.lines]
    lines = Path(__file__).read_text("utf-8").splitlines()
    assert [lines[number - 1].strip() for number in numbers] == [text for _, text in found.lines]


def test_of_a_layer_in_a_list_the_lines_of_the_list_are_found() -> None:
    found = excerpt([Net], "stem.0.weight")
    assert found is not None and len(found.lines) == 2


def test_nothing_is_found_of_what_is_not_there_or_not_the_users() -> None:
    assert excerpt([Net], "tail.weight") is None
    assert excerpt([nn.Linear, nn.Sequential], "weight") is None
    made = type("Made", (), {"__module__": __name__})  # without a source
    assert excerpt([made], "head.weight") is None


def test_both_backends_name_the_file_of_their_network() -> None:
    for name in BACKENDS:
        backend = load(name)(Config(model="net"), 10)
        found = excerpt(backend.module_classes(), backend.native_names()["conv1.kernel"])
        assert found is not None and found.file == f"backends/{name}_backend/models/net.py"
        assert any("conv1" in line for _, line in found.lines)
