"""Local paths and URIs as pyarrow file systems, and the masking of secrets in whatever is written down or shown."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
from pyarrow import fs as pafs

from shortv.errors import Refused
from shortv.terminal import printable
from shortv.untrusted import is_unicode

FILE_ERRORS: Final = (OSError, pa.ArrowException)
"""What the file systems of pyarrow and fsspec raise when a place cannot be reached, read or written."""
MASK: Final = "***"
_SCHEME: Final = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
# Credentials of object stores may hold slashes: `s3://ID:SECRET/WITH/SLASHES@bucket`.
_USER_INFO: Final = re.compile(r"(?<=://)(?:[^/@\s]+|[^/@:\s]*:[^@\s]*)@")
_SECRET: Final = "key|token|secret|password"
_SECRET_NAME: Final = re.compile(_SECRET, re.IGNORECASE)
_SECRET_QUERY: Final = re.compile(rf"([?&][^=&\s]*(?:{_SECRET})[^=&\s]*=)[^&\s]+", re.IGNORECASE)
_PAIR: Final = re.compile(rf"([\w.-]*(?:{_SECRET})[\w.-]*)(\s*=\s*)([^,&\s]+)", re.IGNORECASE)
# A count of tokens, such as max_new_tokens=16, is what a language model reads.
_COUNT_NAME: Final = re.compile(r"tokens$", re.IGNORECASE)
_COUNT: Final = re.compile(r"\d{1,9}", re.ASCII)


class Location(NamedTuple):
    """A place in a file system; `local` is set when that is a local path, `shown` contains no secrets."""

    filesystem: pafs.FileSystem
    path: str
    local: Path | None
    shown: str


def locate(uri: str | os.PathLike[str]) -> Location:
    """Find the file system of a local path, or of a URI that pyarrow or else fsspec knows.

    Raises:
        Refused: neither library knows the scheme, or the path or URI is malformed.
    """
    text = os.fspath(uri)
    if not text:
        raise Refused("an empty path was given; give a local path or a URI such as s3://bucket/folder")
    if "\0" in text or not is_unicode(text):
        problem = "holds a NUL character or is not valid Unicode; correct it"
        raise Refused(f"path {printable(repr(text), limit=80)} {problem}")
    try:
        if text.startswith("file://"):
            text = str(pafs.FileSystem.from_uri(text)[1])
        if not _SCHEME.match(text):
            local = Path(text).expanduser().absolute()
            return Location(pafs.LocalFileSystem(), str(local), local, text)
    except (*FILE_ERRORS, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        place = printable(masked_uri(text), limit=80)
        raise Refused(f"path {place} cannot be used: {one_line(error)}; give another one") from error
    shown = masked_uri(text)
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except FILE_ERRORS as first:
        import fsspec

        try:
            found, path = fsspec.core.url_to_fs(text)
        except (ValueError, ImportError, OSError) as error:
            raise Refused(
                f"{shown} cannot be opened: pyarrow says {one_line(first)!r}, fsspec says {one_line(error)!r}; "
                "give a local path or a URI whose file system is installed"
            ) from error
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(found))
    return Location(filesystem, path.rstrip("/"), None, shown)


def one_line(error: BaseException) -> str:
    """Return the error's text on one printable line, without secrets, cut at 300 characters."""
    return printable(masked_uri(" ".join(str(error).split())) or type(error).__name__, limit=300)


def masked_uri(text: str) -> str:
    """Return the text with the user names, passwords and keys of its URIs masked."""
    return _SECRET_QUERY.sub(rf"\1{MASK}", _USER_INFO.sub(f"{MASK}@", text))


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
