"""The download service in headless Chromium: a list that leads to pages and files, with a key and without a word."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reports.page import write_page
from tests.reports.runs import MODES, make_campaign, make_sweep, make_training, sweep_manifest

pytestmark = pytest.mark.browser
REPOSITORY = Path(__file__).resolve().parents[2]
KEY = "a-key-of-24-characters-x"
BEARER = {"authorization": f"Bearer {KEY}"}
PORT = 18099


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    for folder in (make_sweep(root / "a sweep", samples=40), make_campaign(root / "team" / "campaign", failed=3)):
        write_page(folder)
    sweep_manifest(samples=3, layers=5, modes=MODES[:1], state="running", counts={}, finished=None).save(
        make_sweep(root / "half", samples=3)
    )
    make_training(root / "team" / "training")
    (root / "a sweep" / "samples.parquet").write_bytes(b"PAR1 cut short")
    (root / "a sweep" / "plans" / "cut.json").write_text("{")
    (root / "keys").write_text(f"{KEY}\n")
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    command = [sys.executable, "jobs/report.py", "--serve", str(root), "--port", str(PORT)]
    with subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--api-key-file", str(root / "keys")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    ) as service:
        assert service.stdout is not None
        assert f"http://127.0.0.1:{PORT}/" in service.stdout.readline()
        yield f"http://127.0.0.1:{PORT}/"
        service.terminate()
        assert service.wait(300) == 0


class Visit:
    """A browser window of somebody with a key, what it said, and what it asked for."""

    def __init__(self, chromium: Any, address: str) -> None:
        context = chromium.new_context(http_credentials={"username": "anybody", "password": KEY})
        self.page = context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.status = self.page.goto(address).status


def test_the_list_leads_to_a_page_whose_charts_are_drawn(chromium: Any, address: str) -> None:
    visit = Visit(chromium, address)
    assert visit.status == 200
    headings = visit.page.locator("h2").all_inner_texts()
    assert len(headings) == 4 and any("running" in heading for heading in headings)
    assert visit.page.locator("h2 a", has_text="training").count() == 0
    assert "cut short" in visit.page.content() or "not a whole Parquet file" in visit.page.content()
    visit.page.locator("h2 a", has_text="team/campaign").click()
    visit.page.wait_for_function("document.documentElement.dataset.drawn", timeout=30_000)
    assert visit.page.locator("[data-chart] svg, [data-chart] canvas").count() >= 4
    head = visit.page.locator("details:has(th button)").first
    head.locator("summary").click()
    head.locator("th button").first.click()
    assert head.locator("th[aria-sort]").count() >= 1
    assert visit.said == []
    assert all(url.startswith(address) or url.startswith(("data:", "blob:")) for url in visit.asked), visit.asked


def test_a_table_is_downloaded_and_read_back(chromium: Any, address: str, root: Path, tmp_path: Path) -> None:
    visit = Visit(chromium, address)
    run = visit.page.locator("article", has_text="team/campaign")
    run.locator("summary").click()
    with visit.page.expect_download() as found:
        run.locator("a", has_text="answers").first.click()
    saved = tmp_path / "answers.parquet"
    found.value.save_as(saved)
    original = next((root / "team" / "campaign" / "answers").glob("*.parquet"))
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in original.parent.glob("*.parquet")}
    assert hashlib.sha256(saved.read_bytes()).hexdigest() in digests
    assert pq.read_table(saved).num_rows > 0
    assert visit.said == []


def test_a_page_of_the_service_links_to_its_files(chromium: Any, address: str, root: Path) -> None:
    visit = Visit(chromium, f"{address}runs/team/campaign/")
    visit.page.wait_for_function("document.documentElement.dataset.drawn", timeout=30_000)
    links = {link.evaluate("link => link.href") for link in visit.page.locator("a[href$='.parquet']").all()}
    assert links
    for link in links:
        found = visit.page.request.get(link, headers=BEARER)
        assert found.status == 200 and found.body()[:4] == b"PAR1", link
    figure = visit.page.locator("figure", has=visit.page.locator("a[href$='speed.parquet']")).first
    figure.locator("summary").click()
    with visit.page.expect_download() as download:
        figure.locator("a[href$='speed.parquet']").click()
    assert Path(download.value.path()).read_bytes() == (root / "team" / "campaign" / "speed.parquet").read_bytes()


def test_what_is_damaged_has_no_link_and_stands_on_the_page(chromium: Any, address: str) -> None:
    visit = Visit(chromium, address)
    run = visit.page.locator("article", has_text="a sweep")
    assert "plan cut (a sweep/plans/cut.json" in run.inner_text()
    links = [link.get_attribute("href") for link in run.locator("a[download]").all()]
    assert links and all(visit.page.request.get(address + str(link), headers=BEARER).status == 200 for link in links)
    run.locator("h2 a").click()
    visit.page.wait_for_function("document.documentElement.dataset.drawn", timeout=30_000)
    said = visit.page.locator("p.warning[role=status]").all_inner_texts()
    assert any("samples.parquet is not a whole Parquet file" in line for line in said), said
    assert visit.said == []


def test_without_the_key_there_is_nothing(chromium: Any, address: str) -> None:
    page = chromium.new_context().new_page()
    for path in ("", "runs.json", "runs/team/campaign/"):
        found = page.request.get(address + path)
        assert found.status == 401 and "campaign" not in found.text()
