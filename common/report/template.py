"""HTML pages, each one file that opens from disk and needs no network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.common.system.storage import write_atomic

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")
NUMBER = re.compile(r"-?\d[\d.,]*(?:e[+-]\d+| %)")


def write_page(path: Path, template: str, **values: object) -> Path:
    """Fill one of `templates/` and write it to `path`, whole or not at all.

    Text is escaped unless it is `Markup`. A name that the template uses and `values` lacks is an
    error.

    Raises:
        RecordError: if the file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["numbers"] = keep_numbers
    write_atomic(path, environment.get_template(template).render(**values).encode())
    return path


def keep_numbers(text: str) -> Markup:
    """`text`, escaped, in which no line breaks within a number such as `6.4e-02` or `42 %`."""
    from markupsafe import Markup, escape

    return Markup(NUMBER.sub(r'<span class="n">\g<0></span>', str(escape(text))))
