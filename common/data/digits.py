"""scikit-learn's handwritten digits, padded to 32 x 32 pixels."""

from __future__ import annotations

import numpy as np

from lockstep.common.data.dataset import Dataset

DIGITS_TEST_IMAGES = 360  # the last of scikit-learn's 1797


def load_digits() -> Dataset:
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    grey = np.rint(flat.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # from 0..16
    images = grey.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    labels, cut = labels.astype(np.int64), len(images) - DIGITS_TEST_IMAGES
    return Dataset(
        "digits", images[:cut], labels[:cut], images[cut:], labels[cut:], tuple("0123456789")
    )
