"""How the charts of a campaign tell full model, plans and controls apart, and what their points say."""

from typing import Final

import altair as alt

from reports.page.campaign_data import KINDS
from reports.page.marks import fitting_columns

# Vega's names, and paths in its box of -1 to 1: a saltire, a star and an hourglass.
_SHAPES: Final = [
    *("circle", "cross", "triangle-up", "triangle-down", "diamond", "square", "triangle-right", "triangle-left"),
    "M-.9-.5L-.5-.9L0-.4L.5-.9L.9-.5L.4 0L.9 .5L.5 .9L0 .4L-.5 .9L-.9 .5L-.4 0Z",
    "M0-1.1L.3-.4L1.05-.34L.48 .15L.65 .89L0 .5L-.65 .89L-.48 .15L-1.05-.34L-.3-.4Z",
    "M-.85-.9L.85-.9L.2 0L.85 .9L-.85 .9L-.2 0Z",
]


def kind_colour(kinds: set[str]) -> alt.Color:
    """Return the colour of the column `kind`; the legend lists `kinds`."""
    # Vega-Lite knows no range of a name of our own: the page's script puts the colours of kinds into this one.
    return alt.Color("kind:N", scale=alt.Scale(domain=KINDS, range="ordinal"), legend=_legend(kinds))


def kind_shape(kinds: set[str]) -> alt.Shape:
    """Return the shape of the column `kind`, in one legend with its colour."""
    return alt.Shape("kind:N", scale=alt.Scale(domain=KINDS, range=_SHAPES), legend=_legend(kinds))


def _legend(kinds: set[str]) -> alt.Legend:
    shown = [kind for kind in KINDS if kind in kinds]
    return alt.Legend(title=None, orient="top", values=shown, columns=fitting_columns(shown), symbolOpacity=1)


def tips(*fields: tuple[str, str | None]) -> list[alt.Tooltip]:
    """Return the plan and these columns, numbers with their format, as what a point says."""
    formatted = [alt.Tooltip(f"{name}:Q", format=form) if form else alt.Tooltip(f"{name}:N") for name, form in fields]
    return [alt.Tooltip("plan:N"), *formatted]
