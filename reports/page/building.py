"""The page of a result folder, whichever kind of run it holds."""

from reports.manifest import MANIFEST_NAME
from reports.page.campaign import campaign_page
from reports.page.campaign_data import read_campaign_data
from reports.page.document import Page
from reports.page.sweep import sweep_page
from reports.page.sweep_data import read_sweep_data
from reports.store import Folder
from shortv.errors import Refused


def build_page(folder: Folder, *, against: Folder | None = None, links: str | None = "") -> Page:
    """Read a result folder and lay out its page, with a comparison where another folder is given.

    `links` is the path from the page to the folder, with a slash at its end; None where there is no way.

    Raises:
        Refused: one of them is no run, is damaged, contradicts itself or is of another schema, or they do not compare.
        ShortVError: a file cannot be read.
    """
    kind = kind_of(folder)
    if against is not None and kind_of(against) != kind:
        raise Refused(f"{folder.shown} holds a {kind}, {against.shown} a {kind_of(against)}; compare two of a kind")
    if kind == "sweep":
        data = read_sweep_data(folder)
        if against is None:
            return sweep_page(data, links=links)
        from reports.page.against import compare_sweeps

        return sweep_page(data, links=links, compared=compare_sweeps(data, folder, against))
    campaign = read_campaign_data(folder)
    if against is None:
        return campaign_page(campaign, links=links)
    from reports.page.against import compare_campaigns

    return campaign_page(campaign, links=links, compared=compare_campaigns(campaign, folder, against))


def kind_of(folder: Folder) -> str:
    """Return `sweep` or `campaign`. Raises Refused for a folder that holds neither, ShortVError for damage."""
    if not folder.exists(MANIFEST_NAME):
        raise Refused(
            f"{folder.shown} holds no {MANIFEST_NAME}; give an output folder of jobs/lc_sweep.py or jobs/campaign.py"
        )
    kind = folder.read_json(MANIFEST_NAME).get("kind")
    if kind not in ("sweep", "campaign"):
        raise Refused(f"{folder.shown}/{MANIFEST_NAME} is of kind {kind!r}, neither 'sweep' nor 'campaign'")
    return str(kind)
