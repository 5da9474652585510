"""The end table and the chart of LC per layer."""

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from reports.charts import lc_chart, save_lc_chart
from reports.tables import print_layers
from shortv.errors import Refused, ShortVError
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


def test_the_chart_is_readable_and_reproducible(tmp_path: Path) -> None:
    save_lc_chart(ROWS, tmp_path / "lc.svg", noise_floor=1e-5)
    svg = (tmp_path / "lc.svg").read_text()
    assert svg.lstrip().startswith("<?xml") and svg.rstrip().endswith("</svg>")
    assert lc_chart(ROWS, noise_floor=1e-5).decode() == svg
    save_lc_chart(ROWS, tmp_path / "lc.png")
    assert Image.open(tmp_path / "lc.png").size == (1275, 690)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lc.png", "lc.svg"]


def test_an_all_zero_sweep_can_be_drawn() -> None:
    assert lc_chart([record(Mode.FREEZE_VISUAL, layer, 0.0, layer + 1) for layer in range(3)])


def test_charts_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no layer has an LC"):
        lc_chart([])
    with pytest.raises(Refused, match=r"name it .svg or .png"):
        save_lc_chart(ROWS, tmp_path / "lc.txt")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShortVError, match="could not be written"):
        save_lc_chart(ROWS, tmp_path / "file/lc.svg")
