"""Every page opens in a browser without an error, without the network, on any screen, for any
reader."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.report import write_report_page
from lockstep.common.report.template import write_page
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.session import make_report
from lockstep.common.verdict.compare import compare
from tests.marks import slow_except
from tests.pages.browser import Fault, chromium, examine, executable
from tests.report.helpers import found
from tests.verdict.test_compare import CLASSES, LABELS, STEPS
from tests.verdict.test_compare import make as record

REPOSITORY = Path(__file__).resolve().parents[2]
# Not each run's: these are one page with other numbers, and each takes up to half a minute.
ALIKE = (
    *("-bfloat16", "-mixed", "basic-float32", "basic-float64", "mlp", "vit"),
    *("torch-2.11", "two-threads", "processes-4", "processes-resnet20"),
    *("convnext", "tutorial-float64"),
)
# tests/learn makes these pages again and examines them.
ELSEWHERE = "read"
COMMITTED = [
    path
    for path in sorted(REPOSITORY.glob("results/**/*.html"))
    if "runs" not in path.parts
    and not path.parent.name.endswith(ALIKE)
    and path.parent.name != ELSEWHERE
]

Records = dict[str, dict[str, Record]]
Maker = Callable[[Path], Path]  # makes a page in a folder and returns its file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


# --- The pages


def base(folder: Path) -> Path:
    """What all pages share, with nothing in it."""
    return write_page(folder / "base.html", "base.html.jinja")


def report_page(
    folder: Path, records: Records, classes: tuple[str, ...] = CLASSES, cut_short: str | None = None
) -> Path:
    """`report.html` of made runs: by dtype, the records of each backend."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(LABELS), 32, 32, 3), np.uint8)
    dataset = Dataset("made", pixels, LABELS, pixels, LABELS, classes)
    twins = {
        dtype: {name: twins_of(name, dtype) for name in runs} for dtype, runs in records.items()
    }
    comparisons = []
    for dtype, runs in records.items():
        ensembles = {
            name: Ensemble(run, tuple(twins[dtype].get(name, ()))) for name, run in runs.items()
        }
        comparisons.append(compare(ensembles, LABELS))
    config = Config(steps=STEPS).resolve(len(LABELS))
    report = make_report(
        "quick", config, dataset, ["--steps", str(STEPS)], records, comparisons, cut_short
    )
    for comparison in report["lenses"]:
        if comparison["verdict"] == "disagree":
            comparison["located"] = found()
    return write_report_page(folder, report, records, dataset, twins, np.arange(32))


def twins_of(name: str, dtype: str) -> list[Record]:
    return [] if dtype == "float64" else [record(name, dtype, twin) for twin in (1, 2)]


def pair(dtype: str, **changes: Any) -> dict[str, Record]:
    """The records of both backends; `changes` are what is different in Flax's."""
    return {"torch": record("torch", dtype), "flax": record("flax", dtype, **changes)}


def runs_that_agree(folder: Path) -> Path:
    return report_page(folder, {dtype: pair(dtype) for dtype in ("float64", "float32")})


def runs_that_disagree(folder: Path) -> Path:
    broken = {"loss": np.full(STEPS, np.inf), "predictions": LABELS[::-1]}
    return report_page(folder, {dtype: pair(dtype, **broken) for dtype in ("float64", "float32")})


def one_backend(folder: Path) -> Path:
    return report_page(folder, {"float64": {"flax": record("flax", "float64")}})


def a_run_cut_short(folder: Path) -> Path:
    records = {"float64": pair("float64"), "float32": {"torch": record("torch", "float32")}}
    return report_page(folder, records, cut_short="flax float32 was interrupted at step 12 of 500")


def hostile_names(folder: Path) -> Path:
    names = [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(2)>",
        "\x1b[31mred",
        "w" * 120,
        "\"'>&amp;\udce9",
    ]
    runs = pair("float64")
    data = runs["torch"].data | {"classes": names}
    runs = {name: dataclasses.replace(run, data=data) for name, run in runs.items()}
    return report_page(folder, {"float64": runs}, tuple(names))


MAKERS: list[Maker] = [
    base,
    runs_that_agree,
    runs_that_disagree,
    one_backend,
    a_run_cut_short,
    hostile_names,
]


def page_name(page: Maker | Path) -> str:
    return (
        str(page.relative_to(REPOSITORY))
        if isinstance(page, Path)
        else getattr(page, "__name__", "page")
    )


# Each page takes some seconds.
FAST = [REPOSITORY / "results" / "index.html"]


