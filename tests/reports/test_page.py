"""The page of a sweep or campaign, without a browser: what it says, and that it is safe to open."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.campaign import main as campaign_job
from jobs.lc_sweep import main as sweep_job
from reports.page import build_page, write_page
from reports.page.campaign_charts import pareto_front
from reports.page.campaign_data import Point
from reports.page.ran import command_of
from reports.page.rendering import render
from reports.page.sweep_charts import heat_chart
from reports.store import Folder
from shortv.plan import Mode
from tests.reports.runs import campaign_manifest, make_campaign, make_sweep, sweep_manifest


class Read(HTMLParser):
    """Collects what the tests look at."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self._open == "script" else self.text).append(data)

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Folder) -> str:
    write_page(folder)
    return folder.read_bytes("report.html").decode()


def charts_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)
    assert found
    charts: dict[str, Any] = json.loads(found[1])
    return charts


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(make_sweep(tmp_path_factory.mktemp("sweep"), samples=3))


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(make_campaign(tmp_path_factory.mktemp("campaign"), failed=3))


def test_a_sweep_has_its_charts_each_with_its_numbers(sweep: str) -> None:
    modes = ("freeze-visual", "freeze-text")
    assert set(charts_of(sweep)) == {"lc", "plans", *(f"{kind}-{mode}" for kind in ("rank", "heat") for mode in modes)}
    read = Read(sweep)
    assert len(read.all("figure")) == len(read.all("details")) == len(charts_of(sweep))
    assert all(figure["aria-label"] for figure in read.all("div") if "data-chart" in figure)
    links = {link["href"] for link in read.all("a")}
    assert {"lc_layers.parquet", "samples.parquet", "lc_samples/part-00000.parquet", "plans/two.json"} <= links
    text = " ".join(read.text)
    for said in (
        "1.00e-09 nats",
        "bootstrap resamples choose the same layers in 90% with 50%",
        "torch version",
        "2.15.0",
    ):
        assert said in text


def test_zeros_stay_on_a_log_axis(sweep: str) -> None:
    chart = charts_of(sweep)["lc"]["spec"]
    rows = chart["datasets"]["rows"]
    assert min(rows["low"]) > 0 and min(rows["y"]) > 0 and min(rows["mean"]) == 0
    assert [hollow for mean, hollow in zip(rows["mean"], rows["hollow"], strict=True) if mean == 0] == [True, True]
    assert "below: noise floor 1.0e-09" in json.dumps(chart["layer"])


def test_an_all_zero_sweep_of_one_sample_and_layer(tmp_path: Path) -> None:
    page = page_of(make_sweep(tmp_path, samples=1, layers=2, modes=[Mode.FREEZE_TEXT], noise_floor=None))
    assert "No noise floor is known" in page and len(charts_of(page)) == 4


def test_texts_of_a_run_are_escaped(sweep: str) -> None:
    assert "<script>alert" not in sweep and "&lt;script&gt;alert(1)" in sweep
    assert "<b>What" not in sweep and "&lt;b&gt;What" in sweep
    assert "<script" not in re.search(r'id="charts">(.*?)</script>', sweep, re.S)[1]  # type: ignore[index]


