"""The page in headless Chromium: drawn, quiet, sortable, and loading nothing."""

from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from reports.page import build_page, write_page
from reports.page.document import render
from reports.store import Folder
from tests.reports.page.campaigns import DYVTE, Exiting, add_changes, make_judged
from tests.reports.runs import MODES, make_sweep, sweep_manifest

pytestmark = pytest.mark.browser


class Opened(NamedTuple):
    """A page in the browser, what it said to the console, and what it asked for."""

    page: Any
    said: list[str]
    asked: list[str]


def open_page(
    chromium: Any, folder: Folder, *, name: str = "report.html", scheme: str = "light", width: int = 1200
) -> Opened:
    context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    opened = Opened(context.new_page(), [], [])
    opened.page.on("console", lambda message: opened.said.append(message.text))
    opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.page.on("request", lambda request: opened.asked.append(request.url))
    opened.page.goto((folder.local_path / name).as_uri())  # type: ignore[operator]
    opened.page.wait_for_function("document.documentElement.dataset.drawn", timeout=30_000)
    return opened


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = make_sweep(tmp_path_factory.mktemp("runs") / "a sweep", samples=3)
    write_page(folder)
    return folder


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    # Beside the front's cheapest plan two more, whose names would lie on its name.
    crowd = [Exiting(f"dyvte-{place}", place / 10, 0.3 + place / 500, 0.5 + place / 200) for place in range(1, 4)]
    folder = make_judged(tmp_path_factory.mktemp("runs") / "a campaign", failed=3, learned=[*DYVTE, *crowd])
    add_changes(folder)
    write_page(folder)
    return folder


