"""The picture of the processor benchmark: what it takes from the rows, and that it is drawn."""

from pathlib import Path

from safelight.bench.cpu_plot import draw, gather, read

ROW = {"shape": "R1 P8 256x256 full decoder", "provider": "openvino CPU int8", "x_diffusers": "3.5"}


def test_the_last_row_of_a_path_stands_and_what_is_no_ratio_is_left_out() -> None:
    rows = [
        ROW | {"x_diffusers": "9"},
        ROW,
        ROW | {"x_diffusers": ""},  # its memory
        ROW | {"provider": "openvino CPU int8, early exit"},
        ROW | {"shape": "R1 P1 256x256 full decoder"},
        ROW | {"shape": "128x128"},
        ROW | {"shape": "R1 P8 512x512 latent checker", "x_diffusers": "11"},
    ]
    assert gather(rows, 8) == {
        (256, "full decoder"): {"openvino CPU int8": 3.5},
        (512, "latent checker"): {"openvino CPU int8": 11.0},
    }


def test_a_file_is_drawn_and_one_that_says_nothing_is_not(tmp_path: Path) -> None:
    file, picture = tmp_path / "rows.csv", tmp_path / "deep" / "rows.png"
    file.write_text(",".join(ROW) + "\n" + ",".join(ROW.values()) + "\n", encoding="utf-8")
    draw(read(file, 8), 8, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert read(file, 2) == read(tmp_path / "none.csv", 8) == {}
