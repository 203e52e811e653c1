"""Pictures that come in from outside: an allow-list of formats and a cap on pixels, both before decoding."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from safelight.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16 << 20  # 16.8 million, four times a 2048 px square
MAX_BYTES = 64 << 20
MAX_ASPECT = 8  # long edge over short edge, so at most eight squares are looked at
MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "PA", "RGBA")  # of PIL, beside 16-bit grey
_TURNS: dict[Any, Image.Transpose] = {  # by the orientation that Exif notes
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_picture(source: Any, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """A picture as uint8 (H, W, 3), or (H, W, 4) where it is transparent, from a path, encoded bytes, a PIL
    image or an array.

    The format is read from the content, the size from the header, and both are judged before a pixel is
    decoded; the orientation that a camera noted is applied. An animation is refused: one frame would speak
    for all. Raises ImageError, and TypeError for another kind of source.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] not in (3, 4) or 0 in source.shape:
            raise ImageError(
                f"an array must be uint8 (H, W, 3 or 4); got {source.dtype} {source.shape}; convert it"
            )
        _check_size(source.shape[1], source.shape[0], max_pixels)
        return source
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            source = file.read(MAX_BYTES + 1)  # a device has no end
    if not isinstance(source, bytes | bytearray | memoryview | Image.Image):
        raise TypeError(f"a picture is a path, bytes, a PIL image or an array; got {type(source).__name__}")
    if not isinstance(source, Image.Image) and len(source) > MAX_BYTES:
        raise ImageError(f"the picture has more than {MAX_BYTES} bytes, which is all that is read; shrink it")
    try:
        if isinstance(source, Image.Image):
            return _upright(source, max_pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source), formats=FORMATS) as opened:
                return _upright(opened, max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"the picture is none of {', '.join(FORMATS)}; convert it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as fault:
        raise ImageError(f"the picture is too large ({fault}); shrink it") from None
    except Exception as fault:  # Pillow lets through whatever its parsers raise: struct.error, TypeError
        raise ImageError(f"the picture cannot be decoded ({fault}); save it again") from None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            f"the picture has {width} x {height} pixels; at most {max_pixels} are decoded; shrink it"
        )
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"the picture is {width} x {height}; at most {MAX_ASPECT} to 1 is checked; crop it")


def _upright(image: Image.Image, max_pixels: int) -> NDArray[np.uint8]:
    _check_size(*image.size, max_pixels)
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise ImageError(f"the picture has {frames} frames; one is checked; save a single frame")
    # not ImageOps.exif_transpose, which writes all notes anew and so fails over an odd one
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    upright = image if turn is None else image.transpose(turn)
    if upright.mode.startswith("I;16"):
        return _from_16_bits(upright)
    if upright.mode not in MODES:
        raise ImageError(f"a picture's mode must be one of {MODES}; got {upright.mode}; convert it to RGB")
    clear = upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info
    pixels: NDArray[np.uint8] = np.asarray(upright.convert("RGBA" if clear else "RGB"))
    return pixels


def _from_16_bits(image: Image.Image) -> NDArray[np.uint8]:
    """16-bit grey by the upper 8 bits of each level: Pillow's conversion cuts at 255, and so shows white."""
    levels = np.asarray(image)
    grey = (levels >> 8).astype(np.uint8)
    clear = image.info.get("transparency")
    alpha = () if clear is None else (np.where(levels == clear, 0, 255).astype(np.uint8),)
    return np.stack([grey, grey, grey, *alpha], axis=-1)


def views(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Squares that together cover a picture, float32 (N, 3, S, S) in [0, 1], S its short edge.

    A checker looks at a square: of a long picture it would see the middle alone, and what is drawn in the
    colour of the ground below a transparent picture it would not see at all. So a long picture gives evenly
    spaced squares, and a transparent one gives each of them bare (readers that drop transparency show what it
    hides), on black and on white.
    """
    height, width = pixels.shape[:2]
    short, long = sorted((height, width))
    starts = np.linspace(0, long - short, -(-long // short)).round().astype(int)
    squares = [pixels[at : at + short] if height > width else pixels[:, at : at + short] for at in starts]
    shown = np.stack(squares).astype(np.float32) / np.float32(255)
    if pixels.shape[2] == 4:
        colour, alpha = shown[..., :3], shown[..., 3:]
        shown = np.concatenate([colour, colour * alpha, colour * alpha + (1 - alpha)])
    return np.ascontiguousarray(shown.transpose(0, 3, 1, 2))


def to_square(pixels: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """Shortest edge to `size`, centre crop, on black: uint8 (H, W, 3 or 4) -> float32 (3, size, size) in [0,
    1].
    """
    image = Image.fromarray(pixels)
    if pixels.shape[2] == 4:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return (np.asarray(fitted, dtype=np.float32) / np.float32(255)).transpose(2, 0, 1)
