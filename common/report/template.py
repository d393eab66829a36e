"""HTML pages, each one file that opens from disk and needs no network."""

from __future__ import annotations

from pathlib import Path

from lockstep.common.system.storage import write_atomic

TEMPLATES = Path(__file__).with_name("templates")


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
    write_atomic(path, environment.get_template(template).render(**values).encode())
    return path
