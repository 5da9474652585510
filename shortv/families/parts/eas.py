"""EAS's adapters: a PIA in each layer that skips its attention, an ordinary routed adapter in each that keeps it.

Source: "Not All Attention is Needed" (arXiv 2403.15226) and its released code. Shapes: B batch, T positions, D width,
R rank of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shortv.architecture import Architecture
from shortv.errors import Refused
from shortv.families.decoder import Decoder
from shortv.families.parts.base import Parts
from shortv.plan import Mode, PartsKind, modes_of_layers

STARTS = ("identity", "xavier")
_FFN = ("gate_proj", "up_proj", "down_proj", "act_fn")


@dataclass(frozen=True, slots=True, kw_only=True)
class EasSettings:
    """Which layers have which adapter, and what shape it has. Raises Refused on construction.

    During the search every layer has both; which one runs follows the layer's mode.
    """

    kept: tuple[int, ...]
    """Layers with the ordinary adapter, which runs where the mode is `full`."""
    skipped: tuple[int, ...]
    """Layers with a PIA, which runs where the mode is `skip-attention`."""
    kept_rank: int = 8
    pia_rank: int = 32
    groups: int = 2
    """Groups of the two up-projections."""
    scale: float = 1.0
    temperature: float = 10.0
    """Divides the logits of the routing."""
    start: str = "identity"
    """How a PIA's up-projections start: at zero (LaVIN), or Xavier (LLaVA-EAS). Those of kept layers start at zero.

    Zero by default: an untrained adapter then changes nothing, so training starts from the model itself.
    """
    scores: tuple[float, ...] = ()
    """How redundant the search found each layer's attention; none where it was not searched."""

    def __post_init__(self) -> None:
        for name, layers in (("kept", self.kept), ("skipped", self.skipped)):
            if len(set(layers)) != len(layers) or any(layer < 0 for layer in layers):
                raise Refused(f"the {name} layers {list(layers)} are not distinct numbers from 0 on; correct the list")
        for name, rank in (("kept_rank", self.kept_rank), ("pia_rank", self.pia_rank)):
            if self.groups < 1 or rank < 1 or rank % self.groups:
                raise Refused(f"{name} {rank} is not a positive multiple of {self.groups} groups; choose another rank")
        if not self.temperature > 0:
            raise Refused(f"the routing temperature is {self.temperature:g}; give a positive number")
        if self.start not in STARTS:
            raise Refused(f"unknown start {self.start!r} of the adapters; choose one of {', '.join(STARTS)}")

    def modes(self, num_layers: int) -> tuple[Mode, ...]:
        """The modes of the plan that runs with the parts, when the search has ended."""
        return modes_of_layers(Mode.SKIP_ATTENTION, self.skipped, num_layers)


