"""The table of layers at the end of a sweep."""

import io

from rich.console import Console

from reports.tables import print_layers
from shortv.plan import Mode
from shortv.records import KlDirection, LayerRecord


def record(mode: Mode, layer: int, mean: float, rank: int) -> LayerRecord:
    return LayerRecord(
        mode=mode,
        layer=layer,
        n=40,
        kl_direction=KlDirection.FULL_ABLATED,
        mean=mean,
        ci_low=mean / 2,
        ci_high=mean * 2,
        rank=rank,
        rank_low=rank,
        rank_high=rank + 1,
    )


ROWS = [
    record(Mode.FREEZE_VISUAL, 0, 0.5, 3),
    record(Mode.FREEZE_VISUAL, 1, 1e-6, 2),
    record(Mode.FREEZE_VISUAL, 2, 0.0, 1),
    record(Mode.FREEZE_TEXT, 0, 2.0, 1),
]


def test_the_table_ranks_layers_per_mode() -> None:
    out = io.StringIO()
    plan = {
        "name": "two",
        "modes": ["full", "freeze-visual", "freeze-visual"],
        "flops_ratio": 0.5512,
        "flops_t": 64,
        "flops_v": 576,
    }
    print_layers(ROWS, noise_floor=1e-5, plan=plan, console=Console(file=out, width=100))
    text = out.getvalue()
    assert text.index("freeze-visual (KL full-ablated)") < text.index("freeze-text (KL full-ablated)")
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert [line.split("│")[2].strip() for line in lines] == ["2", "1", "0", "0"]
    assert "5.000e-01" in lines[2] and "2.500e-01 … 1.000e+00" in lines[2] and "3-4" in lines[2]
    assert "noise floor 1.000e-05 nats" in text
    assert "plan two: 2 of 3 layers changed, FLOPs ratio 55.1% at 64.0 text and 576.0 visual tokens" in text
