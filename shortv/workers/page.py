"""The page of a finished run, which its results don't depend on."""

from __future__ import annotations

from rich.console import Console

from reports.page import PAGE_NAME, write_page
from reports.store import Folder
from shortv.errors import ShortVError


def write_report(folder: Folder, console: Console, *, anew: bool) -> None:
    """Write the page beside the tables, also where an earlier end of the run did not get to it.

    A page that cannot be written is a warning: the tables are whole without it, and jobs/report.py makes it later.
    """
    if anew or not folder.exists(PAGE_NAME):
        try:
            write_page(folder)
        except ShortVError as error:
            console.print(f"Warning: no page was written: {error}", markup=False, highlight=False, soft_wrap=True)
            return
    console.print(f"the page is {folder.shown}/{PAGE_NAME}", markup=False, highlight=False, soft_wrap=True)
