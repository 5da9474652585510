"""The page of a sweep or campaign, without a browser: what it says, and that it is safe to open."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.campaign import main as campaign_job
from jobs.lc_sweep import main as sweep_job
from reports.page import write_page
from reports.page.campaign import pareto_front
from reports.page.ran import ran
from reports.page.sweep import heat_chart
from reports.page.sweep_data import read_sweep_data
from reports.store import Folder
from shortv.plan import Mode
from tests.reports.runs import campaign_manifest, make_campaign, make_sweep, sweep_manifest

MODES = ("freeze-visual", "freeze-text")


class Read(HTMLParser):
    """Collects the tags of a page, and its text outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(re.sub(r"<script.*?</script>", "", page, flags=re.S))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Folder) -> str:
    write_page(folder)
    return folder.read_bytes("report.html").decode()


def charts_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)
    assert found and "<script" not in found[1]
    charts: dict[str, Any] = json.loads(found[1])
    return {name: chart["spec"] for name, chart in charts.items()}


def column(chart: Any, name: str, data: str = "rows") -> list[Any]:
    return [row[name] for row in chart["datasets"][data]]


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_sweep(tmp_path_factory.mktemp("sweep"), samples=3)


@pytest.fixture(scope="module")
def sweep(sweep_folder: Folder) -> str:
    return page_of(sweep_folder)


def test_a_sweep_has_its_charts_each_with_its_numbers(sweep: str, sweep_folder: Folder) -> None:
    charts, read = charts_of(sweep), Read(sweep)
    assert set(charts) == {"lc", "plans", *(f"{kind}-{mode}" for kind in ("rank", "heat") for mode in MODES)}
    assert len(read.all("figure")) == len(read.all("details")) == len(charts)
    assert all(figure["aria-label"] for figure in read.all("div") if "data-chart" in figure)
    links = {link["href"] for link in read.all("a")}
    assert {"lc_layers.parquet", "samples.parquet", "lc_samples/part-00000.parquet", "plans/two.json"} <= links
    for said in ("1.00e-09 nats", "choose the same layers in 90% with 50%", "torch version", "2.15.0"):
        assert said in read.text
    # A sample without an image does not count for a mode of visual tokens.
    assert [len(set(column(charts[f"heat-{mode}"], "sample"))) for mode in MODES] == [2, 3]
    assert page_of(sweep_folder) == sweep


def test_zeros_stay_on_a_log_axis(sweep: str, tmp_path: Path) -> None:
    chart = charts_of(sweep)["lc"]
    assert min(column(chart, "low")) > 0 and min(column(chart, "y")) > 0 and min(column(chart, "mean")) == 0
    assert [row["hollow"] for row in chart["datasets"]["rows"] if row["mean"] == 0] == [True, True]
    assert "below: noise floor 1.0e-09" in json.dumps(chart["layer"])
    page = page_of(make_sweep(tmp_path, samples=1, layers=2, modes=[Mode.FREEZE_TEXT], noise_floor=None))
    assert "No noise floor is known" in page and len(charts_of(page)) == 4


