"""The tables of layers that a sweep prints at its end."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from shortv.plan import Mode, Plan
from shortv.terminal import say

Row = Mapping[str, Any]


def print_layers(
    rows: Iterable[Row],
    console: Console,
    *,
    noise_floor: float | None = None,
    stability: Mapping[str, Mapping[str, float]] | None = None,
    plan: Plan | None = None,
) -> None:
    """Print one table per mode, the noise floor, how stable the chosen sets are, and the plan made of them.

    `rows` are those of the lc_layers table. LC is in nats; values below the noise floor are dimmed. `stability` is the
    share of bootstrap resamples that choose the same layers, by mode and share of samples.
    """
    for mode, group in by_mode(rows).items():
        title = f"Layer Contribution, {mode} (KL {group[0]['kl_direction']})"
        table = Table(title=title, title_justify="left", header_style="bold")
        for name in ("rank", "layer", "LC (nats)", "95 % interval", "rank interval", "samples"):
            table.add_column(name, justify="right")
        for row in sorted(group, key=lambda row: int(row["rank"])):
            interval = f"{row['ci_low']:.3e} … {row['ci_high']:.3e}"
            ranks = f"{row['rank_low']}-{row['rank_high']}"
            cells = row["rank"], row["layer"], f"{row['mean']:.3e}", interval, ranks, row["n"]
            dim = noise_floor is not None and row["mean"] <= noise_floor
            table.add_row(*map(str, cells), style="dim" if dim else None)
        console.print(table)
    if noise_floor is not None:
        console.print(f"noise floor {noise_floor:.3e} nats; layers closer together than it are ties")
    for mode, shares in (stability or {}).items():
        say(console, stability_line(mode, shares))
    if plan is not None:
        changed = sum(mode is not Mode.FULL for mode in plan.modes)
        line = f"plan {plan.name}: {changed} of {len(plan.modes)} layers changed"
        if plan.flops_ratio is not None:
            tokens = f"{plan.flops_t:.1f} text and {plan.flops_v:.1f} visual tokens"
            line += f", FLOPs ratio {plan.flops_ratio:.1%} at {tokens}"
        say(console, line)


def stability_line(mode: str, shares: Mapping[str, float]) -> str:
    """Return one line about how often resampled calibration samples choose the same layers."""
    parts = [f"{same:.0%} with {float(share):.0%} of the samples" for share, same in shares.items()]
    return f"stability of {mode}: bootstrap resamples choose the same layers in {', '.join(parts)}"


def by_mode(rows: Iterable[Row]) -> dict[str, Sequence[Row]]:
    """Group the rows of lc_layers by mode, in order of appearance."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[str(row["mode"])].append(row)
    return dict(groups)
