"""Local paths and URIs: one pyarrow file system for each, and a form of them that is safe to print."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs as pafs

from shortv.errors import Refused
from shortv.terminal import printable
from shortv.untrusted import is_unicode

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
# Credentials of object stores may hold slashes: `s3://ID:SECRET/WITH/SLASHES@bucket`.
_USER_INFO = re.compile(r"(?<=://)(?:[^/@\s]+|[^/@:\s]*:[^@\s]*)@")
_SECRET_QUERY = re.compile(r"([?&][^=&\s]*(?:key|token|secret|password)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


FILE_ERRORS = (OSError, pa.ArrowException)
"""What the file systems of pyarrow and fsspec raise when a place cannot be reached, read or written."""


class Location(NamedTuple):
    """A place in a file system; `local` is set when that is a local path."""

    filesystem: pafs.FileSystem
    path: str
    local: Path | None
    shown: str


def masked_uri(text: str) -> str:
    """Return the text with the user names, passwords and keys of its URIs masked."""
    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub("***@", text))


def locate(uri: str | os.PathLike[str]) -> Location:
    """Find the file system of a local path, or of a URI that pyarrow or else fsspec knows.

    Raises:
        Refused: neither library knows the scheme, or the URI is malformed.
    """
    text = os.fspath(uri)
    if not text:
        raise Refused("an empty path was given; give a local path or a URI such as s3://bucket/folder")
    if "\0" in text or not is_unicode(text):
        raise Refused(
            f"path {printable(repr(text), limit=80)} holds a NUL character or is not valid Unicode; correct it"
        )
    if text.startswith("file://"):
        text = _file_path(text)
    if not _SCHEME.match(text):
        local = _expanded(text).absolute()
        return Location(pafs.LocalFileSystem(), str(local), local, text)
    shown = masked_uri(text)
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
    except FILE_ERRORS as error:
        filesystem, path = _through_fsspec(text, shown, error)
    return Location(filesystem, path.rstrip("/"), None, shown)


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise Refused(f"path {printable(text, limit=80)} names no known home folder; give another one") from error


def _file_path(uri: str) -> str:
    try:
        return str(pafs.FileSystem.from_uri(uri)[1])
    except FILE_ERRORS as error:
        raise Refused(f"{uri} is not a usable file URI ({one_line(error)}); give a plain path") from error


def _through_fsspec(uri: str, shown: str, first: Exception) -> tuple[pafs.FileSystem, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError, OSError) as error:
        raise Refused(
            f"{shown} cannot be opened: pyarrow says {one_line(first)!r}, fsspec says {one_line(error)!r}; "
            "give a local path or a URI whose file system is installed"
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def one_line(error: BaseException) -> str:
    """Return the error's text on one line, without secrets, cut at 300 characters."""
    text = masked_uri(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