# A chart is drawn when its picture has marks: shapes in an SVG, more than one colour in a canvas.
DRAWN = """place => {
  const svg = place.querySelector("svg");
  if (svg) return svg.querySelectorAll("[role='graphics-symbol'], path, rect").length;
  const canvas = place.querySelector("canvas");
  const pixels = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return new Set(pixels).size;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["sweep", "campaign"])
def test_every_chart_is_drawn_without_a_word_or_a_request(
    chromium: Any, kind: str, scheme: str, request: pytest.FixtureRequest
) -> None:
    folder: Folder = request.getfixturevalue(kind)
    opened = open_page(chromium, folder, scheme=scheme)
    places = opened.page.query_selector_all("[data-chart]")
    assert len(places) == opened.page.locator("figure").count() >= 4
    for place in places:
        assert place.evaluate(DRAWN) > 5 and place.bounding_box()["height"] > 40
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:image/jpeg")] == [opened.page.url]
    opened.page.context.close()


def test_a_page_without_results_and_a_comparison_open_quietly(chromium: Any, tmp_path: Path, sweep: Folder) -> None:
    running = Folder(tmp_path / "running")
    sweep_manifest(samples=3, layers=5, modes=MODES[:1], state="running", counts={}, finished=None).save(running)
    write_page(running)
    opened = open_page(chromium, running)
    assert opened.said == [] and opened.page.title().startswith("[running]")
    assert "is not finished" in opened.page.locator(".warning").first.inner_text()
    other = make_sweep(tmp_path / "other", seed=1)
    other.write_bytes("against.html", render(build_page(other, against=sweep)))
    opened = open_page(chromium, other, name="against.html")
    assert opened.said == [] and opened.page.locator("#chart-against svg").count() == 1


def test_tables_sort_by_mouse_and_by_keyboard(chromium: Any, sweep: Folder) -> None:
    page = open_page(chromium, sweep).page
    page.locator("figure:has(#chart-lc) summary").click()
    table = page.locator("figure:has(#chart-lc) table")
    head = table.locator("th", has_text="LC (nats)")

    def values() -> list[float]:
        cells = table.locator("tbody td:nth-child(4)")
        return [float(cell.get_attribute("data-v")) for cell in cells.all()]

    before = values()
    head.locator("button").click()
    assert values() == sorted(before) != before and head.get_attribute("aria-sort") == "ascending"
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert values() == sorted(before, reverse=True) and head.get_attribute("aria-sort") == "descending"
    # The layers are numbers, and 10 comes after 9.
    table.locator("th button").nth(1).click()
    layers = [int(text) for text in table.locator("tbody td:nth-child(2)").all_inner_texts()]
    assert layers == sorted(layers)


@pytest.mark.parametrize("kind", ["sweep", "campaign"])
def test_every_link_leads_to_a_file(chromium: Any, kind: str, request: pytest.FixtureRequest) -> None:
    folder: Folder = request.getfixturevalue(kind)
    page = open_page(chromium, folder).page
    hrefs = {link.evaluate("link => link.href") for link in page.locator("a[download]").all()}
    there = {(folder.local_path / name).as_uri() for name in folder.list()}  # type: ignore[operator]
    assert hrefs and hrefs <= there
    if kind == "campaign":
        assert any("/answers/" in href for href in hrefs)
        return
    assert "<script>alert(1)</script>" in page.locator("h1").inner_text()
    page.locator("figure:has(#chart-lc) summary").click()
    with page.expect_download() as download:
        page.locator("figure:has(#chart-lc) .files a").click()
    assert Path(download.value.path()).read_bytes() == folder.read_bytes("lc_layers.parquet")


# Where names stand in a chart, and whether its legend is inside its picture.
NAMES = """svg => Array.from(svg.querySelectorAll("g.mark-text.role-mark text:not([opacity='0'])"), text => {
  const { left, top, right, bottom } = text.getBoundingClientRect();
  return [text.textContent, left, top, right, bottom];
})"""
LEGEND = """svg => {
  const [whole, legend] = [svg, svg.querySelector("g.role-legend")].map(place => place.getBoundingClientRect());
  return legend.left >= whole.left && legend.top >= whole.top && legend.right <= whole.right;
}"""


@pytest.mark.parametrize("width", [1200, 700, 400])
def test_names_are_apart_and_legends_whole_at_every_width(chromium: Any, campaign: Folder, width: int) -> None:
    page = open_page(chromium, campaign, width=width).page
    names = page.locator("#chart-accuracy-0 svg").evaluate(NAMES)
    assert len(names) >= 3 and {"full", "lc-2"} <= {name for name, *_ in names}
    for (one, *own), (other, *its) in combinations(names, 2):
        crossing = own[0] < its[2] and its[0] < own[2] and own[1] < its[3] and its[1] < own[3]
        assert not crossing, f"{one} and {other}"
    for key in ("accuracy-0", "speed-0", "plans-0"):
        assert page.locator(f"#chart-{key} svg").evaluate(LEGEND), key


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_changed_answers_are_filtered_and_shown_little_by_little(chromium: Any, campaign: Folder, scheme: str) -> None:
    opened = open_page(chromium, campaign, scheme=scheme)
    page, cards = opened.page, opened.page.locator(".card")
    form, found, more = page.locator("#filters"), page.locator("#found"), page.locator("#more")
    assert cards.count() == 20 and found.inner_text() == "30 questions, 210 changed answers"
    # By keyboard, the focus goes on at the first of the new cards.
    more.focus()
    page.keyboard.press("Enter")
    assert cards.count() == 30 and more.is_hidden()
    assert cards.nth(20).evaluate("card => card === document.activeElement")
    form.get_by_label("plan").select_option("lc-2")
    assert cards.count() == 20 and found.inner_text() == "30 questions, 30 changed answers"
    # Worse ones come first.
    assert cards.locator(".change").all_inner_texts()[:11] == ["worse"] * 10 + ["better"]
    form.get_by_label("kind").select_option("colour")
    form.get_by_label("change").select_option("better")
    assert found.inner_text() == "5 questions, 5 changed answers" and more.is_hidden()
    rows = cards.nth(0).locator("tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [
        ["target", "red", "", ""],
        ["full model", "blue", "0.5", ""],
        ["lc-2", "lc-2 says 1", "1", "better"],
    ]
    image = cards.nth(0).locator("img")
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    assert opened.said == [] and opened.asked[0] == page.url
    assert all(url.startswith("data:image/jpeg") for url in opened.asked[1:])
    narrow = open_page(chromium, campaign, width=380).page
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 380


def test_it_follows_the_colour_scheme_and_narrow_screens(chromium: Any, sweep: Folder) -> None:
    page = open_page(chromium, sweep).page
    colours = """[getComputedStyle(document.body).backgroundColor,
      document.querySelector("#chart-lc text")?.getAttribute("fill")]"""
    light = page.evaluate(colours)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"before => {colours}.every((colour, i) => colour && colour !== before[i])", arg=light)
    narrow = open_page(chromium, sweep, width=380).page
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 380


def test_the_policy_stops_what_a_run_might_smuggle_in(chromium: Any, sweep: Folder) -> None:
    opened = open_page(chromium, sweep)
    outcome = opened.page.evaluate(
        """async () => {
          const found = await fetch("http://127.0.0.1:9/").then(() => "loaded", () => "stopped");
          const script = document.createElement("script");
          script.textContent = "window.smuggled = true";
          document.body.append(script);
          return [found, window.smuggled ?? "stopped"];
        }"""
    )
    assert outcome == ["stopped", "stopped"]
    assert any("Content Security Policy" in line for line in opened.said)


def test_the_page_of_a_large_sweep_is_drawn(chromium: Any, tmp_path: Path) -> None:
    folder = make_sweep(tmp_path, samples=10_000, layers=32, modes=MODES)
    write_page(folder)
    opened = open_page(chromium, folder)
    # An idle machine takes 1.5 s.
    print(f"drawn in {opened.page.evaluate('document.documentElement.dataset.drawn')} ms")
    assert opened.said == []
