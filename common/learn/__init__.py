"""Two pages to learn from: the sources of the two backends side by side, and one run of both,
walked through.

Sources are read as text when a page is made, and every number comes from a report or from a run, so
that a page says what is there. What a page says of the sources is tied to them: see
`sections.check` and `notes.check`.
"""

from lockstep.common.learn.faults_report import read_report
from lockstep.common.learn.outline import SourceError
from lockstep.common.learn.side_by_side import write_read_page
from lockstep.common.learn.walkthrough import walk_through, write_walk_page

__all__ = ["SourceError", "read_report", "walk_through", "write_read_page", "write_walk_page"]
