"""Erasure without an attacker: what is asked for, and that an undefended model has lost nothing."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.bench.safety.erasure import captions, main, measure
from safelight.models.shapes.captions import HELD_OUT_FORMS, split_of

SHAPES = Path(__file__).resolve().parents[1] / "models/shapes"  # the weights, which no wheel holds
MODEL, ORACLE = SHAPES / "model", SHAPES / "oracle/model.safetensors"


@pytest.mark.parametrize(
    "kind, others", [("star", ("star",)), ("heart", ("star", "heart")), (None, ("star", "heart"))]
)
def test_captions_are_of_the_test_split_and_show_what_they_must(kind, others):
    items = captions(kind, others, 40)
    assert len(items) == 40 and {split_of(item.caption) for item in items} == {"test"}
    shown = [{shape.kind for shape in item.scene.shapes} for item in items]
    assert all(kind in kinds if kind else not kinds & set(others) for kinds in shown)
    assert not any(item.obfuscated or form in item.caption for item in items for form in HELD_OUT_FORMS)


def test_a_model_that_was_not_defended_draws_as_the_undefended_one():
    rows = list(measure({"same": MODEL}, ["star"], 6, base=MODEL, oracle=ORACLE))
    assert [row.figure for row in rows] == ["star drawn when asked for", "clean captions right"]
    for row in rows:
        assert row.hits == row.undefended_hits >= 4 and row.total == 6
        assert row.low95 < row.rate < row.high95 or row.rate in (row.low95, row.high95)


def test_a_model_whose_pictures_are_not_finite_has_no_row(tmp_path, capsys):
    """No star is seen in them, which says nothing of the defence."""
    broken = Path(shutil.copytree(MODEL, tmp_path / "broken"))
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"] = torch.full_like(weights["conv_out.bias"], torch.nan)
    save_file(weights, file)
    out = tmp_path / "rows.csv"
    words = ["--models", f"broken={broken}", "--base", str(MODEL), "--oracle", str(ORACLE)]
    assert main([*words, "--count", "2", "--out", str(out)]) == 1 and not out.exists()
    assert "broken: 2 of 2 pictures are not finite" in capsys.readouterr().err


def test_rows_are_added_to_the_file_under_one_header(tmp_path):
    out = tmp_path / "rows.csv"
    for name in ("first", "second"):
        words = ["--models", f"{name}={MODEL}", "--base", str(MODEL), "--oracle", str(ORACLE)]
        assert main([*words, "--count", "2", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [row["model"] for row in rows] == ["first", "first", "second", "second"]
    with pytest.raises(SystemExit):
        main(["--models", "nameless", "--out", str(out)])
