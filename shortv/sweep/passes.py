"""What a sweep cost, counted where the work is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class PassCounter:
    """Passes of one layer over one batch; a layer run over k stacked ablations counts k."""

    clean: int = 0
    """Layer passes of the full model."""
    layers: int = 0
    """Layer passes of ablations over all positions."""
    ffn: int = 0
    """Passes of an FFN half alone."""
    text_layers: int = 0
    """Layer passes of ablations over text tokens alone."""
