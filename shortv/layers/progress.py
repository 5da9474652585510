"""What the layers of one model share: the types of the tokens it is working on, rows, masks, and a learned system.

Both executors use it instead of the cache, whose layers a plan may shorten.
Shapes: B batch, T positions of this forward, K positions so far.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, StaticCache

from shortv.errors import Refused, ShortVError
from shortv.families import Decoder
from shortv.families.tokens import TokenTypes, token_types
from shortv.layers.cache import History, history_of, remember
from shortv.layers.rows import Selection, Split, explicit_mask, may_attend, restricted
from shortv.plan import Mode, Tokens, works_of

_PROMPT = "_shortv_prompt"


class LearnedRun:
    """What a learned system adds to a plan on one model: nothing, unless a system says otherwise.

    It may be given to `executing` again, but not twice at a time. The systems themselves are in `shortv.learned`.
    """

    name: str = ""
    """What messages call the system's parts."""
    identity: Hashable = None
    """Equal for runs that compute the same; a KV cache is continued under an equal run alone."""
    needs_tower: bool = False
    """Whether a prefill needs the vision tower to run: stored vision features are not enough."""
    reads_prompt: bool = False
    """Whether the system reads a sequence's prompt, and must not take generated tokens for it."""
    drops_visual: bool = False
    """Whether visual tokens may leave a sequence for good, beyond what the modes say."""

    def executor(self, index: int) -> Callable[..., Tensor] | None:
        """Return the forward of a layer, which takes a `PlannedLayer` first; None leaves the layer to the model."""
        raise NotImplementedError

    def attach(self, model: nn.Module, progress: Progress, undo: ExitStack) -> None:
        """Hook what is needed beside the layers."""

    def attach_reference(self, model: nn.Module, progress: Progress, hooks: ExitStack) -> None:
        """Hook the whole plan, modes included, onto dense layers: slow, and equal by definition."""
        raise NotImplementedError


