"""Ways to damage a file, a JSON text, and a set of arrays; what is done is drawn from a NumPy
generator."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lockstep.common.protocol import Arrays

ESCAPES = "\x1b[2J\x1b]0;pwn\x07red"  # clears a terminal and names its window
SCRIPT = "<script>alert(1)</script>"
NAMES = (
    "",
    ".",
    "..",
    "../../up",
    "/absolute",
    "a\nb",
    ESCAPES,
    SCRIPT,
    "\u202etxt.exe",
    "\udce9",
    "n" * 300,
    "a\0b",
)
INTEGERS = (
    0,
    1,
    2**7,
    2**15,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
SPECIAL = (float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, -0.0)
VALUES = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**200,
    0.5,
    -1.5,
    *SPECIAL,
    *NAMES,
    [],
    {},
    [[]],
    [None],
    {"": 0},
)
# What `json.dumps` would not write stands for these: deep nesting, endless numbers, a name given
# twice.
RAW = {
    "@deep list@": "[" * 100_000 + "]" * 100_000,
    "@deep object@": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "@unclosed@": "[" * 50_000,
    "@endless integer@": "9" * 6_000,
    "@endless fraction@": "0." + "1" * 6_000,
    "@huge exponent@": "1e999999999",
    "@half a pair@": '"\\ud800"',
    "@long text@": '"' + "x" * 1_000_000 + '"',
}

Generator = np.random.Generator


def one_of(generator: Generator, choices: Sequence[Any]) -> Any:
    return choices[int(generator.integers(len(choices)))]


def damaged(generator: Generator, content: bytes) -> tuple[bytes, str]:
    """The bytes of a file, damaged, and how."""
    data = bytearray(content)
    how = one_of(generator, list(_BYTES))
    at = _place(generator, len(data))
    length = int(min(len(data) - at, 2 ** generator.uniform(0, 12)))
    _BYTES[how](generator, data, at, max(1, length))
    return bytes(data), f"{how}, {length} at {at} of {len(content)}"


def _place(generator: Generator, size: int) -> int:
    """Anywhere, but often near the beginning or the end, where headers and directories lie."""
    if size < 2:
        return 0
    near = int(min(size - 1, 2 ** generator.uniform(0, np.log2(size))))
    return one_of(generator, [int(generator.integers(size)), near, size - 1 - near])


def _flip(generator: Generator, data: bytearray, at: int, length: int) -> None:
    for _ in range(int(generator.integers(1, 9))):
        if data:
            data[_place(generator, len(data))] ^= 1 << int(generator.integers(8))


def _overwrite(generator: Generator, data: bytearray, at: int, length: int) -> None:
    data[at : at + length] = generator.bytes(len(data[at : at + length]))


def _fill(generator: Generator, data: bytearray, at: int, length: int) -> None:
    data[at : at + length] = one_of(generator, [b"\0", b"\xff", b" ", b"9"]) * len(
        data[at : at + length]
    )


def _integer(generator: Generator, data: bytearray, at: int, length: int) -> None:
    size = one_of(generator, [1, 2, 4, 8])
    number = one_of(generator, INTEGERS) % 2 ** (8 * size)
    data[at : at + size] = number.to_bytes(size, one_of(generator, ["little", "big"]))


def _cut(generator: Generator, data: bytearray, at: int, length: int) -> None:
    del data[at:]


def _delete(generator: Generator, data: bytearray, at: int, length: int) -> None:
    del data[at : at + length]


def _insert(generator: Generator, data: bytearray, at: int, length: int) -> None:
    data[at:at] = generator.bytes(length)


def _repeat(generator: Generator, data: bytearray, at: int, length: int) -> None:
    data[at:at] = data[at : at + length]


def _move(generator: Generator, data: bytearray, at: int, length: int) -> None:
    piece = data[at : at + length]
    del data[at : at + length]
    to = _place(generator, len(data))
    data[to:to] = piece


def _append(generator: Generator, data: bytearray, at: int, length: int) -> None:
    data += one_of(generator, [generator.bytes(length), bytes(length), bytes(data[:length])])


def _replace_all(generator: Generator, data: bytearray, at: int, length: int) -> None:
    data[:] = one_of(
        generator,
        [b"", b"\0" * length, generator.bytes(length), b"{}", b"[]", b"null", b"not this\n"],
    )


_BYTES = {
    "flip": _flip,
    "overwrite": _overwrite,
    "fill": _fill,
    "integer": _integer,
    "cut": _cut,
    "delete": _delete,
    "insert": _insert,
    "repeat": _repeat,
    "move": _move,
    "append": _append,
    "replace all": _replace_all,
}


def distorted(generator: Generator, value: Any) -> tuple[Any, str]:
    """JSON types with something changed in them, and what; `text_of` writes them."""
    root = [copy.deepcopy(value)]
    holder, key = one_of(generator, list(_places(root)))
    how = one_of(
        generator, ["value", "value", "value", "raw", "drop", "add", "rename", "wrap", "retype"]
    )
    if how == "value":
        holder[key] = copy.deepcopy(one_of(generator, VALUES))
    elif how == "raw":
        holder[key] = one_of(generator, list(RAW))
    elif how == "drop" and holder is not root:
        del holder[key]
    elif how == "add" and isinstance(holder, dict):
        holder[one_of(generator, ["novelty", *NAMES])] = one_of(generator, VALUES)
    elif how == "rename" and isinstance(holder, dict):
        holder[one_of(generator, ["novelty", *NAMES])] = holder.pop(key)
    elif how == "retype" and isinstance(holder[key], (int, float)):
        holder[key] = one_of(
            generator, [str(holder[key]), float(holder[key]), -holder[key], holder[key] + 1]
        )
    else:
        holder[key] = [holder[key]]
    return root[0], f"{how} {key!r}"


def _places(value: Any) -> Any:
    """Each (container, key) in JSON types, the outermost first."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def text_of(value: Any, sort_keys: bool = True) -> str:
    text = json.dumps(value, sort_keys=sort_keys)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text


