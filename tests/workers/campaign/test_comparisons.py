"""What a campaign says of differences: corrected together, on hard questions too, beside honest FLOPs."""

from pathlib import Path
from typing import Any

import pytest

from reports.significance import benjamini_hochberg, holm
from shortv.costs import layer_flops
from shortv.plan import Mode
from tests.workers.campaign.fakes import ARCH, campaign, campaign_spec, tables


def chosen(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_main_metrics_of_all_tasks_are_corrected_together(tmp_path: Path) -> None:
    plans = ("random:0..2@3", "first@3", "last@3", "last@2..4")
    output = campaign(campaign_spec(tmp_path, plans=plans, tasks=("shapes", "others")))
    found = tables(tmp_path)["comparisons"]
    for family, metric in (("main", "exact_match"), ("exact_match_even", "exact_match_even")):
        rows = chosen(found, family=family, against="full")
        assert (
            len(rows) == 14
            and {row["metric"] for row in rows} == {metric}
            and {row["subset"] for row in rows} == {"all"}
        )
        assert [row["p_holm"] for row in rows] == pytest.approx(holm([row["p_value"] for row in rows]))
        assert [row["q_bh"] for row in rows] == pytest.approx(benjamini_hochberg([row["p_value"] for row in rows]))
    first, last = (chosen(found, plan=plan, task="shapes", family="main")[0] for plan in ("first-3", "last-3"))
    assert first["p_value"] < first["p_holm"] < 0.05 < last["p_holm"]
    assert first["discordant"] == pytest.approx(first["sd"] ** 2 * 59 / 60 + first["difference"] ** 2)
    assert "(<.001)" in output and "Holm" in output


def test_another_name_of_a_plan_is_not_another_comparison(tmp_path: Path) -> None:
    found = []
    for number, plans in enumerate((("exit@5", "first@3"), ("exit@5", "last@3/drop-visual", "first@3"))):
        campaign(campaign_spec(tmp_path / str(number), plans=plans))
        found.append(tables(tmp_path / str(number))["comparisons"])
    corrected = [{(row["plan"], row["metric"]): row["p_holm"] for row in rows} for rows in found]
    assert corrected[1] == corrected[0] | {
        ("drop-visual-3", metric): corrected[0]["exit-5", metric] for metric in ("exact_match", "exact_match_even")
    }


def test_differences_on_the_questions_that_smaller_images_get_wrong(tmp_path: Path) -> None:
    output = campaign(
        campaign_spec(tmp_path, plans=("random:0..1@3", "all/no-visual-ffn", "downsample@0.5", "downsample@0.2"))
    )
    found = tables(tmp_path)
    control, plan, full = (
        {row["doc"]: row["prediction"] == "red" for row in chosen(found["answers"], plan=name)}
        for name in ("downsample-0.5", "random0-3", "full")
    )
    wrong = [doc for doc, right in control.items() if not right]
    assert 5 < len(wrong) < 55
    (row,) = chosen(found["comparisons"], plan="random0-3", metric="exact_match", subset="hard")
    expected = sum(plan[doc] - full[doc] for doc in wrong) / len(wrong)
    assert (row["n"], row["difference"]) == (len(wrong), pytest.approx(expected))
    hard = chosen(found["comparisons"], subset="hard")
    assert {row["plan"] for row in hard} == {"random0-3", "random1-3", "no-visual-ffn-8"}
    assert {row["p_holm"] >= row["p_value"] for row in hard} == {True}
    said = "questions that smaller images get wrong"
    assert f"no-visual-ffn-8 on the {len(wrong)} {said}" in output and output.count(said) == 1
    ratios = {row["plan"]: row["flops_ratio"] for row in found["cells"]}
    whole = layer_flops(ARCH, Mode.FULL, 10, 30)
    assert ratios["downsample-0.5"] == pytest.approx(layer_flops(ARCH, Mode.FULL, 10, 15) / whole)
    assert ratios["full"] == 1 and 0 < ratios["random0-3"] < 1


def test_a_campaign_without_a_downsampled_control_has_no_hard_questions(tmp_path: Path) -> None:
    campaign(campaign_spec(tmp_path))
    assert {row["subset"] for row in tables(tmp_path)["comparisons"]} == {"all"}
