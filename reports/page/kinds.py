"""How the charts of a campaign tell full model, plans and controls apart, and what their points say."""

from typing import Final

import altair as alt

from reports.page.campaign_data import KINDS

_SHAPES: Final = ["circle", "cross", "triangle-up", "triangle-down", "diamond", "square"]


def kind_colour(kinds: set[str]) -> alt.Color:
    """Return the colour of the column `kind`; the legend lists `kinds`."""
    return alt.Color("kind:N", scale=alt.Scale(domain=KINDS), legend=_legend(kinds))


def kind_shape(kinds: set[str]) -> alt.Shape:
    """Return the shape of the column `kind`, in one legend with its colour."""
    return alt.Shape("kind:N", scale=alt.Scale(domain=KINDS, range=_SHAPES), legend=_legend(kinds))


def _legend(kinds: set[str]) -> alt.Legend:
    shown = [kind for kind in KINDS if kind in kinds]
    return alt.Legend(title=None, orient="top", values=shown, columns=3, symbolOpacity=1)


def tips(*fields: tuple[str, str | None]) -> list[alt.Tooltip]:
    """Return the plan and these columns, numbers with their format, as what a point says."""
    formatted = [alt.Tooltip(f"{name}:Q", format=form) if form else alt.Tooltip(f"{name}:N") for name, form in fields]
    return [alt.Tooltip("plan:N"), *formatted]
