"""Write the HTML page of a sweep or campaign folder, which opens offline; or serve a folder of such folders.

    python jobs/report.py runs/demo
    python jobs/report.py runs/campaign --output /tmp/campaign.html
    python jobs/report.py runs/new --against runs/old
    python jobs/report.py --serve runs

Without --output the page is FOLDER/report.html, with --against FOLDER/report-against.html; its links lead to the
Parquet files beside it. A run that is not finished gets a page that says so.
With --serve FOLDER is the folder, or object-store URI, above the runs: their list, pages and tables are served until
SIGTERM or Ctrl-C. A key is sent as `Authorization: Bearer KEY`, or by a browser as the password to any name.
Exit status: 0 the page is there or serving has ended, 1 it could not be written, 2 refused.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

if not __package__:  # run as a script, perhaps in a Ray working directory where nothing is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from jobs.common import option, place_of, run
from reports.page import PAGE_NAME
from reports.store import Folder
from shortv.errors import Refused, ShortVError, one_line
from shortv.workers.run import check_output

AGAINST_NAME = "report-against.html"
# What code raises for values of types or sizes that no job writes.
FOREIGN_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@click.command(help=(__doc__ or "").replace("\n\n", "\n\n\b\n"))
@click.argument("folder")
@option("--output", "--output-path", "--output_path", help="File or URI of the page.  [default: FOLDER/report.html]")
@option("--against", help="Another folder of the same kind to compare with.")
@option("--serve", is_flag=True, help="Serve the runs below FOLDER instead.")
@option("--host", help="With --serve: [default: 127.0.0.1 without --api-key-file, 0.0.0.0 with it]")
@option("--port", type=click.IntRange(1, 65535), help="With --serve: [default: 8080]")
@option("--api-key-file", help="With --serve: file with one accepted API key per line.")
def main(folder: str, output: str | None, against: str | None, serve: bool, **serving: Any) -> int:
    if serve:
        if output or against:
            raise click.UsageError("--output and --against write a page; leave them out with --serve.")
        from reports.service import run_service

        return run_service(folder, **serving, say=click.echo)
    if any(value is not None for value in serving.values()):
        raise click.UsageError("--host, --port and --api-key-file need --serve.")
    check_output(output or folder, "--output" if output else "FOLDER")
    source = Folder(folder)
    name = PAGE_NAME if against is None else AGAINST_NAME
    target, name = place_of(output, name) if output is not None else (source, name)
    # The page's libraries take a second to import, and --help needs none of them.
    from reports.page import build_page
    from reports.page.document import render

    try:
        page = build_page(source, against=Folder(against) if against else None, links=links(source, target))
        content = render(page)
    except (ShortVError, *FOREIGN_ERRORS) as error:
        # No work has started, so that a folder that cannot be read is refused.
        if isinstance(error, ShortVError):
            raise Refused(str(error)) from error
        problem = f"{source.shown} contains what no job writes ({type(error).__name__}: {one_line(error)})"
        raise Refused(f"{problem}; give a folder as its job left it") from error
    target.write_bytes(name, content)
    state = "" if page.state == "complete" else f", of a run that is {page.state}"
    click.echo(f"written to {target.shown}/{name}{state}")
    return 0


def links(source: Folder, target: Folder) -> str | None:
    """Return the way from the page to the run's files, None where one of them is not a local folder."""
    if source is target:
        return ""
    if source.local_path is None or target.local_path is None:
        return None
    way = os.path.relpath(source.local_path.resolve(), target.local_path.resolve())
    return "" if way == "." else quote(way) + "/"


if __name__ == "__main__":
    run(main)
