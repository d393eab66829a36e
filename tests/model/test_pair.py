"""A network of the user's own, in both frameworks: what is found by itself, what is said, and what
is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep import cli as compare
from lockstep.common.config import Config
from lockstep.common.data import of_pair, sources
from lockstep.common.errors import ConfigError, RecordError
from lockstep.common.evidence.pair_check import flatten_shape
from lockstep.common.model import checks, names, pair
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.runs import record
from lockstep.common.testing import same_run
from tests.marks import slow_except

README = Path(__file__).resolve().parents[2] / "backends" / "README.md"

SMALL = """
from functools import partial
import jax.numpy as jnp
import torch
from flax import nnx
from lockstep.common.model.pair import Pair


class Torch(torch.nn.Module):
    def __init__(self, classes, rate=0.0, keeps="", extra=False, width=8, outputs=None, fails=False, norm=1e-5):
        super().__init__()
        self.fc = torch.nn.Linear(3072, width)
        self.norm = torch.nn.LayerNorm(width, eps=norm)
        self.drop = torch.nn.Dropout(rate)
        self.out = torch.nn.Linear(width, outputs or classes)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(()))
        self.keeps, self.fails = keeps, fails
        if extra:
            self.more = torch.nn.Linear(2, 2)

    def forward(self, x):
        if self.fails:
            raise RuntimeError("no such image")
        if self.keeps == "state":
            self.seen.add_(1.0)
        if self.keeps == "weights":
            self.fc.weight.data.mul_(0.9)
        return self.out(self.drop(torch.relu(self.norm(self.fc(x.flatten(1)))))) * self.scale


