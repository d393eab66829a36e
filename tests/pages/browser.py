"""What a browser finds wrong with a page: errors, requests, what is wider than the window, what
some cannot read."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

WIDTHS = (390, 1440)  # pixels: a phone and a desktop
HEIGHT = 900
SCHEMES = ("light", "dark")
LOCAL = ("file:", "data:", "blob:")
SEVERE = ("serious", "critical")  # of what axe-core finds
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HINT = (
    "the pages are not opened: pip install -e '.[dev]', and install Chromium "
    "(playwright install chromium)"
)

# Unfolds folded elements, which are read as well, and finds the first elements that reach beyond
# the window.
WIDER = """() => {
    document.querySelectorAll("details").forEach(details => { details.open = true });
    const width = document.documentElement.scrollWidth;
    if (width <= innerWidth) return null;
    const beyond = [...document.body.querySelectorAll("*")]
        .filter(element => element.getBoundingClientRect().right > innerWidth + 0.5)
        .map(element => element.outerHTML.slice(0, 80));
    return `${width} > ${innerWidth}: ${beyond.slice(0, 3).join(" | ")}`;
}"""


class Fault(NamedTuple):
    """One thing that is wrong with a page."""

    kind: str  # "error", "network", "width" or "access"
    where: str  # the scheme, and the width of the window in pixels
    what: str


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium; where there is none, or playwright or axe is missing, the test is
    skipped."""
    sync_api = pytest.importorskip("playwright.sync_api", reason=f"playwright is missing; {HINT}")
    pytest.importorskip(
        "axe_playwright_python.sync_playwright",
        reason=f"axe-playwright-python is missing; {HINT}",
    )
    with sync_api.sync_playwright() as playwright:
        found = executable(playwright.chromium.executable_path)
        browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def executable(own: str) -> str:
    """The machine's Chromium, or else playwright's `own`; where neither is there, the test is
    skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), own)
    if not Path(found).exists():
        pytest.skip(f"no Chromium is found; {HINT}")
    return found


def examine(browser: Any, path: Path, access: bool = True) -> list[Fault]:
    """Everything that is wrong with the page in `path`, in each colour scheme and at each width.

    Args:
        access: whether to ask axe-core, too, which takes most of the time.
    """
    return [fault for scheme in SCHEMES for fault in _examine(browser, path, scheme, access)]


def _examine(browser: Any, path: Path, scheme: str, access: bool) -> Iterator[Fault]:
    seen: list[Fault] = []

    def note(kind: str, what: str) -> None:
        seen.append(Fault(kind, scheme, what))

    with browser.new_context(
        color_scheme=scheme, viewport={"width": WIDTHS[0], "height": HEIGHT}
    ) as context:
        context.route(lambda url: not url.startswith(LOCAL), lambda route: route.abort())
        page = context.new_page()
        page.on(
            "request",
            lambda request: None if request.url.startswith(LOCAL) else note("network", request.url),
        )
        page.on(
            "console",
            lambda message: note("error", message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: note("error", str(error)))
        page.on(
            "dialog", lambda dialog: (note("error", f"dialog: {dialog.message}"), dialog.dismiss())
        )
        page.goto(path.resolve().as_uri())
        # axe-core cannot tell the contrast of text on a gradient.
        page.add_style_tag(content=".wide { background: none !important }")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": HEIGHT})
            if wider := page.evaluate(WIDER):
                yield Fault("width", f"{scheme}, {width}", wider)
            for finding in _inaccessible(page, scheme, width) if access else ():
                yield Fault("access", f"{scheme}, {width}", finding)
    yield from seen


# Cells far down a table, which look like those above, but for failed ones, and code far down one,
# whose colours tests/learn/test_side_by_side.py tests. They are hidden where axe-core looks for
# contrast, which takes 3 ms each.
REPEATED = (
    "tbody tr:not([class]):nth-child(n + 12) > :not(.bad):not(:has(*)), "
    ".code tbody tr:nth-child(n + 3)"
)


def _inaccessible(page: Any, scheme: str, width: int) -> Iterator[str]:
    """What axe-core calls serious or critical. Contrast, which is slow, is asked once in each scheme,
    and not of `REPEATED`; all other rules at each width."""
    if SCHEMES.index(scheme) != WIDTHS.index(width):
        hidden = page.add_style_tag(content=f"{REPEATED} {{ display: none !important }}")
        yield from _violations(page, {"runOnly": ["color-contrast"]})
        hidden.evaluate("style => style.remove()")
    if scheme == SCHEMES[0]:
        yield from _violations(page, {"rules": {"color-contrast": {"enabled": False}}})


def _violations(page: Any, rules: dict[str, Any]) -> Iterator[str]:
    """The rule, and the first elements that break it."""
    from axe_playwright_python.sync_playwright import Axe

    options = {"resultTypes": ["violations"], **rules}
    for violation in Axe().run(page, None, options).response["violations"]:
        if violation["impact"] in SEVERE:
            nodes = [f"{node['html'][:100]} ({_reason(node)})" for node in violation["nodes"]]
            yield f"{violation['id']}, {len(nodes)} times: {' | '.join(nodes[:3])}"


def _reason(node: dict[str, Any]) -> str:
    return "; ".join(check["message"] for check in (*node["any"], *node["all"], *node["none"]))