def test_only_the_scripts_of_the_page_run_and_nothing_is_loaded(sweep: str) -> None:
    read = Read(sweep)
    policy = next(str(meta["content"]) for meta in read.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    for script in re.findall(r"<script>(.*?)</script>", sweep, re.S):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert not read.all("img") and not read.all("iframe")
    assert [link["href"] for link in read.all("link")] == ["data:,"]
    assert all("src" not in script for script in read.all("script"))


def test_a_campaign_tells_plans_controls_and_the_full_model_apart(campaign: str) -> None:
    charts = charts_of(campaign)
    assert set(charts) == {"accuracy-0", "difference-0", "speed-0", "plans-0"}
    data = charts["accuracy-0"]["spec"]["datasets"]
    assert data["rows"]["kind"] == ["full model", "first-layers control", "random control", "LC plan"]
    assert data["rows"]["value"] == [0.9, 0.4, 0.6, 0.88]
    assert data["rows"]["place"][2] == data["rows"]["flops"][2] == 0.7 and len(set(data["rows"]["place"])) == 4
    assert data["rows"]["high"][0] == pytest.approx(0.9 + 1.96 * 0.03)
    assert data["front"] == {"place": [pytest.approx(0.7 + 0.3 * 0.008), 1.0], "value": [0.88, 0.9]}
    assert charts["speed-0"]["spec"]["datasets"]["rows"]["measured"][3] == pytest.approx(78 / 108)
    text = " ".join(Read(campaign).text)
    for said in ("the prompt is too long", "exact_match_colour", "This run is partial", "answers changed"):
        assert said in text


def test_the_pareto_front_holds_what_no_other_plan_beats() -> None:
    points = [
        Point(plan=name, kind="", n=1, errors=0, flops_ratio=flops, value=value)
        for name, flops, value in (
            ("full", 1.0, 0.9),
            ("good", 0.6, 0.9),
            ("cheap", 0.4, 0.5),
            ("bad", 0.5, 0.4),
            ("same size", 0.6 - 1e-12, 0.8),
            ("failed", 0.3, None),
            ("unknown", None, 0.99),
        )
    ]
    assert [point.plan for point in pareto_front(points)] == ["cheap", "good"]


@pytest.mark.parametrize("kind", ["sweep", "campaign"])
@pytest.mark.parametrize("state", ["running", "partial"])
def test_unfinished_runs_say_so_at_the_top(kind: str, state: str, tmp_path: Path) -> None:
    folder = make_sweep(tmp_path) if kind == "sweep" else make_campaign(tmp_path)
    manifest = sweep_manifest(samples=3, layers=5, modes=list(Mode)[1:3], state=state)
    (manifest if kind == "sweep" else campaign_manifest(state=state)).save(folder)
    head = page_of(folder).partition("<main")[0]
    assert f"<title>[{state}]" in head and f'<span class="state {state}">' in head
    assert ("is not finished" if state == "running" else "some samples") in head


@pytest.mark.parametrize("kind", ["sweep", "campaign"])
def test_a_run_that_has_just_begun_has_a_page(kind: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    running = {"state": "running", "counts": {}, "finished": None, "wall_seconds": None}
    if kind == "sweep":
        sweep_manifest(samples=3, layers=5, modes=[Mode.FREEZE_TEXT], noise_floor=None, **running).save(folder)
    else:
        campaign_manifest(**running).save(folder)
    page = page_of(folder)
    assert "no results to draw yet" in page or "No cell has finished yet" in page
    assert "None is known yet" in page


def test_commands_repeat_the_run() -> None:
    command = command_of(sweep_manifest(samples=3, layers=5, modes=list(Mode)[1:3]))
    assert command.line == (
        "python jobs/lc_sweep.py --model org/m --calibration 'a b.parquet' --calibration gqa:20 "
        "--modes freeze-visual,freeze-text --kl-direction full-ablated --limit 20 --seed 0 --trust-remote-code "
        "--output-path OUTPUT_FOLDER"
    )
    words = command.line.replace("'a b.parquet'", "a_b.parquet").split()[2:]
    parsed = sweep_job.make_context("lc_sweep", words).params
    assert parsed["calibration"] == ("a_b.parquet", "gqa:20") and parsed["trust_remote_code"] is True
    words = command_of(campaign_manifest(state="complete")).line.split()[2:]
    parsed = campaign_job.make_context("campaign", words).params
    assert parsed["plans"] == ("full,sweep:runs/demo@2",) and parsed["gen_kwargs"] == "temperature=0"
    assert parsed["output_path"] == "OUTPUT_FOLDER" and not parsed["retry_failed"]


def test_secrets_and_templates_are_named_but_not_shown() -> None:
    arguments = {"models": ["m"], "gen_kwargs": {"api_key": "hunter2"}, "chat-template": "{{ long }}"}
    command = command_of(campaign_manifest(state="complete", arguments=arguments))
    assert "hunter2" not in command.line and "{{" not in command.line
    assert "stands for a secret" in command.note and "CHAT_TEMPLATE is a file" in command.note


def test_many_samples_become_groups_and_few_keep_their_names() -> None:
    kl_SL = np.arange(1.0, 1001.0)[:, None] * np.array([1.0, 0.01])
    ids = [f"s{number}" for number in range(1000)]
    many = heat_chart("freeze-text", kl_SL, ids, noise_floor=None)
    rows = many.data["rows"]
    assert len(rows) == 100 and rows[0]["sample"] == "samples 1 to 20" and rows[2]["lc"] == 970
    assert [row[3] for row in many.numbers.rows] == [500.5, 5.005]
    few = heat_chart("freeze-text", kl_SL[:3], ids[:3], noise_floor=None)
    assert [row["sample"] for row in few.data["rows"]][::2] == ["s2", "s1", "s0"]


def test_samples_without_an_image_are_not_in_heat_maps_of_visual_modes(sweep: str) -> None:
    charts = charts_of(sweep)
    counts = {
        mode: len(set(charts[f"heat-{mode}"]["spec"]["datasets"]["rows"]["sample"]))
        for mode in ("freeze-visual", "freeze-text")
    }
    assert counts == {"freeze-visual": 2, "freeze-text": 3}


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path)
    assert render(build_page(folder)) == render(build_page(folder))