def test_texts_of_a_run_are_escaped_and_nothing_is_loaded(sweep: str) -> None:
    assert "<script>alert" not in sweep and "&lt;script&gt;alert(1)" in sweep
    assert "<b>What" not in sweep and "&lt;b&gt;What" in sweep
    read = Read(sweep)
    policy = next(str(meta["content"]) for meta in read.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", sweep, re.S)
    assert len(scripts) == 2 and not re.search(r"<script[^>]* src", sweep)
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert not read.all("img") and not read.all("iframe")
    assert [link["href"] for link in read.all("link")] == ["data:,"]


def test_a_campaign_tells_plans_controls_and_the_full_model_apart(tmp_path: Path) -> None:
    page = page_of(make_campaign(tmp_path, failed=3))
    charts = charts_of(page)
    assert set(charts) == {"accuracy-0", "difference-0", "speed-0", "plans-0"}
    chart = charts["accuracy-0"]
    assert column(chart, "kind") == ["full model", "first-layers control", "random control", "LC plan"]
    assert column(chart, "value") == [0.9, 0.4, 0.6, 0.88]
    places = column(chart, "place")
    assert places[2] == column(chart, "flops_ratio")[2] == 0.7 and len(set(places)) == 4
    assert column(chart, "high")[0] == pytest.approx(0.9 + 1.96 * 0.03)
    front = chart["datasets"]["front"]
    assert [(row["place"], row["value"]) for row in front] == [(1.0, 0.9), (pytest.approx(0.7 + 0.3 * 0.008), 0.88)]
    speed = charts["speed-0"]
    assert column(speed, "prefill_ratio")[3] == pytest.approx(0.73)
    assert column(speed, "ratio_high")[3] == pytest.approx(0.73 + 1.96 * 0.01) and column(speed, "kv_bytes")[0] == 4.096
    text = Read(page).text
    assert "replicas waited 25% of the time" in text
    for said in ("the prompt is too long", "exact_match_colour", "This run is partial", "answers changed"):
        assert said in text


def test_the_pareto_front_holds_what_no_other_plan_beats() -> None:
    plans = {"full": (1.0, 0.9), "good": (0.6, 0.9), "cheap": (0.4, 0.5), "bad": (0.5, 0.4)}
    plans["same size"] = (0.6 - 1e-12, 0.8)
    points = [{"plan": plan, "flops_ratio": flops, "value": value} for plan, (flops, value) in plans.items()]
    assert [point["plan"] for point in pareto_front(points)] == ["cheap", "good"]


@pytest.mark.parametrize("kind", ["sweep", "campaign"])
def test_unfinished_runs_say_so_at_the_top(kind: str, tmp_path: Path) -> None:
    def manifest(**changes: Any) -> Any:
        if kind == "campaign":
            return campaign_manifest(**changes)
        return sweep_manifest(samples=3, layers=5, modes=list(Mode)[1:3], **changes)

    folder = make_sweep(tmp_path / "partial") if kind == "sweep" else make_campaign(tmp_path / "partial")
    begun = Folder(tmp_path / "begun")
    manifest(state="partial").save(folder)
    manifest(state="running", counts={}, finished=None, wall_seconds=None).save(begun)
    for place, state, said in ((folder, "partial", "some samples"), (begun, "running", "is not finished")):
        page = page_of(place)
        head = page.partition("<main")[0]
        assert f"<title>[{state}]" in head and f'<span class="state {state}">' in head and said in head
    assert "no results to draw yet" in page or "No cell has finished yet" in page
    assert "None is known yet" in page


def test_commands_repeat_the_run() -> None:
    command = ran(sweep_manifest(samples=3, layers=5, modes=list(Mode)[1:3]), []).command
    assert command == (
        "python jobs/lc_sweep.py --model org/m --calibration 'a b.parquet' --calibration gqa:20 "
        "--modes freeze-visual,freeze-text --kl-direction full-ablated --limit 20 --seed 0 --trust-remote-code "
        "--output-path OUTPUT_FOLDER"
    )
    words = command.replace("'a b.parquet'", "a_b.parquet").split()[2:]
    parsed = sweep_job.make_context("lc_sweep", words).params
    assert parsed["calibration"] == ("a_b.parquet", "gqa:20") and parsed["trust_remote_code"] is True
    words = ran(campaign_manifest(state="complete"), []).command.split()[2:]
    parsed = campaign_job.make_context("campaign", words).params
    assert parsed["plans"] == ("full,sweep:runs/demo@2",) and parsed["gen_kwargs"] == "temperature=0"
    assert parsed["output_path"] == "OUTPUT_FOLDER" and not parsed["retry_failed"]


def test_secrets_and_templates_are_named_but_not_shown() -> None:
    arguments = {"models": ["m"], "gen_kwargs": {"api_key": "hunter2"}, "chat-template": "{{ long }}"}
    section = ran(campaign_manifest(state="complete", arguments=arguments), [])
    assert "hunter2" not in section.command and "{{" not in section.command
    assert "stands for a secret" in section.note and "CHAT_TEMPLATE is a file" in section.note


def test_many_samples_become_groups_and_few_keep_their_names(sweep_folder: Folder) -> None:
    data = read_sweep_data(sweep_folder)
    kl_SL = np.arange(1.0, 1001.0)[:, None] * np.array([1.0, 0.01])
    for count in (1000, 3):
        measured = {"freeze-text": replace(data.measured["freeze-text"], kl_SL=kl_SL[:count])}
        ids = [f"s{number}" for number in range(count)]
        chart = heat_chart(replace(data, sample_ids=ids, measured=measured), "freeze-text")
        rows = chart.data["rows"]
        if count == 1000:
            assert len(rows) == 100 and rows[0]["sample"] == "samples 1 to 20" and rows[2]["lc"] == 970
            assert [row[3] for row in chart.numbers.rows] == [500.5, 5.005]
        else:
            assert [row["sample"] for row in rows][::2] == ["s2", "s1", "s0"]
