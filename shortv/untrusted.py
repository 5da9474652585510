"""Bounded readers for data that comes from outside: files, JSON, TOML, Parquet tables and images.

A file that a user, a client or another program provides can be damaged or hostile. Each reader here checks a bound
before it spends memory or time on the content, and reports a violation as one line. Code that reads such data uses
these readers and nothing else.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import re
import stat
import threading
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from shortv.errors import Refused, SampleError, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet as pq

MAX_TEXT_BYTES = 16 << 20
"""Largest JSON or TOML document, in bytes."""
MAX_DEPTH = 64
"""Deepest nesting of a JSON or TOML document."""
MAX_PIXELS = 89_478_485
"""Largest image, in pixels: the size from which on Pillow itself suspects a decompression bomb."""
MAX_ASPECT_RATIO = 200
"""Longest side of an image divided by the shortest. Processors that scale the shortest side to N pixels make at most
200 N^2 pixels of such an image (the limit of Qwen's processors)."""
MAX_JPEG_SCANS = 30
"""Most scans of a progressive JPEG. Encoders write about 10; each one costs a pass over the whole image."""
WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Image formats that the endpoint accepts, as Pillow names them."""
IMAGE_FORMATS = (*WEB_FORMATS, "TIFF")
"""Image formats of calibration samples. None of their decoders starts another program."""
# Markers of a JPEG from SOF on that have a length and content, or end the image; not restarts, which have neither.
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")


def read_file(path: str | os.PathLike[str], *, what: str, limit_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Return the content of a regular file of at most `limit_bytes` bytes.

    Args:
        what: what the file is, for messages ("plan", "recipe").

    Raises:
        Refused: the file cannot be read, is not a regular file, or is larger.
    """
    try:
        # Opening a FIFO would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Refused(f"{what} {str(path)!r:.200} is not a regular file; give a file")
            content = file.read(limit_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or one_line(error)
        raise Refused(f"cannot read {what} {str(path)!r:.200}: {reason}; check the path") from error
    if len(content) > limit_bytes:
        raise Refused(f"{what} {path} is larger than {limit_bytes} bytes; check that it is the right file")
    return content


def parse_json(data: str | bytes | bytearray, *, what: str, limit_bytes: int = MAX_TEXT_BYTES) -> Any:
    """Return the value of a JSON document.

    Raises:
        Refused: the document is longer than `limit_bytes`, not JSON, nested deeper than `MAX_DEPTH`, or holds a
            repeated key, NaN or Infinity, an integer beyond 64 bits, a number too large for a float, or text that is
            not valid Unicode.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in items:
            if key in content:
                raise Refused(f"{what} repeats the key {key!r:.80}; keep one of them")
            content[key] = value
        return content

    if len(data) > limit_bytes:
        raise Refused(f"{what} is longer than {limit_bytes} bytes; check that it is the right document")
    try:
        number = partial(_float, what=what)
        value = json.loads(data, object_pairs_hook=pairs, parse_constant=number, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what} is not valid JSON: {one_line(error)}; correct it") from error
    return _checked(value, what)


def parse_toml(data: bytes, *, what: str) -> dict[str, Any]:
    """Return the content of a TOML document. Raises Refused for what `parse_json` refuses too."""
    try:
        content = tomllib.loads(data.decode("utf-8"), parse_float=partial(_float, what=what))
    except UnicodeDecodeError as error:
        raise Refused(f"{what} is not UTF-8 text: {one_line(error)}; give a TOML file") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what} is not valid TOML: {one_line(error)}; correct it") from error
    return dict(_checked(content, what))


def _float(text: str, what: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refused(f"{what} holds {text:.20}, which is not a finite number; correct it")
    return value


def _checked(value: Any, what: str) -> Any:
    """Return the value unless it is nested too deeply or holds integers or text that others cannot read."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                children += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                children += item
            elif isinstance(item, int) and not -(2**63) <= item < 2**63:
                raise Refused(f"{what} holds the number {str(item)[:20]}..., which exceeds 64 bits; correct it")
            elif isinstance(item, str) and not is_unicode(item):
                raise Refused(f"{what} holds text that is not valid Unicode: {item!r:.80}; correct it")
        if not children:
            return value
        level = children
    raise Refused(f"{what} is nested more than {MAX_DEPTH} levels deep; correct it")


def is_unicode(text: str) -> bool:
    """Tell whether the text can be encoded: a lone surrogate cannot."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def open_parquet(source: Any, *, what: str) -> pq.ParquetFile:
    """Open a Parquet file and read its footer. Raises Refused if it is not a whole Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    try:
        opened = pa.BufferReader(source) if isinstance(source, bytes | bytearray | memoryview) else source
        # Arrow's reader threads may outlive the interpreter, which then aborts (apache/arrow#34314).
        return pq.ParquetFile(opened, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _not_parquet(what, error) from error


def _not_parquet(what: str, error: Exception) -> Refused:
    return Refused(f"{what} is not a whole Parquet file: {one_line(error)}; give a Parquet file")


def read_parquet(
    source: Any,
    *,
    what: str,
    columns: Sequence[str] | None = None,
    max_rows: int = 10_000_000,
    max_bytes: int = 8 << 30,
) -> pa.Table:
    """Return a Parquet table, reading no further than `max_rows` rows and `max_bytes` decoded bytes.

    Compressed sizes say little: a million equal rows take a few kilobytes. Rows are therefore decoded in batches, and
    the size of each batch follows from the largest value that its column chunks can hold.

    Args:
        source: a path, a file object, a pyarrow file, the bytes of a file, or what `open_parquet` returned.
        columns: the columns to read; all of them by default.

    Raises:
        Refused: the file is not a whole Parquet file, lacks a column, or exceeds a bound.
    """
    import pyarrow as pa
    from pyarrow import parquet as pq

    file = source if isinstance(source, pq.ParquetFile) else open_parquet(source, what=what)
    schema = file.schema_arrow
    missing = sorted(set(columns or ()) - set(schema.names))
    if missing:
        raise Refused(f"{what} lacks the columns {missing}, it has {schema.names}; give the right file")
    try:
        if file.metadata.num_rows > max_rows:
            raise Refused(f"{what} has {file.metadata.num_rows} rows, more than {max_rows}; give a smaller file")
        rows_per_batch = max(1, min(65536, max_bytes // max(_largest_chunk(file.metadata), 1)))
        batches, rows, size = [], 0, 0
        for batch in file.iter_batches(batch_size=rows_per_batch, columns=columns, use_threads=False):
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if rows > max_rows or size > max_bytes:
                raise Refused(f"{what} decodes to more than {max_bytes} bytes or {max_rows} rows; give a smaller file")
            batches.append(batch)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _not_parquet(what, error) from error
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns], metadata=schema.metadata)
    return pa.Table.from_batches(batches, schema=batches[0].schema if batches else schema)


def _largest_chunk(metadata: Any) -> int:
    """Return the uncompressed bytes of the largest column chunk: no single value in the file is larger."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    sizes = (group.column(column).total_uncompressed_size for group in groups for column in range(metadata.num_columns))
    return max(sizes, default=0)


def image_size(data: bytes, *, formats: Sequence[str] = IMAGE_FORMATS, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return the width and height of an encoded image, in pixels, without decoding its pixels.

    Raises:
        SampleError: as `open_image`, apart from damage that only decoding finds.
    """
    with _opened(data, formats, max_pixels) as image:
        width, height = image.size
        return width, height


def open_image(
    source: bytes | str | os.PathLike[str] | Image.Image | Image.SupportsArrayInterface,
    *,
    formats: Sequence[str] = IMAGE_FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Return an image in RGB, 8 bits per channel. Images of 16 bits per channel keep their high bytes.

    Args:
        source: an encoded image file, a path to one, a Pillow image, or a uint8 array (H, W, 3).
        formats: the formats to accept, as Pillow names them.

    Raises:
        SampleError: stage "decode". The file is empty, damaged, truncated or of another format, the array of another
            form, or it exceeds `max_pixels`, `MAX_ASPECT_RATIO` or `MAX_JPEG_SCANS`.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        _check_shape(source.size, max_pixels)
        return _rgb(source)
    if array := getattr(source, "__array_interface__", None):
        shape = array["shape"]
        if array["typestr"] != "|u1" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            found = f"is {array['typestr']} of shape {shape}"
            raise _unusable("not-an-image", f"the image array {found}; give uint8 of shape (height, width, 3)")
        _check_shape((shape[1], shape[0]), max_pixels)
        return Image.fromarray(cast("Image.SupportsArrayInterface", source))
    with _opened(source, formats, max_pixels) as image:
        return _rgb(image)


@contextmanager
def _opened(source: Any, formats: Sequence[str], max_pixels: int) -> Iterator[Image.Image]:
    from PIL import Image

    if not isinstance(source, bytes | bytearray | memoryview):
        try:
            source = read_file(source, what="image", limit_bytes=1 << 30)
        except Refused as error:
            raise _unusable("unreadable", str(error)) from error
    if not source:
        raise _unusable("empty-image", "the image has no bytes")
    if source[:2] == b"\xff\xd8" and _jpeg_scans(source) > MAX_JPEG_SCANS:
        raise _unusable("too-many-scans", f"the JPEG has more than {MAX_JPEG_SCANS} scans; encode it again")
    try:
        with warnings.catch_warnings(), _whole_images_only():
            # Below this module's own bound Pillow's warning says nothing, above it the check below refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source), formats=tuple(formats))
        with _whole_images_only(), image:
            _check_shape(image.size, max_pixels)
            yield image
    except SampleError:
        raise
    except Image.DecompressionBombError as error:
        raise _unusable("too-large", f"the image has more than {max_pixels} pixels; scale it down") from error
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error on damaged files
        message = f"the image of {len(source)} bytes cannot be decoded as {', '.join(formats)}: {one_line(error)}"
        raise _unusable(type(error).__name__, message) from error


def _jpeg_scans(data: bytes) -> int:
    """Count the scans of a JPEG up to its end, not those of a thumbnail in its header or of what follows the image."""
    at, scans = 2, 0
    while found := _JPEG_MARKER.search(data, at):
        at = found.end()
        marker = data[at - 1]
        if marker == 0xD9:
            break
        scans += marker == 0xDA
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return scans


def _check_shape(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _unusable(
            "too-large", f"the image has {width} x {height} pixels, {max_pixels} are allowed; scale it down"
        )
    if max(size) > MAX_ASPECT_RATIO * min(size):
        message = f"the image has {width} x {height} pixels; one side may be {MAX_ASPECT_RATIO} times the other at most"
        raise _unusable("too-elongated", f"{message}; crop it")


def _rgb(image: Image.Image) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    from PIL import Image

    if image.mode in ("I;16", "I;16L", "I;16B"):
        # Pillow's own conversion clips these to 255, so that almost everything becomes white.
        high = image.tobytes()[0 if image.mode == "I;16B" else 1 :: 2]
        return Image.frombytes("L", image.size, high).convert("RGB")
    darkest, brightest = cast("tuple[float, float]", image.getextrema())
    if image.mode == "I" and darkest >= 0 and brightest < 1 << 16:
        return image.point(lambda value: value / 256).convert("L").convert("RGB")
    raise _unusable("unsupported-mode", f"the image has pixels of mode {image.mode}; convert it to 8 bits per channel")


class _Setting:
    """An attribute of a module with another value while any thread is inside the context.

    Threads overlap: each one restoring what it found would end the context of the others.
    """

    def __init__(self, module: str, name: str, value: object) -> None:
        self._module, self._name, self._value = module, name, value
        self._lock = threading.Lock()
        self._inside = 0
        self._before: object = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        owner = importlib.import_module(self._module)
        with self._lock:
            if not self._inside:
                self._before = getattr(owner, self._name)
                setattr(owner, self._name, self._value)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    setattr(owner, self._name, self._before)


_whole_images_only = _Setting("PIL.ImageFile", "LOAD_TRUNCATED_IMAGES", False)
"""Makes a truncated file an error; some libraries tell Pillow, for the whole process, to fill it with grey."""
no_other_programs = _Setting("PIL.EpsImagePlugin", "gs_binary", False)
"""Keeps Pillow from starting another program inside third-party code that opens images by itself.

Its reader of EPS files runs Ghostscript on their content; inside this context such a file is an OSError.
"""


def _unusable(error: str, message: str) -> SampleError:
    return SampleError("decode", error, message)
