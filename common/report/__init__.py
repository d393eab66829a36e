"""Reports of a run: `report.json`, the lines and tables on the terminal, the pictures, and
`report.html`."""

from __future__ import annotations

from lockstep.common.report.html import write_report_page
from lockstep.common.report.images import remove_pictures, write_pictures
from lockstep.common.report.json import jsonable, to_json, write_json
from lockstep.common.report.summary import sentence
from lockstep.common.report.tensorboard import check_tensorboard, write_tensorboard
from lockstep.common.report.terminal import Terminal
from lockstep.common.report.text import escape

__all__ = [
    "Terminal",
    "check_tensorboard",
    "escape",
    "jsonable",
    "remove_pictures",
    "sentence",
    "to_json",
    "write_json",
    "write_pictures",
    "write_report_page",
    "write_tensorboard",
]
