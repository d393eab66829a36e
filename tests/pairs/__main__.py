"""Pairs in the style of their authors: what `pair` says of each and takes, and how far 50 steps of
AdamW lead the two apart."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lockstep.common.data import of_pair
from lockstep.common.model import pair
from lockstep.common.report import write_json
from lockstep.common.system import environment

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PAIRS = {
    "VGG-11 with batch norm": "vgg.py:PAIR",
    "MLP-Mixer": "mixer.py:PAIR",
    "torchvision's ResNet-18": "resnet18.py:PAIR",
    "torchvision's ResNet-18, small learning rate": "resnet18.py:PAIR",
    "inverted residuals, as in MobileNet": "mobilenet.py:PAIR",
    "concatenations, as in DenseNet": "densenet.py:PAIR",
    "GPT of two blocks, nnx": "gpt.py:NNX",
    "GPT of two blocks, linen": "gpt.py:LINEN",
    "LSTM classifier": "lstm.py:PAIR",
    "autoencoder, transposed convolutions": "autoencoder.py:PAIR",
    "two outputs": "two_outputs.py:PAIR",
    "LeNet, 28 x 28 x 1": "lenet.py:PAIR",
    "224 x 224 x 3": "large.py:PAIR",
    "MLP of Equinox": "mlp_equinox.py:PAIR",
}
TRAINING = ["--optimizer", "adamw", "--steps", "50", "--batch-size", "16"]
LR, SMALL_LR = 0.001, 0.0001  # with the first, 11 million parameters amplify rounding


def run(arguments: list[str], cache: str) -> tuple[int, float]:
    """The exit status of a command and its CPU time, user and system, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    settings = dict(os.environ, OMP_NUM_THREADS="1", XDG_CACHE_HOME=cache)
    settings.pop("JAX_COMPILATION_CACHE_DIR", None)  # this process imported the pair, which sets it
    command = [sys.executable, "compare.py", *arguments, "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1):  # -9: the system ended it, for want of memory
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr}")
    return done.returncode, sum(
        getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime")
    )


def check(model: str, folder: str, cache: str) -> dict[str, Any]:
    """What `pair` finds, and its CPU time with the compiled programs in the cache (the median of three
    runs after one that fills it)."""
    declared = pair.load(model)
    _, *times = (run(["pair", model, "--out", folder], cache)[1] for _ in range(4))
    found = json.loads(Path(folder, "report.json").read_text())
    return {
        "model": model,
        "lines": sum(map(len, (declared.names, declared.flattened, declared.convert))),
        "tensors": len(found["tensors"]),
        "parameters": found["parameters"],
        "agrees": found["first_difference"] is None,
        "gaps": found["gaps"],
        "cpu_seconds": statistics.median(times),
        "environment": environment.describe(),
    }


def train(model: str, lr: float, data: list[str], folder: str, cache: str) -> dict[str, Any]:
    """The verdict on runs on `data`, by precision."""
    training = {}
    for dtype in ("float64", "float32"):  # apart: the runs of both keep 11 GB of first steps
        out = f"{folder}-{dtype}"
        options = ["--lr", str(lr), *TRAINING, "--dtype", dtype, "--out", out]
        run(["--model", model, *data, *options], cache)
        [lens] = json.loads(Path(out, "report.json").read_text())["lenses"]
        training[dtype] = {
            "verdict": lens["verdict"],
            "loss_gap": lens["max_abs_loss_gap"],
            "first_divergence": lens["first_divergence"],
        }
        shutil.rmtree(out)
    return training


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=[*PAIRS], default=[*PAIRS])
    parser.add_argument("--check-only", action="store_true", help="keep what training gave before")
    parser.add_argument("--out", type=Path, default=Path("results/runs/pairs"))
    options = parser.parse_args()
    kept = options.out / "report.json"  # rows that are not measured now stay
    rows = (
        {row["pair"]: row for row in json.loads(kept.read_text())["rows"]} if kept.exists() else {}
    )
    for title in options.only:
        model, lr = f"tests/pairs/{PAIRS[title]}", SMALL_LR if "small" in title else LR
        data = ["--data", "cifar10"] if of_pair.example(model) is None else []
        with tempfile.TemporaryDirectory() as folder:
            cache = f"{folder}/cache"  # empty
            row = {"pair": title, "lr": lr, **check(model, f"{folder}/pair", cache)}
            if options.check_only:
                row["training"] = rows[title]["training"]
            else:
                row["training"] = train(model, lr, data, f"{folder}/run", cache)
        rows[title] = row
        print(json.dumps(row), flush=True)
        report = {
            "schema": 1,
            "command": ["python", "-m", "tests.pairs", "--out", str(options.out)],
            "training": TRAINING,
            "rows": [rows[title] for title in PAIRS if title in rows],
        }
        write_json(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
