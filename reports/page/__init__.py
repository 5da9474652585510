"""The HTML page of a sweep or campaign folder: one file that opens offline.

`build_page` reads a folder (`sweep_data`, `campaign_data`) and lays it out (`sweep`, `campaign`, `against`, with what
their `charts` share) as a `document.Page`; `document.render` makes one file of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from reports.manifest import MANIFEST_NAME
from reports.store import Folder
from shortv.errors import Refused

if TYPE_CHECKING:
    from reports.page.document import Page, Section

PAGE_NAME = "report.html"


def write_page(folder: Folder) -> None:
    """Write the page of a result folder into it, atomically; a driver calls this after its last manifest.

    Raises:
        Refused: the folder is not a run, is damaged, or has another schema.
        ShortVError: a file cannot be read, or the page cannot be written.
    """
    from reports.page.document import render

    folder.write_bytes(PAGE_NAME, render(build_page(folder)))


def build_page(folder: Folder, *, against: Folder | None = None, links: str | None = "") -> Page:
    """Read a result folder and lay out its page, with a comparison if another folder is given.

    `links` is the path from the page to the folder, with a slash at its end; None if the files cannot be linked.

    Raises:
        Refused: one of the folders is not a run, is damaged, contradicts itself or has another schema, or the two
            cannot be compared.
        ShortVError: a file cannot be read.
    """
    # The charts' library takes a second to import.
    from reports.page.against import compare_campaigns, compare_sweeps
    from reports.page.campaign import campaign_page
    from reports.page.campaign_data import read_campaign_data
    from reports.page.sweep import sweep_page
    from reports.page.sweep_data import read_sweep_data

    kind = kind_of(folder)
    if against is not None and kind_of(against) != kind:
        raise Refused(f"{folder.shown} is a {kind}, {against.shown} a {kind_of(against)}; compare two of a kind")
    compared: list[Section] = []
    if kind == "sweep":
        sweep = read_sweep_data(folder)
        page = sweep_page(sweep)
        compared += compare_sweeps(sweep, folder, against) if against else []
    else:
        campaign = read_campaign_data(folder)
        page = campaign_page(campaign)
        compared += compare_campaigns(campaign, folder, against) if against else []
    return replace(page, links=links, sections=[*compared, *page.sections])


def kind_of(folder: Folder) -> str:
    """Return `sweep` or `campaign`. Raises Refused for a folder that is neither, ShortVError for damage."""
    if not folder.exists(MANIFEST_NAME):
        raise Refused(
            f"{folder.shown} has no {MANIFEST_NAME}; give an output folder of jobs/lc_sweep.py or jobs/campaign.py"
        )
    kind = folder.read_json(MANIFEST_NAME).get("kind")
    if kind not in ("sweep", "campaign"):
        raise Refused(f"{folder.shown}/{MANIFEST_NAME} is of kind {kind!r}, not 'sweep' or 'campaign'")
    return str(kind)
