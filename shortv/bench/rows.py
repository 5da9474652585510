"""What every benchmark gives: rows of one table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

GIB = 2**30
HEAD = ("benchmark", "case", "baseline, ms", "measured, ms", "ratio", "figures")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison: milliseconds of the baseline and of this project, and `figures` that the benchmark adds."""

    benchmark: str = ""
    case: str
    baseline_ms: float | None = None
    measured_ms: float | None = None
    ratio: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    def cells(self) -> list[str]:
        """The row as texts under HEAD."""
        times = ["" if time is None else f"{time:.1f}" for time in (self.baseline_ms, self.measured_ms)]
        figures = self.error or ", ".join(f"{name} {value:.5g}" for name, value in self.figures.items())
        return [self.benchmark, self.case, *times, "" if self.ratio is None else f"{self.ratio:.3f}", figures]

    def __str__(self) -> str:
        """The row in a few lines for a terminal."""
        _, _, *times, figures = self.cells()
        words = ("baseline {} ms", "measured {} ms", "ratio {}")
        shown = ", ".join(word.format(value) for word, value in zip(words, times, strict=True) if value)
        return "\n    ".join(filter(None, [self.case, shown, figures]))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay cells out as a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def write_results(rows: Sequence[Row], folder: Path, *, device: str) -> list[Path]:
    """Write the rows as results.md and results.json, with the device and the version of torch."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    table = markdown(HEAD, [row.cells() for row in rows])
    content = {"device": name, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    text, data = folder / "results.md", folder / "results.json"
    text.write_text(f"Measured on {name} with torch {torch.__version__}.\n\n{table}\n", "utf-8")
    data.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return [text, data]
