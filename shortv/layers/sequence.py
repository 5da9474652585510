"""Token types of the sequences that a model is working on, from prefill through decoding.

Both executors use it instead of the cache, whose layers a plan may shorten.
Shapes: B batch, T positions of this forward, K positions so far.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from shortv.errors import ShortVError
from shortv.families import Decoder
from shortv.families.tokens import TokenTypes, token_types
from shortv.layers.prompted import is_prompted, prompt_rows
from shortv.layers.rows import Selection, explicit_mask, may_attend
from shortv.layers.run import LearnedRun
from shortv.plan import Mode, Tokens, works_of

_HISTORY = "_shortv_history"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a plan knows of the sequences in a KV cache; an attribute of the cache holds it."""

    modes: tuple[Mode, ...]
    run: Hashable
    """The identity of the learned system's run, None where there is none."""
    visual_BK: Tensor
    has_visual: bool
    prompt: Selection
    """Text of the prompt."""
    prompt_length: int
    kept: tuple[Selection | None, ...] = ()
    """Positions of the prompt that each layer has K and V of, where exits have left it with fewer than all."""
    gathered: dict[Hashable, tuple[Tensor, ...]] = field(default_factory=dict)
    """What a learned system has gathered from each prompt (B first), by names of its own."""

    def of_rows(self, rows_R: Tensor) -> History:
        """Return the history of some of the sequences."""
        rows_R = rows_R.to(self.visual_BK.device)
        # Layers between two exits share a selection, so that they also share what is computed from it.
        narrowed = {id(kept): kept.of_rows(rows_R) for kept in self.kept if kept is not None}
        return replace(
            self,
            visual_BK=self.visual_BK[rows_R],
            prompt=self.prompt.of_rows(rows_R),
            kept=tuple(narrowed.get(id(kept)) for kept in self.kept),
            gathered={
                name: tuple(value[rows_R.to(value.device)] for value in values)
                for name, values in self.gathered.items()
            },
        )


def history_of(cache: Cache) -> History | None:
    """Return what a plan knows of the sequences in a KV cache; None for a cache filled without a plan."""
    history: History | None = getattr(cache, _HISTORY, None)
    return history


def keep_rows(cache: Cache, rows_R: Tensor) -> None:
    """Remove all other sequences of a batch from its KV cache and its history."""
    layers: list[Any] = cache.layers
    for layer in layers:
        # A model may be spread over several devices.
        if layer.is_initialized:
            layer.batch_select_indices(rows_R.to(layer.keys.device))
    history = history_of(cache)
    if history is not None:
        setattr(cache, _HISTORY, history.of_rows(rows_R))


