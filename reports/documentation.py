"""TABLES.md, the page of every result table and column; `python -m reports.documentation` writes it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from reports.fields import TABLES, TableDoc
from reports.schemas import SCHEMA_VERSION

PAGE: Final = Path(__file__).with_name("TABLES.md")
_HEAD: Final = f"""# Result tables

Made from `reports/fields.py` by `python -m reports.documentation`, as are the Arrow schemas.
Every file is Parquet with schema version {SCHEMA_VERSION} in its metadata (`schema_version`, `shortv_table`).
A type with `?` may be null. No result table contains images.
"""


def tables_page() -> str:
    """Return the text of TABLES.md."""
    return "\n".join([_HEAD, *(line for name, table in TABLES.items() for line in _section(name, table))])


def _section(name: str, table: TableDoc) -> Iterator[str]:
    files = f"`{table.files}`" if table.files.endswith(".parquet") else table.files
    yield from (f"## {name}", "", f"{table.row} File: {files}.", "", "| column | type | meaning |", "|---|---|---|")
    for field in table.fields:
        yield f"| `{field.name}` | {field.kind} | {field.meaning} |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(tables_page(), "utf-8")