@pytest.fixture(
    scope="module",
    params=[*slow_except(MAKERS, *MAKERS[:2]), *slow_except(COMMITTED, *FAST)],
    ids=page_name,
)
def faults(
    request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[Fault]:
    """What is wrong with each page in turn."""
    page = request.param
    return examine(
        browser, page if isinstance(page, Path) else page(tmp_path_factory.mktemp("page"))
    )


def of(kind: str, faults: list[Fault]) -> list[Fault]:
    return [fault for fault in faults if fault.kind == kind]


def test_a_page_reports_no_error(faults: list[Fault]) -> None:
    assert of("error", faults) == []


def test_a_page_asks_the_network_for_nothing(faults: list[Fault]) -> None:
    assert of("network", faults) == []


def test_a_page_is_no_wider_than_the_window(faults: list[Fault]) -> None:
    assert of("width", faults) == []


def test_a_page_can_be_read_by_everyone(faults: list[Fault]) -> None:
    assert of("access", faults) == []


# --- The controls: what is broken on purpose is seen

FINE = (
    "<h1>Lockstep</h1><p>Nothing is wrong here.</p><img "
    'src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" alt="nothing">'
)
EVERYWHERE = ["light, 390", "light, 1440", "dark, 390", "dark, 1440"]
# What is added to the page; the kind of fault that it is; what is said of it; and where.
BROKEN = {
    "console error": (
        "<script>console.error('broken')</script>",
        "error",
        "broken",
        ["light", "dark"],
    ),
    "exception": ("<script>undefined.broken</script>", "error", "broken", ["light", "dark"]),
    "script in a name": (
        "<script>alert('broken')</script>",
        "error",
        "dialog: broken",
        ["light", "dark"],
    ),
    "missing picture": (
        '<img src="missing.png" alt="">',
        "error",
        "ERR_FILE_NOT_FOUND",
        ["light", "dark"],
    ),
    "network": (
        '<img src="http://127.0.0.1:9/x" alt="">',
        "network",
        "http://127.0.0.1:9/x",
        ["light", "dark"],
    ),
    "wide": ('<p style="width: 2000px">wide</p>', "width", "<p", EVERYWHERE),
    "wide and folded": (
        '<details><summary>more</summary><p style="width: 2000px">x',
        "width",
        "<p",
        EVERYWHERE,
    ),
    "no alt": (
        '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">',
        "access",
        "image-alt",
        EVERYWHERE[:2],
    ),
    "low contrast": (
        '<p style="color: #bbb">faint</p>',
        "access",
        "color-contrast",
        ["light, 1440", "dark, 390"],
    ),
    "low contrast of a failed cell far down a table": (
        "<table><caption>Cells</caption><thead><tr><th>Cell</th></tr></thead><tbody>"
        + "<tr><td>seen</td></tr>" * 30
        + '<tr><td class="bad" style="color: #bbb">faint</td></tr></tbody></table>',
        "access",
        "color-contrast",
        ["light, 1440", "dark, 390"],
    ),
}


def made(folder: Path, body: str) -> Path:
    page = folder / "page.html"
    page.write_text(
        '<!DOCTYPE html><html lang="en"><head><meta name="viewport" content="width=device-width">'
        f'<link rel="icon" href="data:,"><title>Made</title></head><body><main>{FINE}{body}</main></body></html>'
    )
    return page


def test_a_page_with_nothing_wrong_passes(browser: Any, tmp_path: Path) -> None:
    assert examine(browser, made(tmp_path, "")) == []


@pytest.mark.parametrize(("body", "kind", "what", "where"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_with_a_page_is_seen(
    browser: Any, tmp_path: Path, body: str, kind: str, what: str, where: list[str]
) -> None:
    faults = examine(browser, made(tmp_path, body))
    assert [fault.where for fault in of(kind, faults)] == where
    assert all(what in fault.what for fault in of(kind, faults))
    assert {fault.kind for fault in faults} == (
        {"network", "error"} if kind == "network" else {kind}
    )


def test_what_is_wrong_in_one_scheme_or_at_one_width_is_seen_there(
    browser: Any, tmp_path: Path
) -> None:
    style = (
        "<style>@media (prefers-color-scheme: dark) { p { color: #eee; background: #fff } }</style>"
    )
    faults = examine(
        browser, made(tmp_path, f'{style}<div style="width: 700px">for desktops</div>')
    )
    assert [fault[:2] for fault in faults] == [
        ("width", "light, 390"),
        ("width", "dark, 390"),
        ("access", "dark, 390"),
    ]


@pytest.mark.parametrize(
    "package", ["playwright.sync_api", "axe_playwright_python.sync_playwright"]
)
def test_without_its_packages_a_test_is_skipped_with_the_remedy(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with (
        pytest.raises(pytest.skip.Exception, match=r"is missing; .*playwright install chromium"),
        chromium(),
    ):
        pytest.fail("the package was found")


def test_without_a_browser_a_test_is_skipped_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    own = tmp_path / "chrome"
    with pytest.raises(
        pytest.skip.Exception, match=r"no Chromium is found; .*playwright install chromium"
    ):
        executable(str(own))
    own.touch()
    assert executable(str(own)) == str(own)
