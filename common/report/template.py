"""Pages: one HTML file each, which opens from disk and asks the network for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lockstep.common.system.storage import write_atomic

TEMPLATES = Path(__file__).with_name("templates")


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Fill one of `templates/` and keep it as `path`, whole or not at all.

    Everything but what is marked as markup is escaped; a name that a template asks for and `values`
    lacks is an error.

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
