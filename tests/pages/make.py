"""Make every committed page again: `python -m tests.pages.make`.

The runs are trained once, in `--runs` (an hour on two cores), and their pages are made from the
records there; a page whose code alone has changed takes seconds. The commands are those of the
table in results/README.md.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages.browser import chromium

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
RUNS = RESULTS / "runs" / "pages"
TABLE_ROW = re.compile(r"^\| `results/([^`]+)` \| `python compare\.py ([^`]+)` \|$", re.MULTILINE)
# The first screens that README.md shows.
PICTURES = {"read/lesson.html": "read/lesson.png", "quick/report.html": "quick/report.png"}
PICTURE_SIZE = {"width": 1440, "height": 900}
COLOURS = 128


def commands() -> dict[str, list[str]]:
    """By folder under results/, the options of `compare.py` that make it."""
    text = (RESULTS / "README.md").read_text("utf-8")
    return {name: shlex.split(options) for name, options in TABLE_ROW.findall(text)}


def run_pages() -> Iterator[tuple[str, list[str]]]:
    """The committed pages of runs, with the options of each."""
    for name, options in commands().items():
        if options[0].startswith("--") and (RESULTS / name / "report.html").exists():
            yield name, options


def compare(*options: str) -> None:
    """Run a command; it may exit with 1, as `diff` does."""
    print("python compare.py", shlex.join(options), flush=True)
    done = subprocess.run([sys.executable, "compare.py", *options], cwd=ROOT, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"this command failed: python compare.py {shlex.join(options)}")


def make_run(name: str, options: list[str], runs: Path) -> None:
    """The page of one run, from its records, which are trained if they are not there."""
    folder = runs / name
    if not (folder / "report.json").exists():
        place = options.index("--out") + 1
        compare(*options[:place], str(folder), *options[place + 1 :])
    with tempfile.TemporaryDirectory() as made:
        compare("report", str(folder), "--out", made)
        for committed in sorted((RESULTS / name).iterdir()):
            if (Path(made) / committed.name).exists():
                shutil.copyfile(Path(made) / committed.name, committed)
                if committed.suffix == ".png":
                    reduce_colours(committed)


def reduce_colours(picture: Path) -> None:
    """Write a PNG again with few colours, which is a third of its size."""
    from PIL import Image

    Image.open(picture).convert("RGB").quantize(COLOURS).save(picture, optimize=True)


def take_pictures() -> None:
    """The first screen of each page that README.md shows."""
    with chromium() as browser:
        for page, picture in PICTURES.items():
            tab = browser.new_page(viewport=PICTURE_SIZE, color_scheme="light")
            tab.goto((RESULTS / page).as_uri())
            tab.screenshot(path=str(RESULTS / picture))
            reduce_colours(RESULTS / picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=Path, default=RUNS, help=f"where the runs are (default: {RUNS})"
    )
    parser.add_argument("--only", nargs="*", metavar="NAME", help="of the runs, these alone")
    options = parser.parse_args()
    for name, command in run_pages():
        if options.only is None or name in options.only:
            make_run(name, command, options.runs.resolve())
    compare("learn", "--out", "results/read")
    try:
        take_pictures()
    except pytest.skip.Exception as reason:
        print(f"the pictures are as before: {reason}")


if __name__ == "__main__":
    main()