def distorted_arrays(generator: Generator, arrays: Arrays) -> tuple[Arrays, str]:
    """Arrays with one missing, added, renamed, of another shape or dtype, or with other numbers."""
    arrays = dict(arrays)
    name = one_of(generator, sorted(arrays))
    how = one_of(generator, list(_ARRAYS))
    _ARRAYS[how](generator, arrays, name)
    return arrays, f"{how} of {name}"


def _drop(generator: Generator, arrays: Arrays, name: str) -> None:
    del arrays[name]


def _more(generator: Generator, arrays: Arrays, name: str) -> None:
    group = name.partition("/")[0]
    rest = one_of(
        generator,
        [*NAMES[:-3], "novelty", "9999/fc1.bias", "-1/data/images", "0/evaluate/x", "1e3/x"],
    )
    arrays[one_of(generator, [rest, f"{group}/{rest}"])] = arrays[name]


def _rename(generator: Generator, arrays: Arrays, name: str) -> None:
    array = arrays.pop(name)
    _more(generator, arrays | {name: array}, name)
    arrays[name + one_of(generator, ["x", "/", ".", " "])] = array


def _dtype(generator: Generator, arrays: Arrays, name: str) -> None:
    kinds = [
        np.float64,
        np.float32,
        np.float16,
        np.int64,
        np.int8,
        np.uint64,
        np.bool_,
        ml_dtypes.bfloat16,
    ]
    with np.errstate(all="ignore"):
        arrays[name] = arrays[name].astype(one_of(generator, kinds))


def _shape(generator: Generator, arrays: Arrays, name: str) -> None:
    array = arrays[name]
    flat = array.reshape(-1)
    arrays[name] = one_of(
        generator,
        [
            flat,
            array[np.newaxis],
            array[..., np.newaxis],
            array.T.copy(),
            flat[:-1],
            flat[:0],
            np.append(flat, flat[:1]),
        ],
    )


def _number(generator: Generator, arrays: Arrays, name: str) -> None:
    array = arrays[name].copy()
    if array.size:
        with np.errstate(all="ignore"):
            number = np.float64(one_of(generator, [*SPECIAL, 1.0, -1.0, 1e30, 2.0**31]))
            array.reshape(-1)[int(generator.integers(array.size))] = number.astype(array.dtype)
    arrays[name] = array


def _scale(generator: Generator, arrays: Arrays, name: str) -> None:
    array = arrays[name]
    with np.errstate(all="ignore"):
        arrays[name] = (array * np.float64(one_of(generator, [-1, 0, 2, 1.001, 1e300]))).astype(
            array.dtype
        )


def _order(generator: Generator, arrays: Arrays, name: str) -> None:
    array = arrays[name]
    arrays[name] = generator.permutation(array.reshape(-1)).reshape(array.shape)


def _swap(generator: Generator, arrays: Arrays, name: str) -> None:
    other = one_of(generator, sorted(arrays))
    arrays[name], arrays[other] = arrays[other], arrays[name]


def _shorten_all(generator: Generator, arrays: Arrays, name: str) -> None:
    """All of one length, together: what belongs to each other still does."""
    size = arrays[name].shape[:1]
    for other, array in arrays.items():
        if array.shape[:1] == size and size:
            arrays[other] = array[:-1]


_ARRAYS = {
    "missing": _drop,
    "one more": _more,
    "another name": _rename,
    "another dtype": _dtype,
    "another shape": _shape,
    "another number": _number,
    "scaling": _scale,
    "another order": _order,
    "swapping": _swap,
    "shortening": _shorten_all,
}
