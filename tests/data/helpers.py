"""What the tests of several data sources use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lockstep.common import data
from lockstep.common.errors import DataError


def refusal(choice: str | Path, data_dir: Path | None = None) -> str:
    """The message of the DataError that loading must end in, which must be one printable line."""
    with pytest.raises(DataError) as caught:
        data.load(str(choice), data_dir, announce=lambda line: None, progress=False)
    assert str(caught.value).isprintable()
    return str(caught.value)


def explode(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was unpickled")
