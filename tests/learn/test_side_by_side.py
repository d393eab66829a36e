"""The page that sets the two backends side by side: tied to the sources, to the known faults, and
to the tests."""

from __future__ import annotations

import copy
import dataclasses
import html
import html.parser
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lockstep.backends import faults
from lockstep.common.config import BACKENDS
from lockstep.common.learn import (
    SourceError,
    alignment,
    contents,
    notes,
    outline,
    pins,
    side_by_side,
    sources,
    write_read_page,
)
from lockstep.common.learn.alignment import align, similarity
from lockstep.common.learn.annotations import NOTES
from lockstep.common.learn.faults_report import FaultsReport
from lockstep.common.learn.sources import Line
from tests.pages.browser import HEIGHT, chromium, examine

ROOT = Path(__file__).resolve().parents[2]
NAMES = [fault.name for fault in faults.FAULTS]
MAX_SCREENS = 24  # of 1440 x 900 pixels; measured 21, and 99 before anything was folded
AA = 4.5  # the contrast that WCAG 2 asks of text
GROUNDS = (("#ffffff", "#f4f5f7"), ("#14171a", "#1e2328"))  # --page and --panel, light and dark


@pytest.fixture(scope="module")
def report() -> FaultsReport:
    return json.loads((ROOT / "results/faults/report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(report: FaultsReport, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_read_page(
        tmp_path_factory.mktemp("read") / "read.html", ROOT, report, NAMES
    ).read_text("utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the sources, to break."""
    for folder in ("backends", "common"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, (old, text.count(old))
    file.write_text(text.replace(old, new), encoding="utf-8")


def without(text: str, name: str) -> str:
    """A source without its function `name`."""
    found = sources.definitions(text, "")[name].lines
    lines = text.splitlines(keepends=True)
    return "".join(lines[: found[0].number - 1] + lines[found[-1].number :])


# --- Sections


def test_every_definition_of_both_backends_stands_in_one_section() -> None:
    outline.check(sources.read_backends(ROOT))


@pytest.mark.parametrize("side", BACKENDS)
def test_a_function_that_loses_its_partner_is_named(side: str, house: Path) -> None:
    file = house / sources.FOLDERS[side] / "losses.py"
    file.write_text(without(file.read_text(encoding="utf-8"), "global_norm"), encoding="utf-8")
    other = next(name for name in BACKENDS if name != side)
    with pytest.raises(
        SourceError, match=rf"^losses\.py:global_norm is in {other} only: give it a partner"
    ):
        outline.check(sources.read_backends(house))


@pytest.mark.parametrize("side", BACKENDS)
def test_a_new_function_on_one_side_is_named(side: str, house: Path) -> None:
    with (house / sources.FOLDERS[side] / "models/net.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef unheard_of() -> None: ...\n")
    with pytest.raises(
        SourceError, match=rf"^models/net\.py:unheard_of of {side} is in no section"
    ):
        outline.check(sources.read_backends(house))


def test_a_one_sided_function_that_gets_a_partner_is_named(house: Path) -> None:
    with (house / sources.FOLDERS["flax"] / "compiled.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef to_array(batch_size: int) -> None: ...\n")
    with pytest.raises(
        SourceError, match=r"^compiled\.py:to_array is declared one-sided, and flax has it"
    ):
        outline.check(sources.read_backends(house))


def test_a_function_in_two_sections_is_named() -> None:
    twice = (
        *outline.SECTIONS,
        outline.Section("again", "", "", outline.same_names("losses.py", "upcast")),
    )
    with pytest.raises(
        SourceError, match=r"^losses\.py:upcast of torch is in more than one section"
    ):
        outline.check(sources.read_backends(ROOT), twice)


def test_the_page_has_each_section_once_and_the_training_first() -> None:
    parts = contents.ordered()
    keys = [section.key for sections in parts.values() for section in sections]
    assert keys[:2] == ["model", "step"] and keys[-2:] == ["data", "setup"]
    names = {side: set(read) for side, read in sources.read_backends(ROOT).items()}
    for name in contents.OPEN:
        assert name in names["torch"] | names["flax"]
    for wrong in ({"All": keys[1:]}, {"All": keys, "Again": keys[:1]}):
        with pytest.raises(SourceError, match="see 'model'"):
            contents.ordered(wrong)
    without_step = [section for section in outline.SECTIONS if section.key != "step"]
    kept = {"All": [key for key in keys if key != "step"]}
    with pytest.raises(
        SourceError, match=r"opens backend\.py:Backend\._step, which is in no section"
    ):
        contents.ordered(kept, without_step)


def test_what_has_no_partner_says_why() -> None:
    for section in outline.SECTIONS:
        for pair in section.pairs:
            assert bool(pair.why) == (None in (pair.torch, pair.flax)), pair


def test_a_source_that_is_missing_or_damaged_is_one_line(house: Path) -> None:
    file = house / "backends/flax_backend/models/net.py"
    file.write_text("def f(:\n", encoding="utf-8")
    with pytest.raises(
        SourceError,
        match=r"^the source backends/flax_backend/models/net\.py cannot be parsed \(line 1\)",
    ):
        sources.read_backends(house)
    file.unlink()
    with pytest.raises(
        SourceError, match=r"^the source backends/flax_backend/models/net\.py cannot be read"
    ):
        sources.read_backends(house)
    replace(house / "common/data/dataset.py", "def normalise(", "def standardise(")
    with pytest.raises(SourceError, match=r"^common has no data/dataset\.py:normalise any more"):
        outline.read_shared(house)


SOURCE = '''"""A module."""

import os

# Said of the line below.
LIMIT = 3


class Plain(tuple):
    x: int


@final
class Rich:
    """Has methods."""

    name = "rich"

    # --- A heading

    @property
    def one(self):

        return 1


def free():
    return 2
'''


def test_definitions_are_cut_out_with_their_decorators_and_comments() -> None:
    found = sources.definitions(SOURCE, "a.py")
    assert {name: [line.text for line in d.lines] for name, d in found.items()} == {
        "settings": ["# Said of the line below.", "LIMIT = 3"],
        "Plain": ["class Plain(tuple):", "    x: int"],
        "Rich": ["@final", "class Rich:", '    """Has methods."""', '    name = "rich"'],
        "Rich.one": ["@property", "def one(self):", "    return 1"],
        "free": ["def free():", "    return 2"],
    }
    text = SOURCE.splitlines()
    for definition in found.values():
        assert all(text[line.number - 1].endswith(line.text) for line in definition.lines)
    assert (found["Rich.one"].span, found["free"].span) == ("lines 21 to 24", "lines 27 to 28")


# --- Notes


def test_there_are_enough_notes_and_each_stands_on_a_line_of_each_side_and_on_a_fault_or_a_test(
    report: FaultsReport,
) -> None:
    assert len(NOTES) >= 15
    assert len({note.title for note in NOTES}) == len(NOTES)
    notes.locate(NOTES, sources.read_backends(ROOT))
    notes.check_faults(NOTES, NAMES, report["rows"])
    notes.check_tests(NOTES, ROOT)


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note.title)
@pytest.mark.parametrize("side", BACKENDS)
def test_a_note_whose_line_is_gone_is_named_in_one_line(note: notes.Note, side: str) -> None:
    backends = sources.read_backends(ROOT)
    source_line = getattr(note, side)
    definition = backends[side][source_line.definition]
    lines = tuple(
        line._replace(text=line.text.replace(source_line.snippet, "")) for line in definition.lines
    )
    backends[side][source_line.definition] = dataclasses.replace(definition, lines=lines)
    with pytest.raises(SourceError, match=r" stands nowhere in ") as raised:
        notes.locate([note], backends)
    assert repr(source_line.snippet) in str(raised.value) and "\n" not in str(raised.value)
    backends[side][source_line.definition] = dataclasses.replace(
        definition, lines=definition.lines * 2
    )
    with pytest.raises(SourceError, match=" stands 2 times in "):
        notes.locate([note], backends)
    del backends[side][source_line.definition]
    with pytest.raises(
        SourceError, match=f"^{side} has no {re.escape(source_line.definition)}, which the note"
    ):
        notes.locate([note], backends)


NOTE = NOTES[0]


@pytest.mark.parametrize(
    ("note", "names", "change", "said"),
    [
        (
            dataclasses.replace(NOTE, faults=("no-such",)),
            NAMES,
            None,
            "'no-such', which is no known fault",
        ),
        (
            NOTE,
            NAMES,
            lambda rows: [r for r in rows if r["name"] != NOTE.faults[0]],
            "is not in the report",
        ),
        (NOTE, [], None, "which is no known fault"),
        (
            NOTE,
            NAMES,
            lambda rows: [not_caught(r) for r in rows],
            "was not found: run the faults again",
        ),
        (dataclasses.replace(NOTE, faults=(), tests=()), NAMES, None, "neither a fault nor a test"),
    ],
    ids=["unknown", "not measured", "not in the catalogue", "not found", "no proof"],
)
def test_a_fault_that_does_not_show_what_a_note_says_is_an_error(
    note: notes.Note,
    names: list[str],
    change: Callable | None,
    said: str,
    report: FaultsReport,
    tmp_path: Path,
) -> None:
    changed: Any = report | {"rows": change(report["rows"]) if change else report["rows"]}
    with pytest.raises(SourceError, match=said) as raised:
        write_read_page(tmp_path / "read.html", ROOT, changed, names, [note])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "read.html").exists()


def not_caught(row: dict[str, Any]) -> dict[str, Any]:
    row = copy.deepcopy(row)
    for finding in row["lenses"].values():
        finding["caught"] = False
    return row


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("tests/learn/test_side_by_side.py::test_no_such", "has no such test"),
        ("tests/nowhere.py::test_no_such", "tests/nowhere.py, which does not exist"),
    ],
)
def test_a_test_that_is_not_there_is_an_error(test: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        notes.check_tests([dataclasses.replace(NOTE, tests=(test,))], ROOT)


def test_a_learning_rate_is_not_rounded_to_bfloat16_before_it_is_used() -> None:
    """What a note says, and its control: `optax.sgd` alone on bfloat16 gradients."""
    import jax.numpy as jnp
    import optax

    from lockstep.backends.flax_backend.backend import configure_determinism
    from lockstep.backends.flax_backend.optimizer import make_optimizer
    from lockstep.common.config import Config

    configure_determinism("cpu")

    def update_of(optimizer: Any) -> float:
        given = {"a": jnp.ones((), jnp.bfloat16)}
        return float(
            optimizer.update(given, optimizer.init(given), given, value=jnp.zeros(()))[0]["a"]
        )

    lr = 0.0101  # lies between two numbers of bfloat16
    exact = update_of(make_optimizer(Config(lr=lr, steps=1).resolve(8), jnp.dtype("bfloat16")))
    rounded = update_of(optax.with_extra_args_support(optax.sgd(lr)))
    assert exact == -np.float32(lr)
    assert abs(rounded / -lr - 1) > 1e-3

    rates = np.linspace(0.001, 0.1, 10_000)
    worst = np.abs(rates.astype(ml_dtypes.bfloat16).astype(np.float64) / rates - 1).max()
    assert 0.0035 < worst < 0.004, "off by up to 0.4 %"


# --- Alignment


def lines(*texts: str) -> list[Line]:
    return [Line(number, text) for number, text in enumerate(texts, 1)]


def kinds(
    torch: list[Line], flax: list[Line], **options: Any
) -> list[tuple[str, int | None, int | None]]:
    return [
        (r.kind, r.torch and r.torch.number, r.flax and r.flax.number)
        for r in align(torch, flax, **options)
    ]


def test_equal_lines_stand_next_to_each_other() -> None:
    torch = lines("def f(x: Tensor) -> Tensor:", "x = F.relu(self.fc1(x))", "x.zero_()", "return x")
    flax = lines("def f(x: jax.Array) -> jax.Array:", "x = nnx.relu(self.fc1(x))", "return x")
    assert kinds(torch, flax) == [
        ("similar", 1, 1),
        ("similar", 2, 2),
        ("torch", 3, None),
        ("same", 4, 3),
    ]
    assert kinds(flax, torch) == [
        ("similar", 1, 1),
        ("similar", 2, 2),
        ("flax", None, 3),
        ("same", 3, 4),
    ]


def test_lines_without_a_partner_share_a_row_and_are_called_unmatched() -> None:
    torch = lines("a = 1", "optimizer.zero_grad()", "b = 2")
    flax = lines("a = 1", "(key, value), _ = state", "more[0] += 5", "b = 2")
    assert kinds(torch, flax) == [
        ("same", 1, 1),
        ("unmatched", 2, 2),
        ("flax", None, 3),
        ("same", 3, 4),
    ]
    # control: a note ties them together
    assert kinds(torch, flax, together={(2, 3)})[1:3] == [("flax", None, 2), ("similar", 2, 3)]


def test_a_line_that_is_alone_has_no_partner_and_shares_no_row() -> None:
    torch, flax = lines("a = 1", "x.zero()", "b = g(2)"), lines("a = 1", "b = f(2)", "b = g(2)")
    assert kinds(torch, flax)[1] == ("unmatched", 2, 2)
    assert kinds(torch, flax, alone={"torch": {2}, "flax": {3}}) == [
        ("same", 1, 1),
        ("torch", 2, None),
        ("similar", 3, 2),
        ("flax", None, 3),
    ]


# --- Pins


def pinned_rows(backends: Any, name: str, these: Any = pins.PINS) -> list[alignment.Row]:
    """The rows of a pair of definitions with one name."""
    found = {side: backends[side][name] for side in BACKENDS}
    pinned = pins.locate(backends, these).get((name, name), pins.Pinned())
    return side_by_side.aligned(name, found, pinned)


def partner(rows: list[alignment.Row], snippet: str) -> tuple[str, str | None]:
    """The kind of the row of PyTorch's line with this text, and Flax's line in it."""
    [row] = [row for row in rows if row.torch and snippet in row.torch.text]
    return row.kind, row.flax and row.flax.text.strip()


def test_every_pin_pairs_its_lines_on_the_page() -> None:
    backends = sources.read_backends(ROOT)
    found = pins.locate(backends)
    assert sum(len(p.together) + sum(map(len, p.alone.values())) for p in found.values()) == len(
        pins.PINS
    )
    for (torch, flax), pinned in found.items():
        definitions = {"torch": backends["torch"][torch], "flax": backends["flax"][flax]}
        rows = side_by_side.aligned(torch, definitions, pinned)
        paired = {(r.torch.number, r.flax.number) for r in rows if r.torch and r.flax}
        assert pinned.together <= paired
        alone = [r for r in rows if r.kind == "torch" and r.torch and not r.flax]
        assert pinned.alone["torch"] <= {r.torch.number for r in alone if r.torch}


def test_to_clear_gradients_has_no_partner_in_jax() -> None:
    step = "backend.py:Backend._step"
    backends = sources.read_backends(ROOT)
    rows = pinned_rows(backends, step)
    assert partner(rows, "optimizer.zero_grad()") == ("torch", None)
    kind, flax = partner(rows, "loss.backward()")
    assert kind == "similar" and flax and "jax.value_and_grad(" in flax
    # control: nothing but the pins says so
    assert partner(pinned_rows(backends, step, ()), "loss.backward()")[0] != "similar"
    assert partner(pinned_rows(backends, step, ()), "optimizer.zero_grad()")[0] == "unmatched"


@pytest.mark.parametrize("side", BACKENDS)
def test_a_pin_whose_line_is_gone_is_named(side: str, house: Path) -> None:
    old, new = {
        "torch": ("loss.backward()", "(loss * 1).backward()"),
        "flax": ("= jax.value_and_grad(loss_of", "= jax.grad(loss_of"),
    }[side]
    pins.locate(sources.read_backends(house))  # the control
    replace(house / sources.FOLDERS[side] / "backend.py", old, new)
    with pytest.raises(SourceError, match=r"stands nowhere in backend\.py:Backend\._step"):
        pins.locate(sources.read_backends(house))


@pytest.mark.parametrize(
    ("pin", "said"),
    [
        (pins.both("backend.py:Backend._stop", "a", "b"), "torch has no backend.py:Backend._stop"),
        (pins.torch_only("backend.py:Backend._step", "optimizer"), "stands 4 times in"),
        (
            pins.Pin(
                notes.SourceLine("losses.py:cross_entropy", "F.cross_entropy"),
                notes.SourceLine("losses.py:upcast", "return"),
            ),
            "losses.py:cross_entropy and losses.py:upcast, no pair of outline.py",
        ),
    ],
    ids=["no such definition", "not the only line", "no pair"],
)
def test_a_pin_that_fits_nothing_is_refused(
    pin: pins.Pin, said: str, report: FaultsReport, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=re.escape(said)):
        write_read_page(tmp_path / "read.html", ROOT, report, NAMES, NOTES, [pin])
    assert not (tmp_path / "read.html").exists()


def test_pins_that_cross_are_refused() -> None:
    step = "backend.py:Backend._step"
    crossing = [
        pins.both(step, "loss.backward()", "self.optimizer.update("),
        pins.both(step, "optimizer.step()", "jax.value_and_grad("),
    ]
    backends = sources.read_backends(ROOT)
    pinned_rows(backends, step, crossing[:1])  # the control
    with pytest.raises(SourceError, match=r"_step crosses another one: change pins\.py"):
        pinned_rows(backends, step, crossing)


def test_every_line_stands_in_the_table_once_and_in_order() -> None:
    backends = sources.read_backends(ROOT)
    for name in backends["torch"].keys() & backends["flax"].keys():
        sides = [backends[side][name].lines for side in BACKENDS]
        rows = align(sides[0], sides[1])
        assert tuple(row.torch for row in rows if row.torch) == sides[0]
        assert tuple(row.flax for row in rows if row.flax) == sides[1]
        for row in rows:
            if row.kind == "same":
                assert row.torch and row.flax and row.torch.text == row.flax.text


def test_a_comment_is_not_like_code_and_a_line_is_most_like_itself() -> None:
    assert similarity("# x = relu(x)", "x = relu(x)") == 0
    assert similarity("x = relu(x)", "x = relu(x)") == 1
    assert similarity("x = F.relu(self.fc1(x))", "x = nnx.relu(self.fc1(x))") > alignment.SIMILAR
    assert (
        similarity("optimizer.zero_grad()", "parameters, model_state = state") < alignment.SIMILAR
    )


def test_what_differs_within_two_lines_is_underlined_and_only_that() -> None:
    definition = sources.Definition("", tuple(lines("x = F.relu(x)", "x = nnx.relu(x)")))
    tokens = alignment.highlight(definition)
    one, other = alignment.differing(tokens[1], tokens[2])
    assert ([tokens[1][place][1] for place in one], [tokens[2][place][1] for place in other]) == (
        ["F"],
        ["nnx"],
    )
    assert str(alignment.markup(tokens[1], one)).count("x") > 0
    assert '<span class="x">F</span>' in alignment.markup(tokens[1], one)
    assert alignment.differing(tokens[1], tokens[1]) == (set(), set())


@pytest.mark.parametrize("side", BACKENDS)
def test_highlighting_keeps_every_letter(side: str) -> None:
    for definition in sources.read_backends(ROOT)[side].values():
        tokens = alignment.highlight(definition)
        for line in definition.lines:
            assert "".join(text for _, text in tokens[line.number]) == line.text


# --- The page


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_no_reason_on_the_page_refers_to_what_stands_elsewhere(page: str) -> None:
    assert "As above" not in page
    assert any(
        pair.why.startswith("As above") for section in outline.SECTIONS for pair in section.pairs
    )
    assert page.count("Flax only. In PyTorch, <code>nn.Linear</code>: its kernels sum in") == 1


@pytest.mark.parametrize("name", alignment.HIGHLIGHT)
def test_highlighted_code_can_be_read_in_light_and_dark(name: str) -> None:
    for colour, grounds in zip(alignment.HIGHLIGHT[name], GROUNDS, strict=True):
        assert min(contrast(colour, ground) for ground in grounds) >= AA


def test_the_contrast_sees_colours_that_cannot_be_read(page: str) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#8a1c5c", GROUNDS[1][0]) < AA  # light's colour on dark ground
    for ground in (colour for grounds in GROUNDS for colour in grounds):
        assert ground in page, "the grounds are those of the page"


class Outline(html.parser.HTMLParser):
    """Headings, ids and links of a page, and which elements ask the network for something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.ids += [value for value in [given.get("id")] if value]
        link = given.get("href") or given.get("src") or ""
        self.links += [link.removeprefix("#")] * (tag == "a" and link.startswith("#"))
        page_of_the_folder = tag == "a" and "/" not in link and ":" not in link
        self.fetched += [tag] * (
            tag == "script"
            or (bool(link) and not link.startswith(("#", "data:")) and not page_of_the_folder)
        )


def test_headings_go_down_one_level_at_a_time_and_links_lead_somewhere(page: str) -> None:
    outline = Outline(page)
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.links) <= set(outline.ids)
    assert outline.fetched == []
    assert "url(" not in page and "@import" not in page


def test_every_section_every_note_and_every_fault_is_on_the_page_with_its_numbers(
    page: str, report: FaultsReport
) -> None:
    ids = Outline(page).ids
    assert {section.key for section in outline.SECTIONS} <= set(ids)
    assert {f"note-{number}" for number in range(1, len(NOTES) + 1)} <= set(ids)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))
    cells = re.sub(r"<[^>]+>", "", page.replace("</td>", "|"))
    for name in {fault for note in NOTES for fault in note.faults}:
        assert f"fault-{name}" in ids
        [row] = [row for row in report["rows"] if row["name"] == name]
        caught = {dtype: found for dtype, found in row["lenses"].items() if found["caught"]}
        for dtype, finding in caught.items():
            tensor = ", ".join(dict.fromkeys([finding["stage"], finding["tensor"]]))
            gap = "undefined" if finding["gap"] is None else f"{finding['gap']:.2g}"
            assert f"{dtype}|{finding['step']:,}|{tensor}|\n{gap}|" in cells
            if dtype == next(iter(caught)):  # the note has the first, the table all
                assert f"{dtype}: step {finding['step']}, {tensor}, gap {gap} (" in text


@pytest.mark.slow
def test_the_numbers_of_a_fault_are_those_of_its_report(
    report: FaultsReport, tmp_path: Path
) -> None:
    changed: Any = copy.deepcopy(report)
    [row] = [row for row in changed["rows"] if row["name"] == "flatten-order"]
    row["lenses"]["float64"] |= {"step": 4321, "gap": 0.0098, "gap_over_bound": 98765.0}
    text = write_read_page(tmp_path / "read.html", ROOT, changed, NAMES).read_text("utf-8")
    assert "step 4,321, forward, input of fc1, gap 0.0098 (98,765 times the bound)" in re.sub(
        r"\s+", " ", text
    )


def test_a_changed_source_changes_the_page_and_is_escaped(
    house: Path, page: str, report: FaultsReport
) -> None:
    replace(
        house / "backends/torch_backend/models/net.py",
        "return self.fc3(x)",
        'return "<b>&" or self.fc3(x)',
    )
    text = write_read_page(house / "read.html", house, report, NAMES).read_text("utf-8")
    assert "&lt;b&gt;&amp;" in text and "<b>&" not in text
    assert "&lt;b&gt;&amp;" not in page


@pytest.mark.slow
def test_equal_sources_and_reports_give_equal_bytes(
    page: str, report: FaultsReport, tmp_path: Path
) -> None:
    again = write_read_page(tmp_path / "again.html", ROOT, report, sorted(NAMES))
    assert again.read_text("utf-8") == page


def words_of(page: str) -> str:
    """What a page says, without its markup, which another release of a library may write
    otherwise."""
    return html.unescape(re.sub(r"<style.*?</style>|<[^>]*>", "", page, flags=re.DOTALL))


def without_colours(page: str) -> str:
    """A page without the spans of its words of code, which another release of Pygments may colour
    otherwise."""
    return re.sub(r"</?span[^>]*>", "", page)


def test_the_committed_page_is_made_from_the_sources_and_the_evidence_as_they_are(
    page: str,
) -> None:
    committed = (ROOT / "results" / "read" / "read.html").read_text("utf-8")
    assert without_colours(committed) == without_colours(page), (
        "make it again: python compare.py learn --out results/read"
    )
    for old, new in (("dampening", "damping"), (".note {", ".notes {"), ("<h3", "<h4")):
        assert without_colours(page.replace(old, new)) != without_colours(page)  # the control


@pytest.mark.slow
def test_the_page_can_be_read_by_everyone_on_every_screen(
    page: str, browser: Any, tmp_path: Path
) -> None:
    file = tmp_path / "read.html"
    file.write_text(page, encoding="utf-8")
    assert examine(browser, file) == []


def test_the_page_is_short_until_its_folds_are_opened(
    page: str, browser: Any, tmp_path: Path
) -> None:
    file = tmp_path / "read.html"
    file.write_text(page, encoding="utf-8")
    with browser.new_context(viewport={"width": 1440, "height": HEIGHT}) as context:
        shown = context.new_page()
        shown.goto(file.as_uri())
        height = "() => document.documentElement.scrollHeight"
        assert HEIGHT < shown.evaluate(height) <= MAX_SCREENS * HEIGHT
        shown.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true })")
        assert shown.evaluate(height) > MAX_SCREENS * HEIGHT  # the control
