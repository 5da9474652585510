"""Which positions of a forward are the prompt, where prompt and answer pass the model together.

Learned parts that judge a prompt must not see its answer. With a cache they cannot: its first forward is the prompt.
Where one forward brings both (training, the likelihood of a given answer, generation without a cache) the caller says
which is which.
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
    """Say for forwards inside which positions are the prompt's; padding may be among them, it is left out anyway.

    A forward may be longer: what follows the given positions is no prompt.
    """
    state = decoder.text.__dict__
    before = state.get(_PROMPT)
    state[_PROMPT] = prompt_BT.bool()
    try:
        yield
    finally:
        state.pop(_PROMPT) if before is None else state.update({_PROMPT: before})


def is_prompted(decoder: Decoder) -> bool:
    """Whether the caller has said which positions are the prompt's."""
    return _PROMPT in decoder.text.__dict__


def prompt_rows(decoder: Decoder, types: TokenTypes) -> Tensor:
    """The prompt's text and visual tokens among the positions of a sequence's first forward, (B, T).

    Raises:
        ShortVError: what `prompted` was given is of another batch.
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
