"""The best plans of a campaign: cheaper than the full model, those of LC and the others apart, never a control."""

from pathlib import Path
from typing import Any

from tests.reports.service.asking import HTML, ask, listed
from tests.reports.service.folders import change_manifest, make_campaign

# Name, order of the layers, FLOPs ratio, metric.
PLANS = (
    ("lc-2", "lc", 0.7, 0.88),
    ("random0-2", "random", 0.5, 0.97),
    ("first-2", "first", 0.5, 0.96),
)


def campaign(root: Path, *plans: tuple[str, str, float | None, float | None]) -> dict[str, Any]:
    """The headline of a campaign that has these plans instead of its own three."""
    folder = make_campaign(root / "c")
    cells, metrics = folder.read_table("cells").to_pylist(), folder.read_table("metrics").to_pylist()
    rows: dict[str, list[Any]] = {"cells": cells[:1], "metrics": metrics[:1]}
    for number, (name, _, flops, value) in enumerate(plans, 1):
        own = {"plan": name, "cell": f"{number:064}", "plan_digest": f"{number:064}"}
        rows["cells"].append(cells[0] | own | {"flops_ratio": flops})
        rows["metrics"].append(metrics[0] | own | {"value": value})
        answers = folder.read_table(f"answers/{cells[0]['cell']}")
        folder.write_table(f"answers/{number:064}", [row | {"cell": own["cell"]} for row in answers.to_pylist()])
    for table, content in rows.items():
        folder.write_table(table, content)
    shape = {"model": "org/m", "kind": "plan", "digest": "d", "ranking": [], "modes": ["full", "freeze-visual"]}
    listed_plans = [shape | {"name": "full", "kind": "full", "source": None}]
    listed_plans += [shape | {"name": name, "source": {"order": order}} for name, order, _, _ in plans]
    change_manifest(root / "c", plans=listed_plans, counts={"cells": len(plans) + 1})
    run = listed(root)["c"]
    assert run["problems"] == []
    (best,) = run["headline"]["best"]
    return dict(best)


def test_plans_that_are_not_cheaper_are_none(tmp_path: Path) -> None:
    best = campaign(tmp_path, *PLANS, ("adapters", "fixed", 1.013, 0.999), ("same", "lc", 1.0, 0.99))
    assert (best["plan"], best["value"], best["flops_ratio"], best["full"]) == ("lc-2", 0.88, 0.7, 0.9)
    assert "other" not in best


def test_the_best_other_plan_stands_beside_that_of_lc(tmp_path: Path) -> None:
    best = campaign(tmp_path, *PLANS, ("exit", "fixed", 0.6, 0.91), ("saisa", "fixed", 0.5, 0.95))
    assert best["plan"] == "lc-2"
    assert (best["other"]["plan"], best["other"]["value"], best["other"]["flops_ratio"]) == ("saisa", 0.95, 0.5)
    text = ask(tmp_path, "/", headers=HTML).text
    assert "lc-2 0.88" in text and "full 0.9; best other plan saisa 0.95" in text


def test_a_tie_goes_to_the_fewest_flops(tmp_path: Path) -> None:
    best = campaign(tmp_path, ("a", "lc", 0.8, 0.9), ("b", "lc", 0.6, 0.9), ("c", "lc", 0.7, 0.9))
    assert best["plan"] == "b"


def test_without_a_cheaper_plan_the_full_model_stands_alone(tmp_path: Path) -> None:
    best = campaign(tmp_path, ("unknown", "lc", None, 0.9), ("failed", "lc", 0.5, None), *PLANS[1:])
    assert best["full"] == 0.9 and "plan" not in best and "other" not in best
    assert "full 0.9<" in ask(tmp_path, "/", headers=HTML).text
