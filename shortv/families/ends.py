"""What ends an answer."""

from __future__ import annotations

from collections.abc import Sequence

from shortv.families.loading import LoadedModel


def end_tokens(loaded: LoadedModel, stops: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """The tokens that end an answer, the model's own and stops that are special tokens; and the stops that are text."""
    tokenizer = loaded.processor.tokenizer
    own = loaded.model.generation_config.eos_token_id
    ids = [own] if isinstance(own, int) else list(own or ())
    ids += [tokenizer.eos_token_id] if not ids and tokenizer.eos_token_id is not None else []
    if not stops:
        return list(dict.fromkeys(ids)), ()
    # Texts leave out all of these, while all_special_tokens knows only those that have a name or are listed.
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    ids += [tokenizer.convert_tokens_to_ids(stop) for stop in stops if stop in special]
    return list(dict.fromkeys(ids)), tuple(stop for stop in stops if stop not in special)
