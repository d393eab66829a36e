"""Pages to learn from: two plain programs with notes, the same as a notebook, the sources of the two
backends side by side, and one run of both, number by number.

A page reads the sources as text when it is made, and takes every number from a report or a run, so
it cannot be out of date. `outline.check` and `notes` check that the lesson fits the sources.
"""

from lockstep.common.learn.faults_report import read_report
from lockstep.common.learn.lesson import write_lesson_page
from lockstep.common.learn.notebook import write_lesson_notebook
from lockstep.common.learn.side_by_side import write_read_page
from lockstep.common.learn.sources import SourceError
from lockstep.common.learn.walkthrough import walk_through, write_walk_page

__all__ = [
    "SourceError",
    "read_report",
    "walk_through",
    "write_lesson_notebook",
    "write_lesson_page",
    "write_read_page",
    "write_walk_page",
]
