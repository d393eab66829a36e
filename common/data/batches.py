"""The order in which a run sees its images, and a digest of each batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import struct
from collections.abc import Iterator, Mapping

import numpy as np

from lockstep.common.config import Config
from lockstep.common.errors import ConfigError
from lockstep.common.protocol import Rank

ORDER_STREAM = int.from_bytes(
    b"data", "big"
)  # keeps the order apart from all else that is drawn from the same seed


def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order of one epoch: an int64 (images,) permutation, a pure function of its arguments;
    epochs count from 0."""
    generator = np.random.default_rng(np.random.SeedSequence((seed, ORDER_STREAM, epoch)))
    return generator.permutation(images).astype(np.int64, copy=False)


def batch_indices(config: Config, images: int) -> Iterator[np.ndarray]:
    """The indices of each step's images: `config.total_steps` int64 (batch,) arrays, over all
    epochs.

    The last batch of an epoch is smaller where the batch size does not divide `images`; with
    `drop_last` it is left out. `config` must be resolved for `images`.
    """
    left, per_epoch, size = config.total_steps, config.batches_per_epoch(images), config.batch_size
    assert per_epoch > 0, "resolve() refuses a batch that is larger than the data"
    for epoch in range(-(-left // per_epoch)):
        order = permutation(config.seed, epoch, images)
        for batch in range(min(left, per_epoch)):
            yield order[batch * size : (batch + 1) * size]
        left -= per_epoch


def first_seen(config: Config, images: int, count: int = 32) -> np.ndarray:
    """int64 (count,), or fewer: the indices of the first images that a run trains on."""
    one_batch = dataclasses.replace(config, batch_size=count, steps=1)
    return next(batch_indices(one_batch, images))


def rows(rank: Rank, batch: int) -> slice:
    """The images of a batch that one of several processes trains on: contiguous, as
    `np.array_split` splits them."""
    most, larger = divmod(batch, rank.count)  # the first `larger` processes have one more
    start = rank.number * most + min(rank.number, larger)
    return slice(start, start + most + (rank.number < larger))


def check_shares(config: Config, count: int, batch: int) -> None:
    """Raise ConfigError if `count` processes cannot train on a batch of so many images: each needs
    one, and with local batch norms all need equally many."""
    remedy = "choose another --batch-size or fewer --processes"
    if batch != config.batch_size:  # an epoch's last one
        remedy += ", or --drop-last"
    if batch < count:
        raise ConfigError(f"{count} processes cannot share a batch of {batch}: {remedy}")
    if config.batch_norm == "local" and batch % count:
        raise ConfigError(
            f"--batch-norm local needs equal shares, and {count} processes cannot have them of a batch "
            f"of {batch}: {remedy}"
        )


def check_all_shares(config: Config, count: int, images: int) -> None:
    """`check_shares` of all batches of a resolved run on so many training images."""
    check_shares(config, count, config.batch_size)
    per_epoch, rest = config.batches_per_epoch(images), images % config.batch_size
    if rest and not config.drop_last and config.total_steps >= per_epoch:
        check_shares(config, count, rest)


def order_digest(config: Config, images: int) -> str:
    """SHA-256, hexadecimal, of the length and content of every array that `batch_indices`
    yields."""
    digest = hashlib.sha256()
    for indices in batch_indices(config, images):
        digest.update(struct.pack("<q", len(indices)))
        digest.update(indices.astype("<i8").tobytes())
    return digest.hexdigest()


# --- Digests of single batches

EVERY = 8  # of an image's rows and of its columns, for the digest of a batch


def batch_digests(
    images: np.ndarray, labels: np.ndarray, masks: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """A digest of each batch: a weighted sum, modulo 2^64, of the bits of one pixel in 64, of all
    labels, and of the masks of dropout.

    It changes with an image, a label, their order, and a crop. The digest of every pixel would take
    several percent of a step of four images, and this one takes half a percent.

    Args:
        images: (steps, batch, height, width, channels), of any floating-point dtype; other inputs,
            (steps, batch, ...), are taken whole.
        labels: (steps, batch) integers, or other targets.
        masks: bool (steps, batch, ...), by layer.

    Returns:
        int64 (steps,).
    """
    chosen = images[:, :, ::EVERY, ::EVERY] if images.ndim == 5 else images
    bits = _bits(chosen)
    if labels.ndim > 2 or labels.dtype.kind == "f":
        labels = _bits(labels)
    dropped = [_packed(mask) for _, mask in sorted((masks or {}).items())]
    entries = np.concatenate([bits, labels, *dropped], axis=1, dtype=np.uint64, casting="unsafe")
    return (entries * _digest_weights(entries.shape[1])).sum(axis=1, dtype=np.uint64).view(np.int64)


def _bits(array: np.ndarray) -> np.ndarray:
    """(steps, ...) as uint64 (steps, numbers): the bits of each number; integers have any width."""
    array = np.ascontiguousarray(array.astype(np.int64) if array.dtype.kind == "i" else array)
    return array.view(f"u{array.itemsize}").reshape(len(array), -1).astype(np.uint64)


def _packed(mask: np.ndarray) -> np.ndarray:
    """A mask, bool (steps, ...), with 64 entries in each number: uint64 (steps, numbers)."""
    packed = np.packbits(mask.reshape(len(mask), -1), axis=1)
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)


@functools.lru_cache(maxsize=8)
def _digest_weights(entries: int) -> np.ndarray:
    """Odd numbers, so that no change of one entry is lost modulo 2^64."""
    generator = np.random.default_rng(ORDER_STREAM)
    return generator.integers(0, 2**64, entries, np.uint64) | np.uint64(1)
