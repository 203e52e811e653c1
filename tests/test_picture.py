"""Pictures from outside: what is refused, when, and that nothing of what is read goes unseen."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from safelight.engine import picture
from safelight.engine.picture import FORMATS, MAX_ASPECT, MAX_PIXELS, read_picture, to_square, views
from safelight.errors import ImageError

RANDOM = np.random.default_rng(11).integers(0, 256, (24, 36, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file chunk by chunk, so that its header may claim anything."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_allowed_is_told_by_its_content(tmp_path: Path, kind: str) -> None:
    settings = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encoded(RANDOM, kind, **settings)
    (tmp_path / "a.gif").write_bytes(data)
    found = read_picture(tmp_path / "a.gif")
    assert found.dtype == np.uint8 and found.shape == RANDOM.shape
    assert kind == "JPEG" or np.array_equal(found, RANDOM)
    for same in (str(tmp_path / "a.gif"), data, bytearray(data), memoryview(data)):
        assert np.array_equal(read_picture(same), found)


PSD = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 8, 8, 8, 3) + bytes(12) + b"\0\0" + bytes(192)
OTHERS = {
    **{kind: encoded(RANDOM, kind) for kind in ("GIF", "BMP", "TIFF", "EPS", "ICO", "PPM", "TGA")},
    "PSD": PSD,
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "nothing": b"",
    "text": b"a red star",
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_format_is_refused_whatever_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(OTHERS[kind])
    for source in (path, OTHERS[kind]):
        with pytest.raises(ImageError, match="none of PNG, JPEG, WEBP; convert it"):
            read_picture(source)


def test_the_other_formats_are_real() -> None:
    """Pillow itself opens them: what refuses them is the allow-list."""
    for kind in ("GIF", "BMP", "TIFF", "EPS", "PSD"):
        assert Image.open(io.BytesIO(OTHERS[kind])).format == kind


@pytest.mark.parametrize("side", [60_000, 4097, 2**31 - 1])
def test_a_header_that_claims_too_much_is_refused_before_decoding(side: int) -> None:
    bomb = png(side, side, 8, 2, bytes(1 << 16))
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=r"(too large|at most 16777216 are decoded).*shrink it"):
            read_picture(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_sizes_at_the_limits() -> None:
    assert read_picture(np.zeros((4, 4 * MAX_ASPECT, 3), np.uint8)).shape == (4, 32, 3)
    for shape in ((4, 4 * MAX_ASPECT + 1, 3), (4 * MAX_ASPECT + 1, 4, 4)):
        with pytest.raises(ImageError, match=rf"is {shape[1]} x {shape[0]}; at most 8 to 1"):
            read_picture(np.zeros(shape, np.uint8))
        with pytest.raises(ImageError, match="at most 8 to 1"):
            read_picture(encoded(np.zeros(shape, np.uint8)))
    assert read_picture(encoded(RANDOM), max_pixels=24 * 36).shape == RANDOM.shape
    for source in (RANDOM, encoded(RANDOM), Image.fromarray(RANDOM)):
        with pytest.raises(ImageError, match="36 x 24 pixels; at most 863 are decoded"):
            read_picture(source, max_pixels=24 * 36 - 1)
    assert MAX_PIXELS == 4 * 2048 * 2048


def test_long_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(RANDOM)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    monkeypatch.setattr(picture, "MAX_BYTES", len(data))
    assert np.array_equal(read_picture(path), RANDOM)
    monkeypatch.setattr(picture, "MAX_BYTES", len(data) - 1)
    for source in (path, data, "/dev/zero"):
        with pytest.raises(ImageError, match="has more than .* shrink it"):
            read_picture(source)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((8, 8, 5), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"must be uint8 \(H, W, 3 or 4\); got"):
        read_picture(array)


def test_what_is_no_picture_at_all_is_a_type_error() -> None:
    for source in (None, 7, [1, 2], object()):
        with pytest.raises(TypeError, match=f"got {type(source).__name__}"):
            read_picture(source)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_refused(kind: str) -> None:
    data = encoded(RANDOM, kind)
    for length in (1, 10, 40, len(data) // 2, len(data) - len(data) // 8):
        with pytest.raises(ImageError):
            read_picture(data[:length])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=150, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_altered_files_are_read_or_refused_never_more(kind: str, edits: list[tuple[int, int]]) -> None:
    exif = Image.Exif()
    exif[0x112], exif[0x10E] = 6, "a note"
    data = bytearray(encoded(RANDOM[:8, :12], kind, exif=exif))
    for at, value in edits:
        data[at % min(len(data), 400)] = value
    try:
        found = read_picture(bytes(data))
    except ImageError:
        return
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] in (3, 4)


def test_an_odd_note_beside_the_orientation_does_no_harm() -> None:
    exif = Image.Exif()
    exif[0x112], exif[0x11A] = 6, 72.0
    data = encoded(RANDOM, "JPEG", exif=exif)
    ratio = struct.pack(">HHI", 0x11A, 5, 1)
    assert ratio in data
    found = read_picture(data.replace(ratio, struct.pack(">HHI", 0x11A, 2, 1)))
    assert found.shape == (36, 24, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FORMATS)
def test_the_noted_orientation_is_applied(kind: str, orientation: int) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255  # the upper left corner is white
    exif = Image.Exif()
    exif[0x112] = orientation
    found = read_picture(encoded(pixels, kind, exif=exif))
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(pixels),
    }[orientation]
    assert found.shape == upright.shape and np.abs(found.astype(int) - upright).mean() < 2


LEVELS = np.array([[0, 10, 128, 200, 255]] * 4, np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "PA", "RGBA"])
def test_modes_of_pillow(mode: str) -> None:
    found = read_picture(Image.fromarray(LEVELS * 0 + 255).convert("RGB").convert(mode))
    assert found.shape == (4, 5, 4 if mode in ("LA", "PA", "RGBA") else 3) and (found == 255).all()


@pytest.mark.parametrize("mode", ["I", "F", "La", "RGBa", "HSV", "LAB", "RGBX"])
def test_modes_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=f"got {mode}; convert it to RGB"):
        read_picture(Image.new(mode, (8, 8)))


def test_16_bit_grey_keeps_its_picture() -> None:
    """Cut at 255, everything brighter than 1/256 would be white, and whatever is drawn invisible."""
    levels = LEVELS.astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    found = read_picture(png(5, 4, 16, 0, rows))
    assert np.array_equal(found, np.repeat(LEVELS[..., None], 3, axis=2))
    assert np.array_equal(read_picture(Image.fromarray(levels)), found)
    clear = read_picture(png(5, 4, 16, 0, rows, (b"tRNS", struct.pack(">H", 128 * 257))))
    assert np.array_equal(clear[..., :3], found)
    assert np.array_equal(clear[..., 3], np.where(LEVELS == 128, 0, 255))


def test_colour_of_16_bits_is_read_by_its_upper_8() -> None:
    rows = b"".join(
        b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in LEVELS.astype(np.uint16) * 257
    )
    assert np.array_equal(read_picture(png(5, 4, 16, 2, rows)), np.repeat(LEVELS[..., None], 3, axis=2))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError):
        read_picture(Image.new("RGB", size))


def test_a_lazy_image_that_breaks_is_refused() -> None:
    data = encoded(RANDOM)
    with pytest.raises(ImageError, match="cannot be decoded"):
        read_picture(Image.open(io.BytesIO(data[: len(data) // 2])))


@pytest.mark.parametrize("ground", [0, 255])
def test_a_transparent_picture_is_seen_bare_on_black_and_on_white(ground: int) -> None:
    pixels = np.full((8, 8, 4), ground, np.uint8)  # what is opaque has the colour of one of the grounds
    pixels[..., 3] = 0
    pixels[2:6, 2:6, 3] = 255
    bare, black, white = views(read_picture(encoded(pixels)))
    assert {float(v) for v in np.unique(bare)} == {ground / 255}
    assert {float(v) for v in np.unique(black)} == {0.0, ground / 255}
    assert {float(v) for v in np.unique(white)} == {1.0, ground / 255}
    assert max(np.ptp(black), np.ptp(white)) == 1.0
    half = pixels.copy()
    half[..., :3], half[..., 3] = 200, 128
    bare, black, white = views(half)
    np.testing.assert_allclose(bare, 200 / 255, rtol=1e-6)
    np.testing.assert_allclose(black, 200 / 255 * 128 / 255, rtol=1e-6)
    np.testing.assert_allclose(white, 200 / 255 * 128 / 255 + 127 / 255, rtol=1e-6)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind: str) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(ImageError, match="2 frames; one is checked"):
        read_picture(buffer.getvalue())


def test_an_opaque_picture_is_seen_as_it_is() -> None:
    seen = views(RANDOM[:, :24])
    assert seen.shape == (1, 3, 24, 24) and seen.dtype == np.float32 and seen.flags.c_contiguous
    assert np.array_equal(seen[0].transpose(1, 2, 0), RANDOM[:, :24].astype(np.float32) / np.float32(255))


@settings(max_examples=150, deadline=None)
@given(short=st.integers(1, 24), data=st.data(), tall=st.booleans(), alpha=st.booleans())
def test_squares_cover_a_long_picture(short: int, data, tall: bool, alpha: bool) -> None:
    long = data.draw(st.integers(short, short * MAX_ASPECT))
    pixels = np.zeros((short, long, 4 if alpha else 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., -1] = np.arange(long), np.arange(short)[:, None], 255
    pixels = pixels.swapaxes(0, 1) if tall else pixels
    seen = views(pixels)
    squares = -(-long // short)
    assert seen.shape == (squares * (3 if alpha else 1), 3, short, short)
    for part in np.split(seen, 3) if alpha else [seen]:
        levels = np.rint(part * 255).astype(int).swapaxes(2, 3) if tall else np.rint(part * 255).astype(int)
        assert set(levels[:, 0].ravel()) == set(range(long))
        assert (levels[:, 1, :, 0] == np.arange(short)).all()


@pytest.mark.parametrize("shape", [(40, 40, 3), (40, 90, 3), (90, 40, 4), (7, 9, 4)])
def test_a_square_of_any_picture(shape: tuple[int, ...]) -> None:
    pixels = np.full(shape, 100, np.uint8)
    found = to_square(pixels, 16)
    assert found.shape == (3, 16, 16) and found.dtype == np.float32
    over_black = 100 / 255 if shape[2] == 4 else 1.0
    np.testing.assert_allclose(found, 100 / 255 * over_black, atol=1 / 255)
