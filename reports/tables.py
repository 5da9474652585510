"""The table of layers that a sweep prints at its end."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from shortv.terminal import say


def layer_table(rows: Iterable[Any], *, noise_floor: float | None = None, title: str | None = None) -> Table:
    """Build the table of one mode's layers, the layer to replace first on top.

    Rows are `LayerRecord`s or rows of the lc_layers table. LC is in nats; values below the noise floor are dimmed.
    """
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("rank", "layer", "LC (nats)", "95 % interval", "rank interval", "samples"):
        table.add_column(name, justify="right")
    for row in sorted((as_mapping(item) for item in rows), key=lambda item: int(item["rank"])):
        dim = "dim" if noise_floor is not None and row["mean"] <= noise_floor else None
        table.add_row(
            str(row["rank"]),
            str(row["layer"]),
            f"{row['mean']:.3e}",
            f"{row['ci_low']:.3e} … {row['ci_high']:.3e}",
            f"{row['rank_low']}-{row['rank_high']}",
            str(row["n"]),
            style=dim,
        )
    return table


def print_layers(
    rows: Iterable[Any],
    *,
    noise_floor: float | None = None,
    stability: Mapping[str, Mapping[str, float]] | None = None,
    plan: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> None:
    """Print one table per mode, the noise floor, how stable the chosen sets are, and the plan made of them.

    `stability` is the share of bootstrap resamples that choose the same layers, by mode and share of samples.
    `plan` may hold `name`, `modes` (one per layer) and `flops_ratio` with the `flops_t` and `flops_v` it assumes.
    """
    out = console or Console()
    for mode, group in by_mode(rows).items():
        direction = group[0]["kl_direction"]
        out.print(layer_table(group, noise_floor=noise_floor, title=f"Layer Contribution, {mode} (KL {direction})"))
    if noise_floor is not None:
        out.print(f"noise floor {noise_floor:.3e} nats; layers closer together than it are ties")
    for mode, shares in (stability or {}).items():
        say(out, stability_line(mode, shares))
    if plan is not None:
        say(out, plan_line(plan))


def stability_line(mode: str, shares: Mapping[str, float]) -> str:
    """Return one line about how often resampled calibration samples choose the same layers."""
    parts = [f"{same:.0%} with {float(share):.0%} of the samples" for share, same in shares.items()]
    return f"stability of {mode}: bootstrap resamples choose the same layers in {', '.join(parts)}"


def plan_line(plan: Mapping[str, Any]) -> str:
    """Return one line about a plan: how many layers it changes and its FLOPs ratio."""
    modes = list(plan["modes"])
    changed = sum(str(mode) != "full" for mode in modes)
    line = f"plan {plan['name']}: {changed} of {len(modes)} layers changed"
    if plan.get("flops_ratio") is not None:
        tokens = f"{plan['flops_t']:.1f} text and {plan['flops_v']:.1f} visual tokens"
        line += f", FLOPs ratio {plan['flops_ratio']:.1%} at {tokens}"
    return line


def by_mode(rows: Iterable[Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Group records or rows by mode, in order of appearance."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        mapping = as_mapping(row)
        groups[str(mapping["mode"])].append(mapping)
    return dict(groups)


def as_mapping(row: Any) -> Mapping[str, Any]:
    """Return a row of lc_layers as a mapping, whether it is a record or already one."""
    if isinstance(row, Mapping):
        return row
    names = ("mode", "layer", "n", "kl_direction", "mean", "ci_low", "ci_high", "rank", "rank_low", "rank_high")
    return {name: getattr(row, name) for name in names}