class Progress:
    """The current forward and all positions before it, observed by hooks on the whole model."""

    def __init__(self, decoder: Decoder, modes: Sequence[Mode], run: LearnedRun | None = None) -> None:
        """Take one mode per layer. Raises Refused for another number of modes."""
        if len(modes) != len(decoder.layers):
            raise Refused(f"{len(modes)} modes for a model of {len(decoder.layers)} layers; give one mode per layer")
        self._decoder = decoder
        self._modes = tuple(modes)
        self._run = run or LearnedRun()
        self._drops_visual = self._run.drops_visual or Mode.DROP_VISUAL in modes
        self._shortens = self._drops_visual or any(work.keys is not Tokens.ALL for work in works_of(modes))
        """Whether a layer keeps no K and V of some tokens."""
        self._running = threading.Lock()
        self._thread: int | None = None
        self._entered = True
        self._uncached_BT: Tensor | None = None
        self.types = TokenTypes(visual_BT=torch.empty(0), text_BT=torch.empty(0))
        self.history: History
        self.past = 0
        """Positions before this forward."""
        self.length = 0
        """Positions of this forward."""
        self.has_visual = False
        """Whether this forward brings visual tokens."""
        self.joined = False
        """Whether every layer has to return all rows, because the caller asked for hidden states."""
        self._forget()

    def _forget(self) -> None:
        self.rows_BTD = torch.empty(0)
        """All rows, as the current run of layers found them or left them."""
        self._splits: dict[Tokens, Split] = {}
        self._columns: dict[tuple[int, int | None, int], tuple[Tensor | None, Tensor]] = {}

    @property
    def visual_BK(self) -> Tensor:
        """Which positions so far hold visual tokens."""
        return self.history.visual_BK

    @property
    def prompt_BT(self) -> Tensor:
        """Text and visual tokens of the prompts, in a forward that begins sequences.

        Raises:
            ShortVError: `prompted` was given another batch.
        """
        real_BT = self.types.real_BT
        given_BT: Tensor | None = self._decoder.text.__dict__.get(_PROMPT)
        if given_BT is None:
            return real_BT
        batch, length = real_BT.shape
        if len(given_BT) != batch or given_BT.shape[1] > length:
            raise ShortVError(
                f"the prompt's positions were given for {tuple(given_BT.shape)} tokens, the forward has "
                f"{(batch, length)}; give one row per sequence, and no more positions than the forward has"
            )
        return real_BT & pad(given_BT, (0, length - given_BT.shape[1])).to(real_BT.device)

    def attach(self, model: nn.Module, undo: ExitStack) -> None:
        """Hook the model until `undo` is closed."""
        undo.callback(model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        undo.callback(self._decoder.text.register_forward_pre_hook(self._enter).remove)
        undo.callback(model.register_forward_hook(self._finish, with_kwargs=True, always_call=True).remove)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._running.acquire(blocking=False):
            raise ShortVError("this model is in the middle of a forward in another thread; take turns under a plan")
        self._thread = threading.get_ident()
        try:
            named = inspect.signature(type(model).forward).bind_partial(model, *args).arguments if args else {}
            self._observe(model, {**named, **kwargs})
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
        outputs = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        for cache in outputs:
            if isinstance(cache, Cache):
                remember(cache, self.history)
        self._release()

    def _release(self) -> None:
        self._forget()
        self._thread = None
        self._running.release()

    def _observe(self, model: Any, call: dict[str, Any]) -> None:
        """Begin a forward with these arguments. Raises ShortVError for what no plan can honour."""
        cache, input_ids_BT = call.get("past_key_values"), call.get("input_ids")
        configs = (model.config, model.config.get_text_config())

        def asks_for(output: str) -> bool:
            return bool(call.get(output) or any(getattr(config, output, False) for config in configs))

        if isinstance(cache, StaticCache):
            raise ShortVError("a static cache has no room for layers of different lengths; use the dynamic cache")
        if asks_for("output_attentions"):
            raise ShortVError("a plan does not compute the attention of every row; leave output_attentions off")
        if any(layer.training for layer in self._decoder.layers):
            raise ShortVError("a layer is in training mode, where a plan would be silently wrong; call model.eval()")
        if input_ids_BT is None:
            raise ShortVError("this forward has no input_ids, so visual tokens cannot be found; pass input_ids")
        self._check_cached(input_ids_BT, cache)
        self.past, self.length = int(cache.get_seq_length()) if cache is not None else 0, input_ids_BT.shape[1]
        self.joined = asks_for("output_hidden_states")
        mask_BK = _key_mask(call.get("attention_mask"))
        # After the prompt a placeholder is a token like any other, unless an image comes with it.
        images = self.past == 0 or _brings_images(call)
        visual_ids = self._decoder.visual_ids if images else ()
        self.types = token_types(input_ids_BT, None if mask_BK is None else mask_BK[:, -self.length :], visual_ids)
        self.has_visual = images and bool(self.types.visual_BT.any())
        if self.has_visual:
            self._check_images()
        self.history = self._continued(cache) if cache is not None and self.past else self._started()

    def _check_cached(self, ids_BT: Tensor, cache: Cache | None) -> None:
        """Refuse generation without a KV cache where a learned system would read new tokens as prompt."""
        if not self._run.reads_prompt or _PROMPT in self._decoder.text.__dict__:
            return
        before_BT = self._uncached_BT
        if cache is None and before_BT is not None and torch.equal(before_BT.to(ids_BT.device), ids_BT[:, :-1]):
            raise ShortVError(
                f"tokens are generated without a KV cache, so {self._run.name} parts would take the answer "
                "for the prompt; generate with use_cache=True"
            )
        self._uncached_BT = ids_BT.clone() if cache is None else None

    def _check_images(self) -> None:
        if self.past:
            raise ShortVError(
                f"an image arrives after the first {self.past} positions of the sequence, where a plan cannot follow "
                "it; prefill all images in one forward (no prefill_chunk_size, no image in a later turn)"
            )
        if not bool(self.types.text_BT.any()):
            raise ShortVError("the prompts hold nothing but images; add text")
        if self._drops_visual and bool(self.types.visual_BT.gather(1, self.types.last_B[:, None]).any()):
            raise ShortVError("a prompt ends with an image, and the plan drops it before the answer; end with text")

    def _started(self) -> History:
        return History(
            modes=self._modes,
            run=self._run.identity,
            visual_BK=self.types.visual_BT,
            has_visual=self.has_visual,
            prompt=Selection.of(self.types.text_BT),
            prompt_length=self.length,
        )

    def _continued(self, cache: Cache) -> History:
        before, batch = history_of(cache), len(self.types.visual_BT)
        if (
            before is None
            or (before.modes, before.run) != (self._modes, self._run.identity)
            or len(before.visual_BK) != batch
            or before.visual_BK.shape[1] < self.past
        ):
            raise ShortVError(
                f"the cache holds {self.past} positions of {batch} sequences that were not filled under this plan; "
                "prefill inside the plan's context"
            )
        if before.visual_BK.shape[1] > self.past and self._shortens:
            raise ShortVError(
                "tokens were taken back from the cache (assisted generation, prompt lookup), which a plan that drops "
                "or skips cannot follow; generate without"
            )
        visual_BK = torch.cat([before.visual_BK[:, : self.past], self.types.visual_BT], dim=1)
        return replace(before, visual_BK=visual_BK)

    def split(self, tokens: Tokens) -> Split:
        """Return the rows of these tokens; layers of one forward share it."""
        if tokens not in self._splits:
            self._splits[tokens] = Split(self.types.among(tokens))
        return self._splits[tokens]

    def mask_of(self, attention: nn.Module, mask: Tensor | None, device: torch.device) -> Tensor:
        """Return the 4D mask of one layer's attention in this forward; its columns are the last positions so far.

        The cache of a sliding layer holds its window alone, so without a mask such a layer attends to that window.
        """
        batch, keys = self.visual_BK.shape
        window = getattr(attention, "sliding_window", None)
        if window and self.length == 1:
            keys = min(keys, window)
        return explicit_mask(mask, batch=batch, queries=self.length, keys=keys, device=device)

    def kept_columns(
        self, attention: nn.Module, mask: Tensor | None, device: torch.device, prompt: Selection | None = None
    ) -> Tensor:
        """Return the columns of the model's own mask for a layer that keeps some positions: (B, 1, T, kept).

        Layers of one kind receive the same mask and share the result.

        Args:
            prompt: positions of the prompt that the layer keeps; its text by default.
        """
        prompt = self.history.prompt if prompt is None else prompt
        key = (id(mask), getattr(attention, "sliding_window", None), id(prompt))
        if key not in self._columns:
            full = self.mask_of(attention, mask, device)
            batch, keys = self.visual_BK.shape
            generated_BS = torch.arange(self.history.prompt_length, keys, device=device).expand(batch, -1)
            kept_BS = torch.cat([prompt.index_BS.to(device), generated_BS], dim=1)
            valid_BS = pad(prompt.valid_BS.to(device), (0, generated_BS.shape[1]), value=True)
            # A sliding layer's mask has columns for the last positions alone.
            column_BS = kept_BS - (keys - full.shape[3])
            columns = torch.take_along_dim(full, column_BS.clamp(min=0)[:, None, None], dim=3)
            seen_BS = valid_BS & (column_BS >= 0)
            self._columns[key] = mask, restricted(columns, may_attend(columns) & seen_BS[:, None, None])
        return self._columns[key][1]


@contextmanager
def prompted(decoder: Decoder, prompt_BT: Tensor) -> Iterator[None]:
    """Mark the prompt's positions for the forwards inside, where a prompt and its answer pass in one forward.

    Learned systems that read a prompt must not read its answer. With a KV cache the first forward is the prompt;
    without one (training, log-likelihoods, generation with `use_cache=False`) the caller marks it. Padding among the
    positions is ignored, and a forward may be longer than `prompt_BT`: the positions after it are not prompt.
    """
    state = decoder.text.__dict__
    before = state.get(_PROMPT)
    state[_PROMPT] = prompt_BT.bool()
    try:
        yield
    finally:
        state.pop(_PROMPT) if before is None else state.update({_PROMPT: before})


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
    return mask if mask.dim() == 2 else may_attend(mask)[:, 0].any(1)
