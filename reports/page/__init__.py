"""The HTML page of a sweep or campaign folder: one file that opens offline."""

from reports.store import Folder

PAGE_NAME = "report.html"


def write_page(folder: Folder) -> None:
    """Write the page of a result folder into it, atomically; a driver calls this after its last manifest.

    Raises:
        Refused: the folder holds no run, or one that is damaged or of another schema.
        ShortVError: a file cannot be read or the page not be written.
    """
    # Plotting takes a second to import, and a driver needs it once, at its end.
    from reports.page.building import build_page
    from reports.page.rendering import render

    folder.write_bytes(PAGE_NAME, render(build_page(folder)))
