"""Recordings of a small training loop in NumPy, as two libraries would leave them: "torch" has
(out, in) kernels and images NCHW, "jax" has (in, out) kernels, images NHWC, and adds in another
order. Each fault changes one thing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lockstep.common.recorder.matched import Match, Matching
from lockstep.common.recorder.recording import Recording, batch_digest

STEPS = 24
LR, BETA1, BETA2, EPSILON, DECAY = 0.01, 0.9, 0.999, 1e-8, 0.01
SIZES = (12, 8, 5)  # an image has 2 x 2 x 3 numbers
NAMES = {
    "torch": ("net.fc1.weight", "net.fc1.bias", "net.fc2.weight", "net.fc2.bias"),
    "jax": (
        "params.Dense_0.kernel",
        "params.Dense_0.bias",
        "params.Dense_1.kernel",
        "params.Dense_1.bias",
    ),
}
LAYERS = {"torch": ("net.fc1", "net.fc2", "output"), "jax": ("Dense_0", "Dense_1", "output")}
SLOTS = ("first moment", "second moment")
STAGES_OF_FAULTS = {
    "batches in another order": "data",
    "scaled images": "data",
    "other weights": "weights",
    "tanh": "forward",
    "labels shifted": "loss",
    "sum of squares": "loss",
    "frozen layer": "backward",
    "decay in the gradient": "backward",
    "beta1": "update",
    "beta2": "update",
    "epsilon": "update",
    "decay": "update",
    "decay of biases": "update",
    "no bias correction": "update",
    "learning rate": "update",
    "late schedule": "update",
    "clipping": "update",
    "dropped update": "loss",
    "old weights": "evaluate",
    "other accuracy": "evaluate",
}


class Transposed(Match):
    """A kernel of "jax" is the transposed one of "torch"."""

    def of_b(self, array: np.ndarray) -> np.ndarray:
        return array.T


def matching(a: str = "torch", b: str = "jax", **changes: Any) -> Matching:
    """Which tensor of one framework is which of the other."""
    found = []
    for one, other in zip(NAMES[a], NAMES[b], strict=True):
        turned = a != b and "kernel" in other
        kind, layout = (Transposed, "transposed") if turned else (Match, "")
        found.append(kind(one, other, one, "value", None, None, layout))
    return replace(Matching(tuple(found), (), (), {}, True, ()), **changes)


@dataclass
class Training:
    """One run; `fault` changes what the second side does."""

    framework: str
    dtype: str = "float64"
    fault: str = ""
    twin: int | None = None
    steps: int = STEPS
    lacks: tuple[str, ...] = ()  # stages that are not recorded
    keep: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
        self.kind: np.dtype[Any] = np.dtype(kind)
        self.moves = np.random.default_rng([7, self.twin or 0])
        seed = 1 if self.fault == "other weights" else 0
        generator = np.random.default_rng(seed)
        shapes = [(SIZES[1], SIZES[0]), (SIZES[1],), (SIZES[2], SIZES[1]), (SIZES[2],)]
        drawn = [generator.normal(0, 0.4, shape).astype(np.float32) for shape in shapes]
        self.weights = [self.moved(array.astype(self.kind)) for array in drawn]
        self.moments: list[list[NDArray[Any]]] = [
            [np.zeros_like(w) for w in self.weights] for _ in SLOTS
        ]

    def moved(self, array: np.ndarray) -> np.ndarray:
        """A twin's arrays, moved by at most an ulp."""
        if not self.twin:
            return array
        eps = float(ml_dtypes.finfo(self.kind).eps)
        return (array * (1 + eps * self.moves.integers(-1, 2, array.shape))).astype(self.kind)

    def matmul(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The two libraries add in different orders."""
        if self.framework == "jax":
            x, y = x[:, ::-1], y[::-1]
        wide = np.float32 if self.kind.itemsize < 4 else self.kind
        x, y = (np.ascontiguousarray(each, wide) for each in (x, y))
        return np.einsum("ij,jk->ik", x, y).astype(self.kind)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        if self.fault == "batches in another order" and step >= 5:
            step = {5: 6, 6: 5}.get(step, step)
        generator = np.random.default_rng([3, step])
        images = generator.normal(0, 1, (16, 3, 2, 2)).astype(np.float32)
        if self.fault == "scaled images":
            images = images * np.float32(1.1)
        labels = generator.integers(0, SIZES[2], 16)
        return images, labels

    # --- One step

    def forward(self, images: np.ndarray) -> list[np.ndarray]:
        x = images.reshape(len(images), -1).astype(self.kind)
        one, bias1, two, bias2 = self.weights
        hidden = self.matmul(x, one.T) + bias1
        active = np.tanh(hidden) if self.fault == "tanh" else np.maximum(hidden, 0)
        return [x, hidden, active, self.matmul(active, two.T) + bias2]

    def step(self, step: int) -> None:
        images, labels = self.batch(step)
        self.record_batch(step, images, labels)
        x, hidden, active, logits = self.forward(self.moved(images.astype(self.kind)))
        target = (labels + 1) % SIZES[2] if self.fault == "labels shifted" else labels
        wide = logits.astype(np.float64)
        shifted = wide - wide.max(axis=1, keepdims=True)
        p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
        rows = np.arange(len(target))
        loss = -np.log(p[rows, target]).mean()
        if self.fault == "sum of squares":
            loss = loss + 0.5 * np.square(self.weights[0].astype(np.float64)).sum() * 1e-3
        p[rows, target] -= 1
        error = (p / len(target)).astype(self.kind)
        gate = 1 - active**2 if self.fault == "tanh" else (hidden > 0).astype(self.kind)
        back = self.matmul(error, self.weights[2]) * gate
        gradients = [
            self.matmul(back.T, x), back.sum(0), self.matmul(error.T, active), error.sum(0),
        ]  # fmt: skip
        if self.fault == "frozen layer":
            gradients[0] = np.zeros_like(gradients[0])
        if self.fault == "decay in the gradient":
            gradients = [g + 1e-3 * w for g, w in zip(gradients, self.weights, strict=True)]
        gradients = [g.astype(self.kind) for g in gradients]
        self.record(step, "forward", LAYERS[self.framework], [hidden, logits, logits], False)
        self.record(step, "loss", ["loss"], [np.array(loss)], False)
        self.record(step, "backward", NAMES[self.framework], gradients)
        self.update(step, gradients)
        for slot, moments in zip(SLOTS, self.moments, strict=True):
            names = [f"{slot} of {name}" for name in NAMES[self.framework]]
            self.record(step, "update", names, moments)
        self.record(step, "update", NAMES[self.framework], self.weights)
        self.keep.setdefault("loss", []).append(float(np.asarray(loss, self.kind)))

    def rate(self, step: int) -> float:
        if self.fault == "late schedule" and step >= 7:
            step -= 1
        rate = LR * (1 - 0.5 * step / STEPS)
        return rate * 1.1 if self.fault == "learning rate" else rate

    def update(self, step: int, gradients: list[NDArray[Any]]) -> None:
        beta1 = 0.8 if self.fault == "beta1" else BETA1
        beta2 = 0.95 if self.fault == "beta2" else BETA2
        epsilon = 1e-4 if self.fault == "epsilon" else EPSILON
        decay = 0.011 if self.fault == "decay" else DECAY
        self.keep.setdefault("lr", []).append(self.rate(step))
        for n, g in enumerate(gradients):
            if self.fault == "clipping":
                g = g * min(1.0, 0.01 / float(np.linalg.norm(g.astype(np.float64))))
            old = self.moments[0][n], self.moments[1][n]
            m: Any = (beta1 * old[0] + (1 - beta1) * g).astype(self.kind)
            v: Any = (beta2 * old[1] + (1 - beta2) * g * g).astype(self.kind)
            self.moments[0][n], self.moments[1][n] = m, v
            corrected = [m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))]
            if self.fault == "no bias correction":
                corrected = [m, v]
            way = corrected[0] / (np.sqrt(corrected[1]) + epsilon)
            if self.weights[n].ndim > 1 or self.fault == "decay of biases":
                way = way + decay * self.weights[n]
            if self.fault == "dropped update" and step == 9:
                way = 0 * way
            self.weights[n] = (self.weights[n] - self.rate(step) * way).astype(self.kind)

    # --- What is recorded

    def own(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """In the framework's layout."""
        return [array.T if self.framework == "jax" else array for array in arrays]

    def record(
        self, step: int, stage: str, names: Any, arrays: list[np.ndarray], parameters: bool = True
    ) -> None:
        if step < 2 and stage not in self.lacks:
            arrays = self.own(arrays) if parameters else arrays
            found = self.keep.setdefault("first_steps", {})
            for name, array in zip(names, arrays, strict=True):
                found[f"{step}/{stage}/{name}"] = np.array(array)

    def record_batch(self, step: int, images: np.ndarray, labels: np.ndarray) -> None:
        if self.framework == "jax":
            images, labels = images.transpose(0, 2, 3, 1), labels.astype(np.int32)
        self.record(step, "data", ["batch[0]", "batch[1]"], [images, labels], False)
        digests = self.keep.setdefault("digests", {})
        for name, array in (("batch[0]", images), ("batch[1]", labels)):
            digests.setdefault(name, []).append(batch_digest(array))

    def state(self) -> dict[str, np.ndarray]:
        names = NAMES[self.framework]
        return dict(zip(names, (np.array(w) for w in self.own(self.weights)), strict=True))

    def results(self) -> dict[str, np.ndarray]:
        images, labels = self.batch(10_000)
        if self.fault == "old weights":
            self.weights = self.keep["before"]
        logits = self.forward(images.astype(self.kind))[-1].astype(np.float64)
        predictions = logits.argmax(1)
        accuracy = float(np.mean(predictions == labels))
        if self.fault == "other accuracy":
            accuracy += 1 / 16
        return {
            "predictions": predictions,
            "accuracy": np.array(accuracy),
            "logits": logits,
        }

    def run(self) -> Recording:
        start, history = self.state(), {}
        for step in range(self.steps):
            self.keep["before"] = list(self.weights)
            self.step(step)
            if step + 1 in (3, 10):
                history |= {f"{step + 1}/{name}": w for name, w in self.state().items()}
        final, results = self.state(), self.results()
        series = {"loss": self.keep["loss"], "lr": self.keep["lr"]}
        return Recording(
            name=f"train_{self.framework}.py",
            framework=self.framework,
            dtype=self.dtype,
            twin=self.twin,
            script=f"examples/train_{self.framework}.py",
            arguments=["--epochs", "2"],
            source="0" * 64,
            environment={self.framework: "1.0", "numpy": np.__version__, "device": "cpu"},
            complete=True,
            weights=start,
            parameters=list(start),
            first_steps=self.keep.get("first_steps", {}),
            layers=[] if "forward" in self.lacks else list(LAYERS[self.framework]),
            parameter_history=history,
            final=final,
            series={n: np.array(v) for n, v in series.items() if n not in self.lacks},
            batch_digests={
                name: np.array(rows, np.int64) for name, rows in self.keep["digests"].items()
            },
            results={} if "evaluate" in self.lacks else results,
            lines={f"loss/{'loss'}": f"train_{self.framework}.py:41"},
            seconds=1.5,
        )


def recording(framework: str = "torch", dtype: str = "float64", **options: Any) -> Recording:
    return Training(framework, dtype, **options).run()


def with_twins(
    framework: str, dtype: str = "float64", count: int = 2, **options: Any
) -> list[Recording]:
    """The run, then its twins."""
    numbers = [None, *range(1, count + 1)]
    return [recording(framework, dtype, twin=number, **options) for number in numbers]
