"""How SAISA's parts run: layers whose visual rows come from projectors of their own (paper, section 3).

The visual rows of a layer's input are overwritten before residual and norm, and the layer freezes them: text rows alone
are queries and pass the FFN. Shapes: B batch, T positions, N visual tokens of all samples, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from shortv.errors import Refused, ShortVError
from shortv.families import Decoder
from shortv.layers.fast import PlannedLayer, frozen
from shortv.layers.progress import Progress
from shortv.learned.base import PartsRun
from shortv.learned.saisa.parts import Projectors
from shortv.plan import Mode, Tokens

# Whole numbers up to here are exact in every dtype that a tower runs in.
_BASE = 256
_DIGITS = 3


class ProjectedRun(PartsRun[Projectors]):
    """A plan with SAISA's parts on one model."""

    needs_tower = True

    def __init__(
        self, decoder: Decoder, modes: Sequence[Mode], parts: Projectors, threshold: float | None = None
    ) -> None:
        """Take parts for these modes.

        Raises:
            Refused: a layer with a projector does not freeze visual tokens, another layer is not full, or the family's
                layers cannot have projectors.
        """
        super().__init__(decoder, modes, parts, threshold)
        self._features = VisionFeatures(decoder)
        settings = parts.settings
        for index, (mode, needed) in enumerate(zip(modes, settings.modes(len(modes)), strict=True)):
            if mode is not needed:
                has = "have a" if index in settings.layers else "have no"
                raise Refused(
                    f"layer {index} is {mode}, but these parts {has} projector for it, so it must be {needed}; "
                    "use the plan that was written with the parts"
                )

    def executor(self, index: int) -> Callable[..., Tensor] | None:
        """Return the freezing forward of a layer with a projector; other layers are the model's own."""
        return self._projected if index in self.parts.settings.layers else None

    def attach(self, model: nn.Module, progress: Progress, undo: ExitStack) -> None:
        """Record the vision features, and put the parts' language model in place of the model's own, uncopied."""
        self._features.attach(progress, undo)
        self._replace(undo)

    def attach_reference(self, model: nn.Module, progress: Progress, hooks: ExitStack) -> None:
        """Run dense layers with the projected rows written over the visual rows."""
        self.attach(model, progress, hooks)
        super().attach_reference(model, progress, hooks)

    def before(
        self, progress: Progress, index: int, hidden_BTD: Tensor, arguments: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Write the projected rows over the visual rows that enter a layer."""
        return (self._over(progress, index, hidden_BTD),), arguments

    def after(self, progress: Progress, index: int, entered_BTD: Tensor, output_BTD: Tensor) -> Tensor:
        """Write them over those that leave it."""
        return self._over(progress, index, output_BTD)

    def _over(self, progress: Progress, index: int, hidden_BTD: Tensor) -> Tensor:
        if not progress.has_visual or index not in self.parts.settings.layers:
            return hidden_BTD
        visual_BT = progress.types.visual_BT.to(hidden_BTD.device)
        return hidden_BTD.masked_scatter(visual_BT[:, :, None], self._rows(index, hidden_BTD))

    def _projected(self, planned: PlannedLayer, hidden: Tensor, **arguments: Any) -> Tensor:
        progress = planned.progress
        if not progress.has_visual:
            return planned.own(hidden, **arguments)
        visual_1ND = self._rows(planned.index, hidden)[None]
        return frozen(planned, progress.split(Tokens.TEXT), hidden, visual_1ND, **arguments)

    def _rows(self, index: int, like: Tensor) -> Tensor:
        """Return the visual rows (N, D) of a layer, in their order in the batch."""
        return self._features.ordered(self.parts.project(index, self._features.seen)).to(like.device, like.dtype)

    def _replace(self, undo: ExitStack) -> None:
        for owner, name, weight in self.parts.places(self.decoder):
            own = owner._parameters[name]
            assert own is not None
            if weight.device != own.device:  # the model has moved since the parts were loaded
                weight.data = weight.data.to(own.device)
            undo.callback(owner._parameters.__setitem__, name, own)
            owner._parameters[name] = weight


class VisionFeatures:
    """The last input of the base model's projector, and which of its rows each visual row of a forward is.

    generate() may run the vision tower before the forward, once for several forwards, and repeat its output for beams.
    So features are stored until new ones arrive, and every forward is checked to contain their rows.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Find the projector. Raises Refused for a family whose layers cannot have projectors."""
        self._decoder = decoder
        self._projector = decoder.projector
        path = decoder.family.reorders
        self._around = decoder.backbone.get_submodule(path) if path else None
        self._forget()

    def _forget(self) -> None:
        self.seen = self._projected_ND = torch.empty(0)
        self._numbers_N: Tensor | None = None
        self._order_N: Tensor | None = None

    def attach(self, sequence: Progress, undo: ExitStack) -> None:
        """Hook projector and decoder."""

        def enter(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if sequence.has_visual:
                self._match(sequence.types.visual_BT, kwargs["inputs_embeds"])

        undo.callback(self._forget)
        undo.callback(self._projector.register_forward_hook(self._see, with_kwargs=True).remove)
        undo.callback(self._decoder.text.register_forward_pre_hook(enter, with_kwargs=True).remove)
        if self._around is not None:
            undo.callback(self._around.register_forward_hook(self._see_order).remove)

    def ordered(self, rows_ND: Tensor) -> Tensor:
        """Return a projector's rows in the order of the visual rows of the current forward."""
        return rows_ND if self._order_N is None else rows_ND.index_select(0, self._order_N.to(rows_ND.device))

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        self._forget()
        self.seen = args[0] if args else next(iter(kwargs.values()))
        self._projected_ND = output.flatten(0, -2)
        if self._around is None:
            return None
        # The module around the projector reorders its rows: it reorders their numbers too, as further columns.
        numbers_N = torch.arange(len(output), device=output.device)
        digits_NX = torch.stack([numbers_N // _BASE**digit % _BASE for digit in range(_DIGITS)], dim=1)
        return torch.cat([output, digits_NX.to(output.dtype)], dim=1)

    def _see_order(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        rows_ND, digits_NX = output.pooler_output.tensor_split([-_DIGITS], dim=1)
        powers_X = _BASE ** torch.arange(_DIGITS, device=rows_ND.device)
        self._numbers_N = (digits_NX.long() * powers_X).sum(1)
        output.pooler_output = rows_ND
        return output

    def _match(self, visual_BT: Tensor, embeddings_BTD: Tensor) -> None:
        """Find which projected row each visual row of a forward is.

        Raises:
            ShortVError: they are not the rows that the projector returned last.
        """
        found_ND = embeddings_BTD[visual_BT.to(embeddings_BTD.device)]
        self._order_N = self._order(visual_BT)
        expected_ND = self.ordered(self._projected_ND).to(found_ND.device, found_ND.dtype)
        same = found_ND.shape == expected_ND.shape and ((found_ND == expected_ND) | found_ND.isnan()).all()
        if not same:
            raise ShortVError(
                f"the {len(found_ND)} visual tokens of this forward are not the {len(self._projected_ND)} of the last "
                "run of the vision tower, whose features the layers' projectors need; run this plan without reused "
                "vision features, with images or videos but not both"
            )

    def _order(self, visual_BT: Tensor) -> Tensor | None:
        counts, rows = visual_BT.sum(1).tolist(), len(self._projected_ND)
        copies = sum(counts) // rows if rows else 0
        if copies < 2 or sum(counts[::copies]) != rows:
            return self._numbers_N
        # Beams and several completions of a prompt repeat each sample.
        numbers_N = torch.arange(rows) if self._numbers_N is None else self._numbers_N
        return torch.cat([own_S for own_S in torch.split(numbers_N, counts[::copies]) for _ in range(copies)])