class GroupedUp(nn.Module):
    """R -> D in groups: each group of outputs reads its own group of the bottleneck. Starts at zero."""

    def __init__(self, rank: int, width: int, groups: int) -> None:
        super().__init__()
        self._groups = groups
        self.weight = nn.Parameter(torch.zeros(width, rank // groups))
        self.bias = nn.Parameter(torch.zeros(width))

    @property
    def dense_DR(self) -> Tensor:
        """The weight as one matrix, zero between the groups."""
        block_diag: Callable[..., Tensor] = torch.block_diag
        return block_diag(*self.weight.chunk(self._groups))

    def forward(self, bottleneck_BTR: Tensor) -> Tensor:
        """Give (B, T, D)."""
        parts = zip(bottleneck_BTR.chunk(self._groups, dim=-1), self.weight.chunk(self._groups), strict=True)
        return torch.cat([linear(part, weight) for part, weight in parts], dim=-1) + self.bias


class Adapter(nn.Module):
    """A kept layer's routed adapter: y = x + s (w0 B + w1 D)(A x), with (w0, w1) = softmax(E mean(x) / t).

    x is the normed input of the attention; A is `down`, B `first`, D `second`, E `routing`.
    """

    def __init__(self, width: int, rank: int, *, groups: int, scale: float, temperature: float) -> None:
        super().__init__()
        self.scale, self._temperature = scale, temperature
        self.down = _down(width, rank)
        self.first = GroupedUp(rank, width, groups)
        self.second = GroupedUp(rank, width, groups)
        self.routing = nn.Linear(width, 2)

    def summary(self, mean_BD: Tensor) -> tuple[Tensor, ...]:
        """What a sample's tokens share, from the mean of its prompt's rows: the routing weights (B, 2)."""
        logits_B2: Tensor = self.routing(mean_BD.to(self.down.weight.dtype))
        return ((logits_B2.float() / self._temperature).softmax(-1).to(self.down.weight.dtype),)

    def bottleneck(self, normed_BTD: Tensor, *_: Tensor) -> Tensor:
        """What the up-projections read, (B, T, R); `_` is the summary."""
        return cast(Tensor, self.down(normed_BTD.to(self.down.weight.dtype)))

    def forward(self, normed_BTD: Tensor, *summary: Tensor) -> Tensor:
        """Give y, (B, T, D)."""
        bottleneck_BTR = self.bottleneck(normed_BTD, *summary)
        first_B11, second_B11 = summary[0][:, None, :].chunk(2, dim=-1)
        mixed_BTD: Tensor = first_B11 * self.first(bottleneck_BTR) + second_B11 * self.second(bottleneck_BTR)
        return normed_BTD + (self.scale * mixed_BTD).to(normed_BTD.dtype)


class Pia(Adapter):
    """A skipped layer's adapter: y = x + s (w0 B + w1 D)((C x + z) / 2), where z is the mean of A x.

    C is `down`, A `context`.
    """

    def __init__(self, width: int, rank: int, **options: Any) -> None:
        super().__init__(width, rank, **options)
        self.context = _down(width, rank)

    def summary(self, mean_BD: Tensor) -> tuple[Tensor, ...]:
        """The routing weights (B, 2) and the global information z (B, R): A is affine, so the mean can go first."""
        return (*super().summary(mean_BD), self.context(mean_BD.to(self.down.weight.dtype)))

    def bottleneck(self, normed_BTD: Tensor, *summary: Tensor) -> Tensor:
        """(C x + z) / 2."""
        return (super().bottleneck(normed_BTD) + summary[1][:, None]) / 2


class Eas(Parts):
    """The adapters of a model's layers."""

    kind: ClassVar[PartsKind] = PartsKind.EAS
    reads_prompt: ClassVar[bool] = True
    settings: EasSettings

    def __init__(self, settings: EasSettings, kept: dict[str, Adapter], skipped: dict[str, Pia]) -> None:
        super().__init__()
        self.settings = settings
        self.kept, self.skipped = nn.ModuleDict(kept), nn.ModuleDict(skipped)
        self.derived: dict[int, tuple[Any, Any]] = {}
        """What an executor made of a PIA's weights, with the state of the weights that it was made of."""

    @classmethod
    def build(cls, decoder: Decoder, settings: EasSettings) -> Self:
        """Make fresh adapters. Raises Refused for a family without a plain gated FFN, or layers that it has not."""
        check_family(decoder)
        outside = [layer for layer in (*settings.kept, *settings.skipped) if layer >= len(decoder.layers)]
        if outside:
            raise Refused(f"layer {outside[0]} does not exist: the model has {len(decoder.layers)}; correct the list")
        width = int(decoder.config.get_text_config().hidden_size)
        if width % settings.groups:
            raise Refused(f"{settings.groups} groups do not divide the model's width of {width}; choose another number")
        options = {"groups": settings.groups, "scale": settings.scale, "temperature": settings.temperature}

        def built(kind: Callable[..., Any], layers: tuple[int, ...], rank: int) -> Iterator[tuple[str, Any]]:
            for layer in layers:
                yield str(layer), kind(width, rank, **options).to(decoder.device(decoder.layers[layer]))

        kept = dict(built(Adapter, settings.kept, settings.kept_rank))
        skipped: dict[str, Pia] = dict(built(Pia, settings.skipped, settings.pia_rank))
        if settings.start == "xavier":
            for pia in skipped.values():
                nn.init.xavier_uniform_(pia.first.weight)
                nn.init.xavier_uniform_(pia.second.weight)
        return cls(settings, kept, skipped)

    @classmethod
    def parse_settings(cls, content: dict[str, Any]) -> EasSettings:
        """Read settings from parts.json. Raises Refused."""
        try:
            layers = {name: tuple(int(layer) for layer in content.pop(name)) for name in ("kept", "skipped")}
            kept, skipped = layers["kept"], layers["skipped"]
            scores = tuple(float(score) for score in content.pop("scores", ()))
            return EasSettings(kept=kept, skipped=skipped, scores=scores, **content)
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"these are no settings of EAS adapters ({error}); train the parts again") from error

    def costs(self, architecture: Architecture) -> dict[str, int]:
        """The weights that each token meets: of kept layers' adapters, and of PIAs as they run, folded into the FFN."""
        own, width, ffn = self.settings, architecture.hidden_size, architecture.intermediate_size
        kept = width * own.kept_rank + 2 * width * own.kept_rank // own.groups
        folded = width * own.pia_rank + 2 * ffn * (2 * own.pia_rank + 2)
        return {"adapter_weights": len(own.kept) * kept + len(own.skipped) * folded}


def check_family(decoder: Decoder) -> None:
    """Raise Refused unless adapters can be folded into the model's FFN: a gated one, without a norm behind it."""
    ffn = decoder.ffn(decoder.layers[0])
    if decoder.parts.ffn_post_norm is not None:
        raise Refused(
            f"EAS is not defined for {decoder.family.label}: its layers norm what the FFN gives before adding it; "
            "use a model with a Llama, Mistral or Qwen decoder"
        )
    missing = [name for name in _FFN if not hasattr(ffn, name)]
    if missing:
        raise Refused(
            f"EAS folds its adapters into a gated FFN, and that of {decoder.family.label}, {type(ffn).__name__}, has "
            f"no {missing[0]}; use a model with a Llama, Mistral or Qwen decoder"
        )


def _down(width: int, rank: int) -> nn.Linear:
    projection = nn.Linear(width, rank)
    nn.init.xavier_uniform_(projection.weight)
    nn.init.zeros_(projection.bias)
    return projection
