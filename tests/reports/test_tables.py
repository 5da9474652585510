"""The table of layers at the end of a sweep."""

import io
from typing import Any

from rich.console import Console

from reports.tables import print_layers
from shortv.plan import Mode, Plan


def row(mode: Mode, layer: int, mean: float, rank: int) -> dict[str, Any]:
    interval = {"ci_low": mean / 2, "ci_high": mean * 2, "rank": rank, "rank_low": rank, "rank_high": rank + 1}
    return {"mode": mode, "layer": layer, "n": 40, "kl_direction": "full-ablated", "mean": mean, **interval}


def test_the_table_ranks_layers_per_mode() -> None:
    out, mode = io.StringIO(), Mode.FREEZE_VISUAL
    rows = [row(mode, 0, 0.5, 3), row(mode, 1, 1e-6, 2), row(mode, 2, 0.0, 1), row(Mode.FREEZE_TEXT, 0, 2.0, 1)]
    costs = {"flops_ratio": 0.5512, "flops_t": 64, "flops_v": 576}
    plan = Plan.of_layers(mode, [1, 2], num_layers=3, name="two", model="m", config_digest="d" * 64, **costs)
    print_layers(rows, Console(file=out, width=100), noise_floor=1e-5, plan=plan)
    text = out.getvalue()
    assert text.index("freeze-visual (KL full-ablated)") < text.index("freeze-text (KL full-ablated)")
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert [line.split("│")[2].strip() for line in lines] == ["2", "1", "0", "0"]
    assert "5.000e-01" in lines[2] and "2.500e-01 … 1.000e+00" in lines[2] and "3-4" in lines[2]
    assert "noise floor 1.000e-05 nats" in text
    assert "plan two: 2 of 3 layers changed, FLOPs ratio 55.1% at 64.0 text and 576.0 visual tokens" in text
