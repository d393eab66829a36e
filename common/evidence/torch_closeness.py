"""PyTorch's two rules for whether tensors are close: `torch.isclose`, and TorchDynamo's `same`."""

from __future__ import annotations

import numpy as np

DYNAMO_TOLERANCE, DYNAMO_LOOSE = 1e-4, 4e-2


def isclose(actual: np.ndarray, expected: np.ndarray, rtol: float, atol: float) -> np.ndarray:
    """|actual - expected| <= atol + rtol |expected|, with each step rounded to the dtype, as in
    torch.isclose.

    Args:
        actual, expected: of one shape and of one dtype, float64, float32 or bfloat16.

    Returns:
        bool, of that shape; equal infinities are close, NaN is close to nothing.
    """
    dtype = actual.dtype
    # bfloat16 is computed in float32 and rounded after each operation
    wide = np.float64 if dtype == np.float64 else np.float32

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.asarray(values).astype(dtype).astype(wide)

    with np.errstate(all="ignore"):
        one, other = actual.astype(wide), expected.astype(wide)
        allowed = rounded(rounded(np.abs(other * wide(rtol))) + rounded(np.asarray(atol)))
        gap = np.abs(rounded(one - other))
        return (one == other) | (np.isfinite(gap) & (gap <= allowed))


def same(
    ref: np.ndarray,
    res: np.ndarray,
    fp64: np.ndarray,
    tol: float = DYNAMO_TOLERANCE,
    pointwise: bool = False,
) -> bool:
    """Whether `res` is as good as `ref`, by TorchDynamo's check of one floating-point tensor.

    They are close by `tol`, absolute and relative; or

        rmse(fp64, res) <= m rmse(fp64, ref) + tol / 10,

    where m is 3 for half precision, for fewer than 1000 elements and for 1x1 kernels, else 2 (and 3
    again where `tol` is 2 % or more). NaN in `ref` alone passes where `res` is within 4 % of
    `fp64`.

    Args:
        ref, res: the reference's and the candidate's tensor.
        fp64: the same computed in float64.
        pointwise: whether it is the kernel of a 1x1 convolution.

    Source: `same`, with its defaults, in torch/_dynamo/utils.py of PyTorch 2.15.
    """
    if ref.dtype != res.dtype or ref.shape != res.shape:
        return False
    if bool(np.all(isclose(ref, res, tol, tol))):
        return True
    with np.errstate(all="ignore"):
        cast = fp64.astype(np.float32).astype(res.dtype) if res.dtype != np.float64 else fp64
        broken = np.isnan(ref.astype(np.float64)).any()
        whole = not np.isnan(fp64).any() and not np.isnan(res.astype(np.float64)).any()
        if whole and broken and bool(np.all(isclose(cast, res, DYNAMO_LOOSE, DYNAMO_LOOSE))):
            return True
        ref_error, res_error = (_rmse(fp64, array) for array in (ref, res))
    # Half precision has an itemsize of 2.
    multiplier = (
        3.0 if res.dtype.itemsize == 2 or fp64.size < 1000 or pointwise or tol >= 2e-2 else 2.0
    )
    return bool(res_error <= multiplier * ref_error + tol / 10)


def _rmse(fp64: np.ndarray, array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(fp64 - array.astype(np.float64)))))
