"""Masking of secrets in whatever is written down about a run."""

import re
from collections.abc import Mapping
from typing import Any

from reports.locations import masked_uri

MASK = "***"
# Tokens in the plural, and a tokenizer, are what a language model reads: max_new_tokens is no secret.
_WORD = r"(?:key|token(?!s|i)|secret|password)"
_SECRET_NAME = re.compile(_WORD, re.IGNORECASE)
_PAIR = re.compile(rf"([\w.-]*{_WORD}[\w.-]*\s*=\s*)[^,&\s]+", re.IGNORECASE)


def masked(value: Any, name: str = "") -> Any:
    """Return a JSON-like value with every secret in it replaced by `***`.

    Secret is what stands under a name that contains KEY, TOKEN, SECRET or PASSWORD, in a mapping or in a text
    such as `a=1,api_key=x`, and what stands before the `@` of a URI. Truth values and null stay as they are.
    """
    if isinstance(value, Mapping):
        return {str(key): masked(item, str(key)) for key, item in value.items()}
    if value is None or isinstance(value, bool):
        return value
    if _SECRET_NAME.search(name):
        return MASK
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    if isinstance(value, str):
        return _PAIR.sub(rf"\1{MASK}", masked_uri(value))
    return value
