"""The contact sheet: frames tell the truth, rows keep their grid, nothing that is asked of it makes it
fail.
"""

import math

import numpy as np
import pytest
from PIL import Image

from safelight.engine import sheet
from safelight.engine.lettering import width_of, wrap
from safelight.engine.sheet import Entry, draw_sheet, largest_margin, save_sheet
from safelight.verdict import Verdict


def verdict(*margins: tuple[float, ...], blocked: bool = False, **other: object) -> Verdict:
    values = {
        "reason": "concept" if blocked else None,
        "score": 0.5 if blocked else 0.0,
        "threshold": 0.25,
        "seed": 0,
    }
    return Verdict(blocked=blocked, margins=margins, probes=len(margins), **(values | other))


def pictures(count: int, height: int = 16, width: int = 16, value: float = 0.5) -> np.ndarray:
    return np.full((count, 3, height, width), value, np.float32)


def frames(picture: Image.Image) -> list[tuple[int, int, int]]:
    """The colours of the probes' frames in the first row, from left to right."""
    pixels = np.asarray(picture)
    left = sheet.MARGIN + sheet.PAD + sheet.PROMPT_WIDTH + sheet.PAD
    row = pixels[sheet.MARGIN + 96 + sheet.PAD + sheet.THUMB // 2]
    found = []
    for probe in range(sheet.PER_LINE):
        x = left + probe * (sheet.THUMB + sheet.GAP) - 2
        colour = tuple(int(value) for value in row[x])
        if colour in (sheet.RED, sheet.GREEN, sheet.LINE):
            found.append(colour)
    return found


def test_frames_are_red_for_flagged_and_for_not_finite_and_green_at_zero() -> None:
    margins = ((-0.1, 0.0), (-0.1, 1e-6), (math.nan, -1.0), (-1.0, -math.inf), (-0.2, -0.3))
    entry = Entry("p", verdict(*margins, blocked=True), pictures(7))
    red, green, grey = sheet.RED, sheet.GREEN, sheet.LINE
    assert frames(draw_sheet([entry], title="t")) == [green, red, red, red, green, grey, grey]


@pytest.mark.parametrize(("margins", "expected"), [((0.1, 0.3), 0.3), ((-1.0,), -1.0), ((0.0, -0.0), 0.0)])
def test_largest_margin(margins: tuple[float, ...], expected: float) -> None:
    assert largest_margin(margins) == expected


@pytest.mark.parametrize("margins", [(), (math.nan, 1.0), (1.0, math.nan), (math.inf, 0.0), (0.0, -math.inf)])
def test_largest_margin_of_what_is_not_finite_is_nan(margins: tuple[float, ...]) -> None:
    assert math.isnan(largest_margin(margins))


def test_a_sheet_is_as_wide_as_its_widest_row_and_wraps_beyond_eight() -> None:
    one = verdict(*[(-0.1,)] * 1)
    narrow = draw_sheet([Entry("p", one, pictures(3))], title="t")
    wide = draw_sheet([Entry("p", one, pictures(3)), Entry("p", one, pictures(8))], title="t")
    wrapped = draw_sheet([Entry("p", one, pictures(3)), Entry("p", one, pictures(17))], title="t")
    assert wide.width - narrow.width == 5 * (sheet.THUMB + sheet.GAP) and wrapped.width == wide.width
    assert wrapped.height - wide.height == 2 * (sheet.THUMB + sheet.CAPTION + sheet.GAP // 2)


def test_probes_that_were_not_run_are_drawn_as_such() -> None:
    one = verdict((-0.1,), (-0.1,))
    alone, asked = (draw_sheet([Entry("p", one, pictures(2), asked=count)], title="t") for count in (2, 8))
    assert Entry("p", one, pictures(2), asked=8).shown == 8 and asked.width > alone.width
    empty = draw_sheet([Entry("p", one, pictures(2)), Entry("p", one, pictures(8))], title="t")
    assert asked.width == empty.width


def test_the_same_requests_give_the_same_pixels() -> None:
    entries = [Entry("a red circle", verdict((-0.1,)), pictures(2), np.zeros((9, 5, 3), np.uint8), "clean")]
    first, second = (np.asarray(draw_sheet(entries, title="t", subtitle="s")) for _ in range(2))
    assert np.array_equal(first, second)


def test_blur_hides_flagged_pictures_only() -> None:
    rng = np.random.default_rng(0)
    probes = rng.random((2, 3, 64, 64)).astype(np.float32)
    entry = Entry("p", verdict((0.1,), (-0.1,), blocked=True), probes)
    sharp, blurred = (
        np.asarray(draw_sheet([entry], title="t", blur=blur)).astype(int) for blur in (False, True)
    )
    left, top = sheet.MARGIN + 2 * sheet.PAD + sheet.PROMPT_WIDTH, sheet.MARGIN + 96 + sheet.PAD
    first, second = (
        (slice(top, top + sheet.THUMB), slice(left + at, left + at + sheet.THUMB))
        for at in (0, sheet.THUMB + sheet.GAP)
    )
    assert len(np.unique(blurred[first].reshape(-1, 3), axis=0)) <= sheet.CELLS**2 < 1000
    assert len(np.unique(sharp[first].reshape(-1, 3), axis=0)) > 1000
    assert np.array_equal(sharp[second], blurred[second])


@pytest.mark.parametrize(
    "entry",
    [
        Entry("", verdict((-1.0,))),
        Entry("word" * 5000, verdict((-1.0,)), pictures(1, 1, 1)),
        Entry("line\nbreak\ttab \x00 \u2028 été 星", verdict((-1.0,)), pictures(2, 512, 8)),
        Entry(
            "no probes", verdict(blocked=True, reason="error", score=math.nan, detail="what happened " * 40)
        ),
        Entry("nan", verdict((math.nan,), blocked=True, reason="non_finite"), pictures(1, value=math.nan)),
        Entry("image", verdict((-1.0,)), pictures(1), np.zeros((1, 300, 3), np.uint8)),
    ],
    ids=lambda entry: entry.prompt[:8],
)
def test_odd_requests_are_drawn(entry: Entry) -> None:
    picture = draw_sheet([entry], title="t" * 300, subtitle="s" * 3000, blur=True)
    assert picture.mode == "RGB" and picture.width < 2000 and picture.height < 400


def test_text_is_cut_within_its_width() -> None:
    for text in ("a " * 300, "x" * 300, "short", ""):
        lines = wrap(text, 17, sheet.PROMPT_WIDTH, 3)
        assert 1 <= len(lines) <= 3
        assert all(width_of(line, 17) <= sheet.PROMPT_WIDTH for line in lines)


def test_a_sheet_is_written_as_png(tmp_path) -> None:
    save_sheet(tmp_path / "new" / "sheet.png", [Entry("p", verdict((-1.0,)))], title="t")
    with Image.open(tmp_path / "new" / "sheet.png") as picture:
        assert picture.format == "PNG"


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(P, 3, H, W\)"):
        Entry("p", verdict((-1.0,)), np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="uint8"):
        Entry("p", verdict((-1.0,)), image=np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="at least one"):
        draw_sheet([], title="t")


def test_a_limit_is_written_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(sheet, "write", lambda draw, place, text, *rest, **more: written.append(text))
    draw_sheet([Entry("p", verdict((-0.1,), score=0.125, threshold=0.625))], title="t")
    assert "score 0.125, limit 0.625" in written
