import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mulki.data import decoding
from mulki.data.decoding import BadImage, decode, limit_pixels, pixel_limit, verify
from mulki.errors import InputError


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
FILES = {kind: _bytes(NOISE, kind) for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff")}


def _pixel(image: Image.Image) -> tuple[int, ...]:
    return image.getpixel((0, 0))  # type: ignore[return-value]


@pytest.mark.parametrize("mode, colour", [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))])
def test_transparent_pixels_turn_white(mode: str, colour: tuple[int, ...]) -> None:
    image = decode(_bytes(Image.new(mode, (4, 4), colour), "png"), "x")
    assert image.mode == "RGB" and _pixel(image) == (255, 255, 255)


def test_transparent_palette_entry_turns_white_and_the_others_stay() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    rgb = decode(_bytes(image, "png", transparency=0), "x")
    assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


def test_half_transparent_black_is_mid_grey() -> None:
    image = decode(_bytes(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "png"), "x")
    assert _pixel(image) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = decode(_bytes(Image.new(mode, (4, 4)), "tiff"), "x")
    assert image.mode == "RGB" and image.size == (4, 4)


def test_16_bit_grey_keeps_its_tones() -> None:
    image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    rgb = decode(_bytes(image, "png"), "x")
    assert np.asarray(rgb)[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("most", [4095, 65535])
def test_16_bit_pgm_keeps_its_tones(most: int) -> None:
    pixels = np.array([0, most // 2, most], dtype=">u2").tobytes()
    rgb = decode(b"P5\n3 1\n%d\n" % most + pixels, "x")
    assert np.asarray(rgb)[0, :, 0].tolist() == [0, 127, 255]


def _tiff(bits: int, white_is_zero: bool, rows: bytes) -> bytes:
    """Grey, 2 x 1, uncompressed."""
    tags = ((256, 2), (257, 1), (258, bits), (259, 1), (262, int(not white_is_zero)), (273, 8))
    tags = (*tags, (277, 1), (278, 1), (279, len(rows)))
    head = b"II*\0" + struct.pack("<I", 8 + len(rows))
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return head + rows + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("bits", "white_is_zero", "rows"),
    [
        (12, False, 0x640FFF.to_bytes(3, "big")),
        (16, False, struct.pack("<HH", 100 * 256, 65535)),
        (16, True, struct.pack("<HH", 155 * 256, 0)),
    ],
)
def test_grey_tiffs_keep_their_tones(bits: int, white_is_zero: bool, rows: bytes) -> None:
    rgb = decode(_tiff(bits, white_is_zero, rows), "x")
    assert np.asarray(rgb)[0, :, 0].tolist() == [100, 255]


def test_float_pixels_are_refused() -> None:
    with pytest.raises(BadImage, match="scan.tif.*32-bit"):
        decode(_bytes(Image.new("F", (2, 2)), "tiff"), "scan.tif")


@pytest.mark.parametrize("content", [b"", b"no image at all", FILES["png"][:-40]])
def test_bad_image_names_the_file_and_the_remedy_in_one_line(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    for check in (lambda: verify(path, str(path)), lambda: decode(path, str(path))):
        with pytest.raises(BadImage) as caught:
            check()
        assert str(path) in str(caught.value) and "replace the file" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_file_is_a_bad_image(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="^gone.jpg: "):
        verify(tmp_path / "gone.jpg", "gone.jpg")


def test_bad_image_is_an_input_error_and_survives_pickling() -> None:
    error = BadImage.at("a/b.jpg", "two\nlines")
    assert isinstance(error, InputError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(error).startswith("a/b.jpg: unreadable image (two lines)")


@pytest.mark.parametrize("kind", FILES)
def test_whole_files_pass(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(FILES[kind])
    verify(path, str(path))
    assert decode(path, "x").size == (24, 24)


def test_zeros_after_the_end_of_a_jpeg_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(FILES["jpeg"] + bytes(100))
    verify(path, str(path))
    assert np.array_equal(decode(path, "x"), decode(FILES["jpeg"], "x"))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(FILES)), share=st.floats(0, 0.999))
def test_what_verify_passes_of_a_cut_file_decodes(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "cut"
    path.write_bytes(FILES[kind][: int(share * len(FILES[kind]))])
    try:
        verify(path, str(path))
    except BadImage:
        return
    decode(path, "cut")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_cut_file_is_found(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "cut"
    path.write_bytes(FILES[kind][: int(share * len(FILES[kind]))])
    with pytest.raises(BadImage, match="cut"):
        verify(path, str(path))


@pytest.mark.parametrize("check", [decode, verify])
@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO", "PDF"])
def test_formats_that_are_not_named_are_no_images(
    check: Callable[[Path | bytes, str], object], kind: str
) -> None:
    with pytest.raises(BadImage, match="^x.jpg: "):
        check(_bytes(NOISE, kind), "x.jpg")


def test_postscript_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("started"))
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(BadImage):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "x.jpg")


@pytest.mark.parametrize("check", [decode, verify])
def test_pixels_are_limited(
    check: Callable[[Path | bytes, str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_max_pixels", decoding.MAX_PIXELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    large = _bytes(Image.new("1", (10_001, 10_000)), "png")
    assert len(large) < 50_000
    with pytest.raises(BadImage, match="10001 x 10000 .*89478485"):
        check(large, "x")
    limit_pixels(24 * 24 - 1)
    with pytest.raises(BadImage, match="24 x 24 pixels are more than 575, see --max-pixels"):
        check(FILES["png"], "x")
    limit_pixels(24 * 24)
    check(FILES["png"], "x")
    assert pixel_limit() == 24 * 24


@pytest.mark.parametrize("check", [decode, verify])
def test_thin_images_are_refused(check: Callable[[Path | bytes, str], object]) -> None:
    """Enlarged until its shorter side has 224 pixels, this one would have 450 million."""
    check(_bytes(Image.new("L", (3, 3000)), "png"), "x")
    with pytest.raises(BadImage, match="x: .*1 x 9000 pixels: one side is more than 1000 times"):
        check(_bytes(Image.new("L", (1, 9000)), "png"), "x")


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("check", [decode, verify])
def test_what_is_no_file_is_not_opened(
    check: Callable[[Path | bytes, str], object], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name in ("pipe.png", "zero.png", "loop.png"):
        with pytest.raises(BadImage, match="^x: "):
            check(tmp_path / name, "x")
