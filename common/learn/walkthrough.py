"""`walk.html`: stochastic gradient descent in both frameworks, with the numbers of real runs.

`walk_through` trains a few short runs and computes every number of the page; `write_walk_page`
writes it. The page is for someone who knows one of the two frameworks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from markupsafe import Markup

from lockstep.common.data import Dataset
from lockstep.common.evidence import Build
from lockstep.common.learn import alignment
from lockstep.common.learn.batch_sizes import SizesJson, batch_sizes
from lockstep.common.learn.excerpts import EXCERPTS, excerpt
from lockstep.common.learn.experiment import Experiment
from lockstep.common.learn.precision import PrecisionJson, draw_gaps, precisions
from lockstep.common.learn.sgd import OptionsJson, StepJson, one_step, optimizer_options
from lockstep.common.learn.sources import read_backends
from lockstep.common.learn.text import format_number, gap_text, pair_text
from lockstep.common.report.template import write_page


class Walkthrough(TypedDict):
    """All numbers and excerpts of the page."""

    data: str
    excerpts: dict[str, dict[str, list[Markup]]]  # by key, then by side
    step: StepJson
    options: OptionsJson
    precision: PrecisionJson
    sizes: SizesJson


def walk_through(
    build: Build,
    dataset: Dataset,
    sources: Path,
    announce: Callable[[str], None] = lambda line: None,
) -> Walkthrough:
    """Train and compute everything that the page shows.

    Args:
        build: makes a backend from its name, a resolved configuration and a precision.
        sources: the folder that holds `backends`.
        announce: receives a line before each section.

    Raises:
        ConfigError: if the data has fewer images than a batch of `batch_sizes.SIZES`.
        SourceError: if the sources lack a line that the page shows.
    """
    experiment = Experiment(build, dataset)
    backends = read_backends(sources)
    excerpts = {key: excerpt(backends, lines) for key, lines in EXCERPTS.items()}
    announce("One step, stage by stage")
    step = one_step(experiment)
    announce("The optimizer's options, one by one")
    options = optimizer_options(experiment)
    announce("float32 and float64")
    precision = precisions(experiment)
    announce("Batch sizes")
    sizes = batch_sizes(experiment)
    return {
        "data": dataset.name,
        "excerpts": excerpts,
        "step": step,
        "options": options,
        "precision": precision,
        "sizes": sizes,
    }


def write_walk_page(path: Path, walked: Walkthrough) -> Path:
    """Write what `walk_through` computed; equal results give equal bytes.

    Raises:
        RecordError: if the page cannot be written.
    """
    spacings = [run["spacing"] for run in walked["precision"]["runs"].values()]
    return write_page(
        path,
        "walk.html.jinja",
        **walked,
        picture=draw_gaps(walked["precision"]),
        digits=math.log10(max(spacings) / min(spacings)),  # by which float64 exceeds float32
        highlight=alignment.stylesheet(),
        format_number=format_number,
        gap=gap_text,
        pair=pair_text,
    )
