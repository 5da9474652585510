"""Readers of data from outside accept what is right and refuse what is damaged or too large, in one line."""

import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import EpsImagePlugin, Image
from pyarrow import parquet as pq

from shortv.errors import Refused, SampleError
from shortv.untrusted import image_size, no_other_programs, open_image, parse_json, parse_toml, read_file, read_parquet


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def test_json_is_read_as_it_stands() -> None:
    value = {"a": [1, -(2**63), 1.5, None, True, "é\u0000"], "b": {}}
    assert parse_json(json.dumps(value), what="x") == value


NESTED = ["[" * 100 + "]" * 100, "[" * 100_000, '{"a":' * 600 + "1" + "}" * 600]
NUMBERS = ["9" * 401, "-" + "9" * 5000, str(2**63), "1e999", "NaN", "[-Infinity]"]
TEXTS = ['{"a": 1, "a": 2}', '"\\ud800"', '{"\\ud800": 1}', "{", b"\xff\xfe\xff", ""]


@pytest.mark.parametrize("text", [*NESTED, *NUMBERS, *TEXTS], ids=lambda text: repr(text)[:20])
def test_bad_json_is_refused_in_one_short_line(text: str | bytes) -> None:
    with pytest.raises(Refused, match="manifest") as caught:
        parse_json(text, what="manifest")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_a_repeated_key_among_many_is_found_in_one_pass() -> None:
    text = "{" + ",".join(f'"{number}":0' for number in range(400_000)) + ',"399999":0}'
    with pytest.raises(Refused, match="repeats the key '399999'"):
        parse_json(text, what="manifest")


@pytest.mark.parametrize(
    "text",
    [b"a = " + b"9" * 401, b"a = 1e999", b"a = " + b"[" * 2000, b"\xff", b"a"],
)
def test_bad_toml_is_refused(text: bytes) -> None:
    with pytest.raises(Refused):
        parse_toml(text, what="recipe")


def test_files_are_bounded_and_must_be_regular(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    assert read_file(tmp_path / "a", what="plan", limit_bytes=5) == b"12345"
    for path, limit in [("a", 4), ("missing", 9), ("fifo", 9), ("", 9), ("loop", 9), ("x\0y", 9), ("\ud800", 9)]:
        with pytest.raises(Refused):
            read_file(os.path.join(tmp_path, path), what="plan", limit_bytes=limit)
    with pytest.raises(Refused):
        read_file("/dev/zero", what="plan")


def test_parquet_counts_decoded_bytes_and_rows() -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": ["x" * 1000] * 200_000, "n": list(range(200_000))}), sink, compression="zstd")
    data = sink.getvalue()
    assert len(data) < 2 << 20
    table = read_parquet(data, what="table", columns=["n"])
    assert table.column_names == ["n"] and table["n"].to_pylist() == list(range(200_000))
    bounds: list[dict[str, Any]] = [{"max_bytes": 10 << 20}, {"max_rows": 199_999}, {"columns": ["missing"]}]
    damaged: list[bytes] = [b"", b"PAR1" + bytes(100) + b"PAR1", data[:-100], b"no parquet"]
    for content, options in [*((data, bound) for bound in bounds), *((content, {}) for content in damaged)]:
        with pytest.raises(Refused):
            read_parquet(content, what="table", **options)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "CMYK"])
def test_images_come_as_rgb(mode: str) -> None:
    image = Image.effect_noise((20, 10), 90).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert image_size(data) == (20, 10)
    with Image.open(io.BytesIO(data)) as expected:
        assert open_image(data).tobytes() == expected.convert("RGB").tobytes()
    assert open_image(image).tobytes() == image.convert("RGB").tobytes()


def test_images_of_16_bits_keep_their_brightness() -> None:
    values = [0, 255, 256, 32768, 40000, 65535]
    image = Image.frombytes("I;16", (6, 1), struct.pack("<6H", *values))
    for source in (encoded(image), encoded(image, "TIFF"), image):
        assert list(open_image(source).getchannel(0).tobytes()) == [value >> 8 for value in values]


def progressive_with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(Image.effect_noise((16, 16), 50), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[start:end] * count + data[end:]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "empty-image"),
        (encoded(Image.new("RGB", (1, 201))), "too-elongated"),
        (encoded(Image.new("1", (9500, 9500))), "too-large"),
        (progressive_with_scans(1500), "too-many-scans"),
        (encoded(Image.effect_noise((64, 64), 50))[:-200], "OSError"),
        (b"no image", "UnidentifiedImageError"),
        # Its reader would start Ghostscript.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "UnidentifiedImageError"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "unsupported-mode"),
    ],
)
def test_unusable_images_say_why(data: bytes, error: str) -> None:
    with pytest.raises(SampleError) as caught:
        open_image(data)
    assert (caught.value.stage, caught.value.error) == ("decode", error)


def test_ordinary_progressive_jpegs_are_read() -> None:
    whole = progressive_with_scans(0)
    assert open_image(whole).size == (16, 16)
    # Phones append a film to a photograph, and put a thumbnail into its header; bytes in both may look like scans.
    comment = b"\xff\xfe" + struct.pack(">H", 2002) + b"\xff\xda" * 1000
    assert open_image(whole[:2] + comment + whole[2:] + b"\xff\xda" * 1000).size == (16, 16)


def test_scans_cannot_hide_behind_bytes_that_decoders_skip() -> None:
    whole = progressive_with_scans(40)
    for skipped in (b"\xff\xff\xff", b"\xff\x00", b"\xff\xd0", b"\xff\x02\xff\xff", b"\xff\x01\xff\xff"):
        scan = whole.index(b"\xff\xda")
        with pytest.raises(SampleError) as caught:
            open_image(whole[:scan] + skipped + whole[scan:])
        assert caught.value.error == "too-many-scans"


def test_contexts_of_threads_that_overlap_do_not_end_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    first, second = no_other_programs(), no_other_programs()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert EpsImagePlugin.gs_binary is False
    second.__exit__(None, None, None)
    assert EpsImagePlugin.gs_binary == "gs"


def test_arrays_are_images_if_they_have_the_form_of_one() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    pixels.setflags(write=False)
    assert open_image(pixels).size == (3, 2) and open_image(pixels).tobytes() == pixels.tobytes()
    for bad in (pixels.astype(np.float32), pixels[..., :1], pixels[:, :, 0], pixels[:0]):
        with pytest.raises(SampleError, match="give uint8"):
            open_image(bad)
