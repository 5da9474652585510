"""Masking of secrets in whatever is written down about a run."""

import re
from collections.abc import Mapping
from typing import Any

from reports.locations import masked_uri

MASK = "***"
_SECRET_NAME = re.compile(r"key|token|secret|password", re.IGNORECASE)
_PAIR = re.compile(r"([\w.-]*(?:key|token|secret|password)[\w.-]*)(\s*=\s*)([^,&\s]+)", re.IGNORECASE)
# A count of tokens, such as max_new_tokens=16, is what a language model reads.
_COUNT_NAME = re.compile(r"tokens$", re.IGNORECASE)
_COUNT = re.compile(r"\d{1,9}", re.ASCII)


def masked(value: Any, name: str = "") -> Any:
    """Return a JSON-like value with every secret in it replaced by `***`.

    Secret is what stands under a name that contains KEY, TOKEN, SECRET or PASSWORD, in a mapping or in a text
    such as `a=1,api_key=x`, and what stands before the `@` of a URI. Truth values, null and counts of tokens stay.
    """
    if isinstance(value, Mapping):
        return {str(key): masked(item, str(key)) for key, item in value.items()}
    if value is None or isinstance(value, bool):
        return value
    if _is_secret(name, value):
        return MASK
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    if isinstance(value, str):
        return _PAIR.sub(_masked_pair, masked_uri(value))
    return value


def _is_secret(name: str, value: Any) -> bool:
    counts = _COUNT_NAME.search(name) and _COUNT.fullmatch(str(value))
    return bool(_SECRET_NAME.search(name)) and not counts


def _masked_pair(pair: re.Match[str]) -> str:
    name, equals, value = pair.groups()
    return f"{name}{equals}{MASK if _is_secret(name, value) else value}"