class Flax(nnx.Module):
    def __init__(self, classes, rngs, rate=0.0, keeps="", extra=False, width=8, outputs=None, fails=False, norm=1e-5):
        self.fc = nnx.Linear(3072, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=norm, use_fast_variance=False, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(width, outputs or classes, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(1))
        self.seen = nnx.Variable(jnp.zeros(()))
        self.keeps, self.fails = keeps, fails
        if extra:
            self.more = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        if self.fails:
            raise RuntimeError("no such image")
        if self.keeps == "state":
            self.seen[...] = self.seen[...] + 1
        if self.keeps == "weights":
            self.fc.kernel[...] = self.fc.kernel[...] * 0.9
        return self.out(self.drop(nnx.relu(self.norm(self.fc(x.reshape(len(x), -1)))))) * self.scale[...]


class Whole(Torch):
    def forward(self, x):
        return super().forward(x).round().long()


class WholePort(Flax):
    def __call__(self, x):
        return super().__call__(x).astype(jnp.int32)


def pair(torch={}, flax={}, flattened={"fc": (3, 32, 32)}, **declared):
    return Pair(partial(Torch, **torch), partial(Flax, **flax), flattened=flattened, **declared)


PAIR = pair()
NO_PAIR = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return path


def written(folder: Path, expression: str) -> str:
    """The name of a pair that `expression` makes in a file of its own."""
    path = folder / "made.py"
    path.write_text(SMALL + f"\nMADE = {expression}\n")
    pair._load_users.cache_clear()  # what a file holds is read once in a process
    return f"{path}:MADE"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refusal."""
    assert compare.main([*arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


# --- Which tensor is which


def names_of(*own: str, declared: dict[str, str] | None = None) -> dict[str, str]:
    return names.canonical_names(
        {name: name.rpartition(".")[2] for name in own}, declared or {}, "Flax"
    )


def test_a_lists_positions_count_what_has_tensors_and_sequentials_own_list_is_left_out() -> None:
    torch = names_of(
        "body.0.bias", "body.3.bias", "body.3.kernel", "body.10.bias", "head.bias", "scale"
    )
    flax = names_of(
        "body.layers.1.bias", "body.layers.2.bias", "body.layers.2.kernel", "body.layers.9.bias"
    )
    assert list(torch.values()) == [
        "body.0.bias",
        "body.1.bias",
        "body.1.kernel",
        "body.2.bias",
        "head.bias",
        "scale",
    ]
    assert list(flax.values()) == ["body.0.bias", "body.1.bias", "body.1.kernel", "body.2.bias"]


def test_what_is_declared_is_called_so_and_what_lies_within_follows() -> None:
    declared = {"body.3": "convs.1", "tail": "end", "token": "start.token"}
    names = names_of(
        "body.0.bias", "body.3.bias", "tail.4.bias", "tail.7.bias", "token", declared=declared
    )
    assert list(names.values()) == [
        "body.0.bias",
        "convs.1.bias",
        "end.0.bias",
        "end.1.bias",
        "start.token",
    ]


def test_a_star_stands_for_the_positions_in_lists_and_a_longer_key_counts_before_a_shorter_one() -> (
    None
):
    own = [f"blocks.{i}.{layer}.bias" for i in (0, 2) for layer in ("a", "b")]
    declared = {"blocks": "layers", "blocks.*.a": "layers.*.first", "blocks.2.b": "last"}
    expected = ["layers.0.first.bias", "layers.0.b.bias", "layers.1.first.bias", "last.bias"]
    assert list(names_of(*own, declared=declared).values()) == expected
    with pytest.raises(
        ConfigError, match=r"^the pair names blocks\.\*\.c, which Flax's module does not have"
    ):
        names_of(*own, declared={"blocks.*.c": "layers.*.c"})


def test_a_network_that_is_one_list_has_the_same_names_on_both_sides() -> None:
    torch, flax = names_of("0.bias", "3.bias"), names_of("layers.0.bias", "layers.2.bias")
    assert [*torch.values()] == [*flax.values()] == ["layers.0.bias", "layers.1.bias"]


def test_two_tensors_of_one_name_and_a_layer_that_is_not_there_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^a.bias and b.bias of Flax's module are both called b.bias: "
    ):
        names_of("a.bias", "b.bias", declared={"a": "b"})
    with pytest.raises(
        ConfigError,
        match=r"^the pair names c, which Flax's module does not have: its layers are a, b$",
    ):
        names_of("a.bias", "b.bias", declared={"c": "b"})
    assert names_of("a.bias", "b.bias", declared={"a": "b", "b": "a"}) == {
        "a.bias": "b.bias",
        "b.bias": "a.bias",
    }


def test_layers_of_equal_roles_and_shapes_are_proposed_in_their_order_and_no_others() -> None:
    torch = {
        "f.0.kernel": (3, 3),
        "f.0.bias": (3,),
        "f.1.kernel": (3, 3),
        "f.1.bias": (3,),
        "g.kernel": (3, 3),
    }
    flax = {
        "a.kernel": (3, 3),
        "a.bias": (3,),
        "b.kernel": (3, 3),
        "b.bias": (3,),
        "c.kernel": (9,),
    }
    own = {"torch": {n: n.replace("f.1", "f.5") for n in torch}, "flax": {n: n for n in flax}}
    assert names.suggest_names(torch, flax, own) == "names={'f.0': 'a', 'f.5': 'b'}"
    with pytest.raises(ConfigError, match=r"add to the pair: names=\{'f.0': 'a', 'f.5': 'b'\}$"):
        checks.check_same(torch, flax, own)


def test_layers_of_one_block_are_proposed_together_and_repeated_blocks_once() -> None:
    torch = {
        f"{block}.{norm}.bias": (4,)
        for block in ("stem", "blocks.0", "blocks.1")
        for norm in ("n1", "n2")
    }
    flax = {
        f"{block}.{norm}.bias": (4,)
        for block in ("start", "layers.0", "layers.1")
        for norm in ("up", "down")
    }
    own = {"torch": {n: n for n in torch}, "flax": {n: n for n in flax}}
    proposed = names.suggest_names(torch, flax, own).removeprefix("names=")
    expected = {"stem.n1": "start.up", "stem.n2": "start.down"}
    assert eval(proposed) == expected | {
        "blocks.*.n1": "layers.*.up",
        "blocks.*.n2": "layers.*.down",
    }


def test_initial_weights_begin_norms_as_the_identity_and_own_parameters_small() -> None:
    shapes = {
        "n.scale": (4,),
        "n.bias": (4,),
        "n.mean": (4,),
        "n.var": (4,),
        "e.embedding": (9, 9),
        "token": (2000,),
    }
    weights = initial_weights(shapes, 0, "float64")
    constant = {"n.scale": 1, "n.bias": 0, "n.mean": 0, "n.var": 1}
    assert all((weights[name] == value).all() for name, value in constant.items())
    assert 0.018 < weights["token"].std() < 0.022 and 0.7 < weights["e.embedding"].std() < 1.3


# --- The example in the README


def example(folder: Path) -> Path:
    block = re.search(
        r"<!-- pair -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert block is not None, "backends/README.md has no pair"
    path = folder / "vgg.py"
    path.write_text(block[1])
    return path


@pytest.mark.slow
def test_the_pair_in_the_readme_is_one_and_without_its_lines_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = example(tmp_path)
    assert compare.main(["pair", f"{path}:PAIR", "--data", "digits"]) == 0
    shown = capsys.readouterr().out
    assert "The two networks compute the same: 25,674 parameters in 14 tensors" in shown
    assert re.search(r"features\.4\.running_var +norms\.1\.var +32 +statistics", shown)
    text = path.read_text()
    lines = re.search(r"    names=(\{.*?\}),\n", text, re.DOTALL)
    assert lines is not None
    path.with_name("unnamed.py").write_text(text.replace(lines[0], ""))
    error = said(capsys, "pair", f"{path.with_name('unnamed.py')}:PAIR", "--data", "digits")
    proposed = re.search(r"add to the pair: names=(\{.*\})$", error.strip())
    assert proposed is not None and eval(proposed[1]) == eval(lines[1])
    path.with_name("unflattened.py").write_text(re.sub(r"    flattened=.*\n", "", text))
    assert (
        compare.main(["pair", f"{path.with_name('unflattened.py')}:PAIR", "--data", "digits"]) == 1
    )
    shown = capsys.readouterr().out
    assert "input of head: the same numbers in another order" in shown
    proposed = re.search(r"add to the pair: flattened=(\{.*?\})", " ".join(shown.split()))
    assert proposed is not None and eval(proposed[1]) == {"classifier": (32, 8, 8)}
    path.with_name("biased.py").write_text(text.replace("BatchNorm(width", "nnx.BatchNorm(width"))
    assert compare.main(["pair", f"{path.with_name('biased.py')}:PAIR", "--data", "digits"]) == 1
    shown = capsys.readouterr().out
    assert (
        "Where they differ first: update: step 0: norms.0.var" in shown
        and "nnx.BatchNorm the biased" in shown
    )


def test_norms_of_a_pair_sum_exactly_unless_they_are_of_another_kind(
    tmp_path: Path, file: Path
) -> None:
    from torch import nn

    from lockstep.backends.torch_backend import layers, user_module

    def norms(path: Path) -> list[type]:
        modules = user_module.build(f"{path}:PAIR", 10, "cpu").modules()
        return [
            type(layer) for layer in modules if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm)
        ]

    path, other = example(tmp_path), tmp_path / "other.py"
    assert norms(path) == [layers.BatchNorm2d] * 2 and norms(file) == [layers.LayerNorm]
    averaging = path.read_text().replace("BatchNorm2d(16", "BatchNorm2d(16, momentum=None")
    path.with_name("averaging.py").write_text(averaging.replace("(32),", "(32, affine=False),"))
    assert norms(path.with_name("averaging.py")) == [nn.BatchNorm2d] * 2
    other.write_text(SMALL.replace("eps=norm", "eps=norm, bias=False"))
    assert norms(other) == [nn.LayerNorm]
    unshifted = nn.BatchNorm2d(16)
    unshifted.register_parameter("bias", None)  # as later versions have it with bias=False
    assert type(user_module.use_exact_sums(unshifted)) is nn.BatchNorm2d


@pytest.mark.slow
def test_a_pair_is_trained_compared_exported_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    path, out = example(tmp_path), tmp_path / "run"
    model = ["--model", f"{path}:PAIR", "--data", "digits", "--dtype", "float64", "--quiet"]
    assert compare.main([*model, "--steps", "8", "--batch-size", "16", "--out", str(out)]) == 0
    finals = [record.read(out / f"{name}-float64.safetensors").final for name in ("torch", "flax")]
    assert finals[0].keys() == finals[1].keys() and "norms.1.var" in finals[0]
    # measured 2.2e-16; nnx.BatchNorm's own running variance: 1e-5
    assert max(np.abs(finals[0][name] - finals[1][name]).max() for name in finals[0]) < 1e-12
    for form, ending in (("torch", ".pt"), ("orbax", "-orbax")):
        assert compare.main(["export", str(out), "--to", form]) == 0
        again = [
            *model,
            "--weights",
            str(out / f"torch-float64{ending}"),
            "--out",
            str(tmp_path / form),
        ]
        assert compare.main([*again, "--steps", "2"]) == 0
    module: Any = {}
    exec(path.read_text(), module)
    original = module["Original"](10).double()
    original.load_state_dict(torch.load(out / "torch-float64.pt", weights_only=True))
    assert np.array_equal(original.features[4].running_var.numpy(), finals[0]["norms.1.var"])
    capsys.readouterr()
    path.write_text(path.read_text() + "\n# changed\n")
    assert "has changed since" in said(capsys, "export", str(out), "--to", "torch")
    assert "has changed since" in said(capsys, "--resume", str(out))


IN_PLACE = """
import torch
from flax import nnx
from lockstep.common.model.pair import Pair

class Torch(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.norm = torch.nn.GroupNorm(1, 3)
        self.relu = torch.nn.ReLU(inplace=True)
        self.fc = torch.nn.Linear(3, classes)

    def forward(self, x):
        y = self.norm(x)
        y += x
        return self.fc(self.relu(y).mean((2, 3)))

class Flax(nnx.Module):
    def __init__(self, classes, rngs):
        self.norm = nnx.GroupNorm(3, num_groups=1, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.fc = nnx.Linear(3, classes, rngs=rngs)

    def __call__(self, x):
        return self.fc(nnx.relu(self.norm(x) + x).mean((1, 2)))

PAIR = Pair(Torch, Flax)
"""


def test_operations_that_write_into_an_activation_are_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "in_place.py"
    path.write_text(IN_PLACE)
    assert compare.main(["pair", f"{path}:PAIR", "--data", "digits", "--quiet"]) == 0
    path.with_name("other.py").write_text(IN_PLACE.replace("epsilon=1e-5", "epsilon=1e-6"))
    assert (
        compare.main(["pair", f"{path.with_name('other.py')}:PAIR", "--data", "digits", "--quiet"])
        == 1
    )


def test_what_was_unrolled_is_read_off_two_inputs_and_off_others_nothing() -> None:
    images = np.random.default_rng(0).standard_normal((4, 6, 4, 10))  # channels first
    torch, flax = images.reshape(4, -1), images.transpose(0, 2, 3, 1).reshape(4, -1)
    assert flatten_shape(torch, flax) == (6, 5, 8)  # of 40 pixels: how they lie makes no difference
    assert np.array_equal(np.moveaxis(torch.reshape(4, 6, 5, 8), 1, -1).reshape(4, -1), flax)
    assert (
        flatten_shape(torch, flax[::-1])
        is flatten_shape(torch, torch)
        is flatten_shape(images, images)
        is None
    )


@pytest.mark.parametrize(
    ("declared", "cause"),
    [
        ({}, "add to the pair: flattened={'fc': (3, 32, 32)}"),
        ({"fc": (32, 32, 3)}, "the pair's flattened says (32, 32, 3) of fc: give the channels"),
    ],
    ids=["missing", "wrong"],
)
def test_a_flatten_that_is_missing_or_wrong_is_named_with_one_remedy(
    declared: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    model = written(tmp_path, f"pair(flattened={declared})")
    assert compare.main(["pair", model, "--out", str(tmp_path), "--quiet"]) == 1
    first = json.loads((tmp_path / "report.json").read_text())["first_difference"]
    assert cause in first["causes"][0]
    assert first["fixes"] == []


# --- Any inputs, outputs and losses

EXAMPLES = Path(__file__).with_name("examples.py")


@pytest.mark.parametrize(
    ("name", "agrees"),
    [
        pytest.param(name, agrees, marks=() if name == "TWO" else pytest.mark.slow)
        for name, agrees in {
            "TEXT": True,
            "PICTURES": True,
            "LIKELY": True,
            "TWO": True,
            "SUMMED": False,
        }.items()
    ],
)
def test_a_pair_brings_its_inputs_and_its_loss_and_needs_no_data(
    name: str, agrees: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_load", None)
    out = ["--out", str(tmp_path), "--quiet"]
    assert compare.main(["pair", f"{EXAMPLES}:{name}", *out]) == (0 if agrees else 1)
    report = json.loads((tmp_path / "report.json").read_text())
    if agrees:
        assert report["first_difference"] is None  # gaps measured: 8.9e-16 at most
    else:
        assert report["first_difference"]["stage"] == "loss"


def test_a_pair_without_data_is_checked_on_random_pictures_which_show_the_order_of_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expression = (
        "pair()\nclass BGR(Flax): __call__ = lambda self, x: Flax.__call__(self, x[..., ::-1])"
    )
    model = written(
        tmp_path, f"{expression}\nOTHER = Pair(Torch, BGR, flattened={{'fc': (3, 32, 32)}})"
    )
    other = model.replace("MADE", "OTHER")
    out = ["--out", str(tmp_path), "--quiet"]
    grey = compare.main(["pair", other, "--data", "digits", *out])
    monkeypatch.setattr(sources, "_load", None)
    assert [grey, *(compare.main(["pair", one, *out]) for one in (model, other))] == [0, 0, 1]
    first = json.loads((tmp_path / "report.json").read_text())["first_difference"]
    assert (first["stage"], first["tensor"]) == ("forward", "input of fc")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LISTS", "BACKWARDS"])
def test_parameters_in_lists_are_told_apart_by_their_positions(name: str, tmp_path: Path) -> None:
    status = compare.main(["pair", f"{EXAMPLES}:{name}", "--out", str(tmp_path), "--quiet"])
    report = json.loads((tmp_path / "report.json").read_text())
    native = {row["torch"]: row["flax"] for row in report["tensors"]}
    assert native["scales.10"] == "scales.10" and native["blocks.1.0"] == "blocks.1.0"
    assert native["named.shift"] == "named.shift" and len(native) == 11 + 2 + 1 + 4
    first = report["first_difference"]
    assert status == int(name == "BACKWARDS")
    if status:  # the control; a list is no layer, so that the layer after it shows the difference
        assert (first["stage"], first["tensor"]) == ("forward", "input of last")
    else:
        assert first is None  # gaps measured: 8.9e-16 at most


def test_an_example_is_read_from_an_archive_next_to_the_pair(tmp_path: Path) -> None:
    path = tmp_path / "pairs.py"
    path.write_text(EXAMPLES.read_text())
    with pytest.raises(ConfigError, match=r"its example cannot be read \(FileNotFoundError"):
        of_pair.example(f"{path}:ROBUST")
    x = np.zeros((3, 28, 28, 1), np.float32)
    np.savez(tmp_path / "pictures.npz", x=x, y=x)
    found = of_pair.example(f"{path}:ROBUST")
    assert found is not None
    assert found.train_images.shape == found.test_labels.shape == (3, 28, 28, 1)


def test_exact_sums_are_those_of_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name one with --model" in said(capsys, "--exact-sums", "--data", "digits")


# --- Any two backends


def test_two_backends_of_one_framework_are_compared_under_two_names(
    build: Any, digits: Any
) -> None:
    config = Config(model="mlp", steps=3, batch_size=8, lr=0.01, momentum=0.9).resolve(
        len(digits.train_images)
    )
    original, refactored = build("torch", config), build("torch", config)
    with pytest.raises(
        RecordError, match=r"^both backends are called 'torch': give one of them another `name`$"
    ):
        same_run(original, refactored, digits, config)
    refactored.name = "refactored"
    assert same_run(original, refactored, digits, config)
    refactored.config = dataclasses.replace(config, momentum=0.8)  # the control
    found = same_run(original, refactored, digits, config)
    assert not found and found.location is not None
    assert repr(found).startswith("the float64 runs diverge: update: step ")
    assert (found.verdict, found.location.divergence.stage) == ("disagree", "update")


# --- Refusals

REFUSED = {
    "an extra layer in PyTorch": (
        "pair(torch={'extra': True})",
        "PyTorch alone has more.weight (2, 2), more.bias (2,)",
    ),
    "an extra layer in Flax": (
        "pair(flax={'extra': True})",
        "Flax alone has more.kernel (2, 2), more.bias (2,)",
    ),
    "other shapes": ("pair(torch={'width': 9})", "fc.kernel: PyTorch (3072, 9), Flax (3072, 8)"),
    "two candidates": (
        "pair(names={'fc': 'out'})",
        "fc.weight and out.weight of PyTorch's module are both called",
    ),
    "a layer PyTorch lacks": (
        "pair(names={'nope': 'fc'})",
        "names nope, which PyTorch's module does not have",
    ),
    "a layer Flax lacks": (
        "pair(names={'fc': 'nope'})",
        "names nope, which Flax's module does not have",
    ),
    "draws in PyTorch": (
        "pair(torch={'rate': 0.5})",
        "torch's module draws its own random numbers (drop)",
    ),
    "draws in Flax": (
        "pair(flax={'rate': 0.5})",
        "flax's module draws its own random numbers (drop",
    ),
    "state in PyTorch": ("pair(torch={'keeps': 'state'})", "torch's forward pass changes seen"),
    "state in Flax": ("pair(flax={'keeps': 'state'})", "flax's forward pass changes seen"),
    "weights changed in PyTorch": (
        "pair(torch={'keeps': 'weights'})",
        "torch's forward pass changes fc.weight",
    ),
    "weights changed in Flax": (
        "pair(flax={'keeps': 'weights'})",
        "flax's forward pass changes fc.kernel",
    ),
    "fewer logits in PyTorch": (
        "pair(torch={'outputs': 7})",
        "torch gives (2, 7) for 2 images: let it give logits",
    ),
    "fewer logits in Flax": (
        "pair(flax={'outputs': 7})",
        "flax gives (2, 7) for 2 images: let it give logits",
    ),
    "NaN in PyTorch": ("pair(torch={'norm': float('nan')})", "torch's module gives NaN: look for"),
    "NaN in Flax": ("pair(flax={'norm': float('nan')})", "flax's module gives NaN: look for"),
    "whole numbers in PyTorch": (
        "Pair(lambda classes: Whole(classes), Flax, flattened={'fc': (3, 32, 32)})",
        "torch gives int64: let it give logits, in floating point",
    ),
    "whole numbers in Flax": (
        "Pair(Torch, WholePort, flattened={'fc': (3, 32, 32)})",
        "flax gives int32: let it give logits, in floating point",
    ),
    "a module that is built": (
        "Pair(Torch(10), Flax)",
        "its torch is a module that is already built: give its class",
    ),
    "a forward pass that fails": (
        "pair(flax={'fails': True})",
        "flax cannot take images (2, 32, 32, 3) (RuntimeError",
    ),
    "another framework's module": ("Pair(Flax, Torch)", "torch cannot build (TypeError"),
    "no module": (
        "Pair(lambda classes: 3, Flax)",
        "torch builds a int: let it build a torch.nn.Module",
    ),
    "a module that is not there": (
        "Pair('nowhere:Torch', Flax)",
        "nowhere cannot be imported (ModuleNotFoundError",
    ),
    "names that are a list": (
        "Pair(Torch, Flax, names=['fc'])",
        "names must be a dictionary of texts",
    ),
    "names that are numbers": (
        "Pair(Torch, Flax, names={'fc': 3})",
        "names must be a dictionary of texts",
    ),
    "a flatten of other pixels": (
        "pair(flattened={'fc': (3, 32, 31)})",
        "says fc follows a flatten of (3, 32, 31)",
    ),
    "a flatten before no layer": (
        "pair(flattened={'gone': (3, 32, 32)})",
        "says gone follows a flatten of (3, 32, 32)",
    ),
    "a flatten without axes": (
        "pair(flattened={'fc': 3072})",
        "flattened must be a dictionary: a layer, and",
    ),
    "a layer of unknown layout": (
        "Pair(lambda classes: torch.nn.Sequential(torch.nn.Bilinear(3, 3, 3)), Flax)",
        "torch's 0 is a Bilinear, whose layout is not known: add to the pair convert={'0': ...}",
    ),
    "a transposed kernel that is transposed": (
        "Pair(Torch, lambda classes, rngs: nnx.Sequential(nnx.ConvTranspose(3, 3, (2, 2), "
        "transpose_kernel=True, rngs=rngs)))",
        "flax's layers.0 has transpose_kernel=True, a layout that is not known",
    ),
    "a convert that is no dictionary of functions": (
        "pair(convert={'fc': 3})",
        "convert must be a dictionary: a layer, and a function",
    ),
    "a loss that is not known": (
        "pair(loss='mse')",
        "loss must be one of cross entropy, mean squared error, binary cross entropy, huber, or two",
    ),
    "a loss that fails": (
        "pair(loss=(lambda outputs, targets: outputs + 'x', lambda outputs, targets: outputs))",
        "torch cannot compute the loss (TypeError",
    ),
    "a loss for each image": (
        "pair(loss=(lambda outputs, targets: outputs, lambda outputs, targets: outputs))",
        "torch's loss has the shape (2, 10): let it give one number, such as the mean",
    ),
    "an example of texts": (
        "pair(example=(['a', 'b'], [0, 1]))",
        "its example: x is <U1 (2,): give numbers of two samples or more",
    ),
    "an example that is drawn anew": (
        "pair(example=lambda: (torch.rand(4, 32, 32, 3).numpy(), [0, 1, 2, 3]))",
        "its example differs from call to call: give its random numbers a seed",
    ),
    "an example of other lengths": (
        "pair(example=([[0.0], [1.0], [2.0]], [0, 1]))",
        "its example: x has 3 samples and y 2: give as many of both",
    ),
    "no builder": ("Pair(3, Flax)", "torch must be a class or a function that builds a module"),
}


# Each builds and compiles two networks.
LONG = {
    "an extra layer in PyTorch",
    "an extra layer in Flax",
    "fewer logits in Flax",
    "draws in Flax",
    "a transposed kernel that is transposed",
}


@pytest.mark.parametrize("what", slow_except(REFUSED, *(REFUSED.keys() - LONG)))
def test_what_cannot_be_compared_is_refused_in_one_line(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expression, expected = REFUSED[what]
    model = written(tmp_path, expression)
    assert expected in said(capsys, "pair", model, "--data", "digits")
    short = ("--data", "digits", "--steps", "3")  # too short for a second process
    assert expected in said(capsys, "--model", model, *short, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_pair_that_the_refused_ones_are_made_of_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control of the refusals above; and what is no reason to refuse is found."""
    assert compare.main(["pair", written(tmp_path, "pair()"), "--data", "digits", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["first_difference"] is None and report["gaps"]["backward"] < 1e-12
    )  # measured 3.7e-16
    assert (
        compare.main(["pair", written(tmp_path, "pair(flax={'norm': 1e-6})"), "--data", "digits"])
        == 1
    )
    shown = capsys.readouterr().out
    assert (
        "Where they differ first: forward: step 0: norm" in shown
        and "A likely cause: epsilon" in shown
    )


def test_a_network_of_more_classes_than_the_labels_show_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(expression: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()  # what a file gives is read once in a process
        return written(folder, expression)

    example = "example=(np.random.default_rng(0).normal(size=(6, 32, 32, 3)), np.arange(6))"
    sides = "torch={'outputs': 9}, flax={'outputs': 9}"
    expression = f"(np := __import__('numpy')) and pair({sides}, {example}"
    model = made(f"{expression}, classes=9)")
    assert compare.main(["pair", model, "--quiet"]) == 0
    digits = said(capsys, "pair", made("pair(classes=9)"), "--data", "digits")
    assert "the pair says 9 classes, and digits has 10: make them equal" in digits
    refusal = said(capsys, "pair", made(f"{expression})"))  # the control
    assert "gives (2, 9)" in refusal and "say in the pair how many classes there are" in refusal
    refusal = said(capsys, "pair", made("pair(classes=1)"))
    assert "classes must be a whole number of 2 or more" in refusal


def test_what_a_pair_prints_does_not_mix_with_the_report_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = written(tmp_path, "print('of the user') or pair()")
    assert compare.main(["pair", model, "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["model"] == model and "of the user" in shown.err
    pair._load_users.cache_clear()
    assert compare.main(["pair", model, "--quiet"]) == 0  # the control
    shown = capsys.readouterr()
    assert "of the user" in shown.out
    assert len(shown.out.splitlines()) < 10 and "largest entry" in shown.out  # the verdict alone


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("nothing", "unknown model 'nothing': choose one of net, mlp"),
        ("{folder}/none.py:PAIR", "none.py does not exist"),
        ("no.such.module:PAIR", "no.such.module cannot be imported (ModuleNotFoundError"),
        ("{folder}/small.py:NONE", "has no NONE: write NONE = Pair(torch=..., flax=...) there"),
        ("{folder}/small.py:NO_PAIR", "NO_PAIR in {folder}/small.py is not a Pair: write PAIR ="),
        ("{folder}/small.py", "say which pair in it, such as {folder}/small.py:PAIR"),
        ("{folder}:PAIR", "is not a Python file (.py)"),
        (
            "{folder}/broken.py:PAIR",
            "broken.py cannot be imported (ZeroDivisionError: division by zero)",
        ),
        ("{folder}/leaves.py:PAIR", "leaves.py cannot be imported (SystemExit"),
    ],
)
def test_a_pair_that_is_not_there_is_refused_in_one_line(
    file: Path, capsys: pytest.CaptureFixture[str], model: str, expected: str
) -> None:
    file.with_name("broken.py").write_text("1 / 0")
    file.with_name("leaves.py").write_text("raise SystemExit")
    folder = file.parent
    error = said(capsys, "--model", model.format(folder=folder), "--data", "digits")
    assert expected.format(folder=folder) in error


def test_a_builder_may_be_named_and_is_looked_up_when_its_framework_is_wanted(file: Path) -> None:
    lazy = file.with_name("lazy.py")
    lazy.write_text(
        "from lockstep.common.model.pair import Pair\nPAIR = Pair('lazy_torch:Torch', 'lazy_flax:Flax')\n"
    )
    file.with_name("lazy_torch.py").write_text(SMALL)
    assert pair.network(f"{lazy}:PAIR", "torch").__name__ == "Torch"
    with pytest.raises(ConfigError, match=r"^lazy_flax cannot be imported"):
        pair.network(f"{lazy}:PAIR", "flax")
