"""Which positions of a forward are the prompt, where a prompt and its answer pass the model in one forward.

Learned systems that read a prompt must not read its answer. With a KV cache the first forward is the prompt. Without
one (training, log-likelihoods, generation with `use_cache=False`) the caller marks the prompt with `prompted`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn.functional import pad

from shortv.errors import ShortVError
from shortv.families.decoder import Decoder
from shortv.families.tokens import TokenTypes

_PROMPT = "_shortv_prompt"


@contextmanager
def prompted(decoder: Decoder, prompt_BT: Tensor) -> Iterator[None]:
    """Mark the prompt's positions for the forwards inside; padding among them is ignored.

    A forward may be longer than `prompt_BT`: the positions after it are not prompt.
    """
    state = decoder.text.__dict__
    before = state.get(_PROMPT)
    state[_PROMPT] = prompt_BT.bool()
    try:
        yield
    finally:
        state.pop(_PROMPT) if before is None else state.update({_PROMPT: before})


def is_prompted(decoder: Decoder) -> bool:
    """Whether the caller has marked the prompt's positions."""
    return _PROMPT in decoder.text.__dict__


def prompt_rows(decoder: Decoder, types: TokenTypes) -> Tensor:
    """Return which positions (B, T) of a sequence's first forward hold text or visual tokens of the prompt.

    Raises:
        ShortVError: `prompted` was given another batch.
    """
    given_BT: Tensor | None = decoder.text.__dict__.get(_PROMPT)
    if given_BT is None:
        return types.real_BT
    batch, length = types.real_BT.shape
    if len(given_BT) != batch or given_BT.shape[1] > length:
        raise ShortVError(
            f"the prompt's positions were given for {tuple(given_BT.shape)} tokens, the forward has "
            f"{(batch, length)}; give one row per sequence, and no more positions than the forward has"
        )
    return types.real_BT & pad(given_BT, (0, length - given_BT.shape[1])).to(types.real_BT.device)