class SequenceState:
    """Token types of the current forward and of all positions before it, observed by hooks on the whole model."""

    def __init__(self, decoder: Decoder, modes: Sequence[Mode], run: LearnedRun | None = None) -> None:
        self._decoder = decoder
        self._modes = tuple(modes)
        self._run = run
        self._shortens = any(work.keys is not Tokens.ALL for work in works_of(modes))
        """Whether a layer keeps no K and V of some tokens."""
        self._drops_visual = run is not None and run.drops_visual
        self._running = threading.Lock()
        self._thread: int | None = None
        self._entered = True
        self.types = TokenTypes(visual_BT=torch.empty(0), text_BT=torch.empty(0))
        self._uncached_BT: Tensor | None = None
        self.history: History
        self.past = 0
        """Positions before this forward."""
        self.has_visual = False
        """Whether this forward brings visual tokens."""

    @property
    def _identity(self) -> Hashable:
        return None if self._run is None else self._run.identity

    @property
    def prompt_BT(self) -> Tensor:
        """Text and visual tokens of the prompts, in a forward that begins sequences; see `layers.prompted`."""
        return prompt_rows(self._decoder, self.types)

    @property
    def visual_BK(self) -> Tensor:
        """Which positions so far hold visual tokens."""
        return self.history.visual_BK

    def attach(self, model: nn.Module) -> list[Any]:
        """Hook the model, and return the handles that undo it."""
        return [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._decoder.text.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._finish, with_kwargs=True, always_call=True),
        ]

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._running.acquire(blocking=False):
            raise ShortVError("this model is in the middle of a forward in another thread; take turns under a plan")
        self._thread = threading.get_ident()
        try:
            self.observe(_named(model, args) | kwargs)
        except BaseException:
            self._release()
            raise
        self._entered = False

    def _enter(self, *_: Any) -> None:
        if self._entered or self._thread != threading.get_ident():
            raise ShortVError(
                "the decoder was called without the model around it, so the types of its tokens are unknown; "
                "call model(...) or model.generate(...), not a part of it and not model.forward"
            )
        self._entered = True

    def _finish(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._thread != threading.get_ident():
            return
        cache = getattr(output, "past_key_values", None)
        if isinstance(output, tuple):
            cache = next((item for item in output if isinstance(item, Cache)), cache)
        if isinstance(cache, Cache):
            setattr(cache, _HISTORY, self.history)
        self._release()

    def _release(self) -> None:
        self._thread = None
        self._running.release()

    def observe(self, call: dict[str, Any]) -> None:
        """Begin a forward with these arguments.

        Raises:
            ShortVError: no `input_ids`, a cache that this plan has not filled, or what no plan can honour.
        """
        if any(layer.training for layer in self._decoder.layers):
            raise ShortVError("a layer is in training mode, where a plan would be silently wrong; call model.eval()")
        input_ids_BT = call.get("input_ids")
        if input_ids_BT is None:
            raise ShortVError("this forward has no input_ids, so visual tokens cannot be found; pass input_ids")
        cache = call.get("past_key_values")
        self._check_cached(input_ids_BT, cache)
        self.past = int(cache.get_seq_length()) if cache is not None else 0
        mask_BK = _key_mask(call.get("attention_mask"))
        mask_BT = None if mask_BK is None else mask_BK[:, -input_ids_BT.shape[1] :]
        # After the prompt a placeholder is a token like any other, unless an image comes with it.
        images = self.past == 0 or _brings_images(call)
        self.types = token_types(input_ids_BT, mask_BT, self._decoder.visual_ids if images else ())
        self.has_visual = images and bool(self.types.visual_BT.any())
        if self.has_visual and self.past:
            raise ShortVError(
                f"an image arrives after the first {self.past} positions of the sequence, where a plan cannot follow "
                "it; prefill all images in one forward (no prefill_chunk_size, no image in a later turn)"
            )
        if self.has_visual:
            self._check_text()
        self.history = self._started() if cache is None or not self.past else self._continued(cache)

    def _started(self) -> History:
        return History(
            modes=self._modes,
            run=self._identity,
            visual_BK=self.types.visual_BT,
            has_visual=self.has_visual,
            prompt=Selection.of(self.types.text_BT),
            prompt_length=self.types.text_BT.shape[1],
        )

    def _continued(self, cache: Cache) -> History:
        before = history_of(cache)
        batch = len(self.types.visual_BT)
        if before is None or (before.modes, before.run) != (self._modes, self._identity):
            raise ShortVError(
                f"the cache holds {self.past} positions that were not filled under this plan; "
                "prefill inside the plan's context"
            )
        seen = before.visual_BK.shape[1]
        if len(before.visual_BK) != batch or seen < self.past:
            raise ShortVError(
                f"the cache holds {self.past} positions of {batch} sequences, but the plan has seen {seen} of "
                f"{len(before.visual_BK)}; prefill inside the plan's context"
            )
        if seen > self.past and (self._drops_visual or self._shortens):
            raise ShortVError(
                "tokens were taken back from the cache (assisted generation, prompt lookup), which a plan that drops "
                "or skips cannot follow; generate without"
            )
        visual_BK = torch.cat([before.visual_BK[:, : self.past], self.types.visual_BT], dim=1)
        return replace(before, visual_BK=visual_BK, has_visual=before.has_visual or self.has_visual)

    def _check_cached(self, ids_BT: Tensor, cache: Cache | None) -> None:
        """Refuse generation without a KV cache where a learned system would read new tokens as prompt."""
        if self._run is None or not self._run.reads_prompt or is_prompted(self._decoder):
            return
        before_BT = self._uncached_BT
        if cache is None and before_BT is not None and torch.equal(before_BT.to(ids_BT.device), ids_BT[:, :-1]):
            raise ShortVError(
                f"tokens are generated without a KV cache, so {self._run.name} parts would take the answer "
                "for the prompt; generate with use_cache=True"
            )
        self._uncached_BT = ids_BT.clone() if cache is None else None

    def _check_text(self) -> None:
        if not bool(self.types.text_BT.any()):
            raise ShortVError("the prompts hold nothing but images; add text")
        last_B1 = self.types.last_B[:, None]
        drops = self._drops_visual or Mode.DROP_VISUAL in self._modes
        if drops and bool(self.types.visual_BT.gather(1, last_B1).any()):
            raise ShortVError("a prompt ends with an image, and the plan drops it before the answer; end with text")

    def mask_of(self, attention: nn.Module, mask: Tensor | None, device: torch.device) -> Tensor:
        """Return the 4D mask of one layer's attention in this forward; its columns are the last positions so far.

        The cache of a sliding layer holds its window alone, so without a mask such a layer attends to that window.
        """
        batch, queries = self.types.text_BT.shape
        keys = self.visual_BK.shape[1]
        window = getattr(attention, "sliding_window", None)
        if window and queries == 1:
            keys = min(keys, window)
        return explicit_mask(mask, batch=batch, queries=queries, keys=keys, device=device)


def _named(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Return the positional arguments of a forward by name."""
    if not args:
        return {}
    named = inspect.signature(type(model).forward).bind_partial(model, *args).arguments
    return dict(list(named.items())[1:])


def _brings_images(call: dict[str, Any]) -> bool:
    """Return whether a forward receives pixels, or features that `generate()` or the caller computed from them."""
    encoded = call.get("mm_encoder_outputs")
    features = list(encoded.values()) if isinstance(encoded, Mapping) else [encoded]
    pixels = [value for name, value in call.items() if name.startswith("pixel_values")]
    return any(value is not None for value in pixels + features)


def _key_mask(mask: Any) -> Tensor | None:
    """Return which keys are not padding, (B, K): the mask itself, or keys that a query of a 4D mask attends to."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask
    return may_attend(mask)[:, 0].any(1)
