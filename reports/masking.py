"""Masking of secrets in whatever is written down about a run."""

import re
from collections.abc import Mapping
from typing import Any

from reports.locations import masked_uri

MASK = "***"
_SECRET_NAME = re.compile(r"key|token|secret|password", re.IGNORECASE)
_PAIR = re.compile(r"([\w.-]*(?:key|token|secret|password)[\w.-]*\s*=\s*)[^,&\s]+", re.IGNORECASE)


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
