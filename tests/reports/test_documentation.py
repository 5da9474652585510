"""Tables and columns are documented in one place, and the page of them is up to date."""

from reports.documentation import PAGE, tables_page
from reports.fields import TABLES
from reports.schemas import SCHEMAS


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == tables_page(), "run `make docs`"


def test_every_column_of_every_schema_is_documented() -> None:
    page = tables_page()
    for name, schema in SCHEMAS.items():
        assert [field.name for field in TABLES[name].fields] == schema.names
        assert all(f"| `{column}` |" in page for column in schema.names)
        assert all(field.meaning.endswith(".") and "|" not in field.meaning for field in TABLES[name].fields)
        assert schema.metadata[b"shortv_table"] == name.encode()


def test_nulls_are_allowed_where_the_documentation_says() -> None:
    assert SCHEMAS["samples"].field("answer").nullable and not SCHEMAS["samples"].field("prompt").nullable
    assert str(SCHEMAS["calibration"].field("images").type) == "list<item: binary>"
    assert not SCHEMAS["answers"].field("scores").nullable
