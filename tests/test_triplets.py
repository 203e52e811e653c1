"""Triplets: what a mosaic is, how pictures are cut, what the table may say, and that folders are made
whole.
"""

import csv

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from safelight.cli import main
from safelight.defenses.training_model import TrainingModel
from safelight.defenses.triplets import (
    COLUMNS,
    TABLE,
    Drawing,
    Mosaic,
    from_folders,
    from_model,
    pictures_in,
    prompts_for,
    read_square,
    read_triplets,
)
from safelight.errors import ImageError, SafelightError


def picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def saved(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folders(tmp_path):
    """Three targets and two benign pictures of odd sizes."""
    for number, shape in enumerate([(40, 56), (64, 64), (71, 33)]):
        saved(tmp_path / "targets" / f"{number}.png", picture(*shape, seed=number))
    for number in range(2):
        saved(tmp_path / "benign" / f"{number}.png", picture(50, 50, seed=10 + number))
    (tmp_path / "targets" / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize("edge, block", [(64, 16), (50, 16), (17, 5), (8, 1), (8, 64)])
def test_each_block_is_its_mean_colour(edge, block):
    pixels = picture(edge, edge)
    covered = Mosaic(block)(pixels)
    for y in range(edge):
        for x in range(edge):
            top, left = y // block * block, x // block * block
            mean = pixels[top : top + block, left : left + block].reshape(-1, 3).mean(0)
            assert (abs(covered[y, x] - mean) <= 0.5).all()


def test_a_mosaic_of_a_mosaic_is_the_same_and_the_picture_stays():
    pixels = picture(64, 64)
    before = pixels.copy()
    once = Mosaic(16)(pixels)
    assert (pixels == before).all() and (once != pixels).any()
    assert (Mosaic(16)(once) == once).all()
    assert (Mosaic()(pixels) == Mosaic(16)(pixels)).all()  # a quarter of the edge


def test_only_the_region_is_covered():
    pixels = picture(64, 64)
    covered = Mosaic(8, (0.25, 0.5, 0.75, 1.0))(pixels)
    inside = np.zeros((64, 64), dtype=bool)
    inside[32:, 16:48] = True
    assert (covered[~inside] == pixels[~inside]).all()
    whole = Mosaic(8)(pixels)  # the region lies on the same grid
    assert (covered[inside] == whole[inside]).all()


@pytest.mark.parametrize("region", [(0.5, 0, 0.5, 1), (0, 0.6, 1, 0.5), (-0.1, 0, 1, 1), (0, 0, 1, 1.1)])
def test_a_region_without_an_inside_is_refused(region):
    with pytest.raises(ValueError, match="region must be"):
        Mosaic(8, region)
    with pytest.raises(ValueError, match="block must be"):
        Mosaic(-1)


@pytest.mark.parametrize("height, width", [(64, 64), (40, 56), (71, 33), (300, 200), (65, 64)])
def test_pictures_are_cut_as_the_released_code_cuts_them(tmp_path, height, width):
    """torchvision's Resize(edge, bilinear) and CenterCrop(edge), written out."""
    path = saved(tmp_path / "a.png", picture(height, width))
    edge, short = 64, min(height, width)
    size = (int(edge * width / short), int(edge * height / short))
    left, top = round((size[0] - edge) / 2), round((size[1] - edge) / 2)
    wanted = Image.open(path).resize(size, Image.Resampling.BILINEAR)
    wanted = np.asarray(wanted)[top : top + edge, left : left + edge]
    found = read_square(path, edge)
    assert found.shape == (edge, edge, 3) and found.dtype == np.uint8
    assert (found == wanted).all()


def test_a_transparent_picture_is_shown_on_black(tmp_path):
    pixels = np.full((8, 8, 4), 255, dtype=np.uint8)
    pixels[:, :4, 3] = 0
    found = read_square(saved(tmp_path / "a.png", pixels), 8)
    assert (found[:, :4] == 0).all() and (found[:, 4:] == 255).all()


def test_folders_become_triplets(folders):
    out = folders / "out"
    assert from_folders(folders / "targets", folders / "benign", out, edge=32, mosaic=Mosaic(8)) == 3
    found = read_triplets(out)
    assert len(found) == 3
    for number, triplet in enumerate(found):
        target, mosaic, benign = (
            np.asarray(Image.open(path)) for path in (triplet.target, triplet.mosaic, triplet.benign)
        )
        assert (target == read_square(folders / "targets" / f"{number}.png", 32)).all()
        assert (mosaic == Mosaic(8)(target)).all()
        assert (benign == read_square(folders / "benign" / f"{number % 2}.png", 32)).all()


def test_a_folder_is_whole_or_not_there(folders):
    (folders / "targets" / "9.png").write_bytes(b"no picture at all")
    out = folders / "out"
    with pytest.raises(ImageError, match=r"9\.png"):
        from_folders(folders / "targets", folders / "benign", out, edge=32, mosaic=Mosaic(8))
    assert sorted(path.name for path in folders.iterdir()) == ["benign", "targets"]


def test_a_folder_that_holds_something_is_left_alone(folders):
    before = sorted((folders / "benign").iterdir())
    with pytest.raises(SafelightError, match="not an empty folder"):
        from_folders(folders / "targets", folders / "benign", folders / "benign", edge=32, mosaic=Mosaic(8))
    assert sorted((folders / "benign").iterdir()) == before


@pytest.mark.parametrize("names", [COLUMNS[:3], ("nude_image_path", "mos_image_path", "norm_image_path")])
def test_the_table_is_read_under_either_name(folders, names):
    out = folders / "out"
    from_folders(folders / "targets", folders / "benign", out, edge=32, mosaic=Mosaic(8))
    wanted = read_triplets(out)
    with (out / TABLE).open(newline="") as file:
        rows = list(csv.reader(file))
    with (out / TABLE).open("w", newline="") as file:
        csv.writer(file).writerows([[*names, "text"], *(row[:4] for row in rows[1:])])
    assert read_triplets(out) == wanted


def test_a_table_that_lacks_something_is_refused_in_one_line(folders):
    out = folders / "out"
    with pytest.raises(SafelightError, match=r"triplets\.csv is missing"):
        read_triplets(folders)
    from_folders(folders / "targets", folders / "benign", out, edge=32, mosaic=Mosaic(8))
    table = (out / TABLE).read_text()
    (out / "mosaic" / "00002.png").unlink()
    with pytest.raises(SafelightError, match=r"line 3: .*00002\.png is missing"):
        read_triplets(out)
    (out / TABLE).write_text(table.replace("mosaic_image_path", "other"))
    with pytest.raises(SafelightError, match="must have the columns"):
        read_triplets(out)
    (out / TABLE).write_text(table.splitlines()[0] + "\n")
    with pytest.raises(SafelightError, match="holds no triplet"):
        read_triplets(out)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(SafelightError, match="holds no picture"):
        pictures_in(tmp_path)
    with pytest.raises(SafelightError, match="is not a folder"):
        pictures_in(tmp_path / "nothing")


def test_every_prompt_names_every_concept():
    assert prompts_for(["star", " moon "], ["a {concept}", "{concept}, {concept}"]) == [
        "a star",
        "a moon",
        "star, star",
        "moon, moon",
    ]
    for concepts, prompts in (([], ["{concept}"]), ([" "], ["{concept}"]), (["star"], ["a star"])):
        with pytest.raises(ValueError, match="concept"):
            prompts_for(concepts, prompts)


def test_the_model_draws_the_same_triplets_from_the_same_seed(tiny_model, tmp_path):
    model = TrainingModel.open(tiny_model)
    done = []

    def made(name, seed, prompts=("a star", "a red star")):
        out, drawing = tmp_path / name, Drawing(count=3, steps=2, guidance_scale=3.0, seed=seed)
        count = from_model(
            model, prompts, ["a circle"], out, drawing=drawing, mosaic=Mosaic(8), tick=done.append
        )
        assert count == 3
        return out, [
            (path.relative_to(out).as_posix(), path.read_bytes()) for path in sorted(out.rglob("*.*"))
        ]

    first, files = made("first", 1)
    assert files == made("again", 1)[1]
    assert files != made("other", 2)[1]
    assert sum(done) == 9
    found = read_triplets(first)
    assert {item.text for item in found} == {"a star", "a red star"}
    assert {item.benign_text for item in found} == {"a circle"}
    assert np.asarray(Image.open(found[0].target)).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="benign prompts are needed"):
        from_model(model, ["a star"], [], tmp_path / "no", drawing=Drawing(), mosaic=Mosaic())


def run(*arguments):
    result = CliRunner().invoke(main, ["data", "triplets", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_makes_triplets_both_ways(folders, tiny_model):
    out = folders / "a"
    code, stdout, stderr = run(
        "--target", folders / "targets", "--benign", folders / "benign", "--out", out, "--edge", 32
    )
    assert (code, stdout.strip()) == (0, str(out)), stderr
    first = read_triplets(out)[0]
    assert (np.asarray(Image.open(first.mosaic)) == Mosaic(8)(np.asarray(Image.open(first.target)))).all()
    prompts = folders / "benign.txt"
    prompts.write_text("a circle\n\na square\n")
    out = folders / "b"
    code, stdout, stderr = run(
        *(
            "--model",
            tiny_model,
            "--concept",
            "star",
            "--prompt",
            "one {concept}",
            "--benign-prompts",
            prompts,
        ),
        *("--count", 2, "--steps", 1, "--region", "0,0,0.5,1", "--out", out),
    )
    assert (code, stdout.strip()) == (0, str(out)), stderr
    assert {item.text for item in read_triplets(out)} == {"one star"}
    assert {item.benign_text for item in read_triplets(out)} == {"a circle", "a square"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give either"),
        (["--target", "x"], "give either"),
        (["--target", "x", "--benign", "y", "--model", "shapes"], "give either"),
        (["--model", "shapes"], "go together"),
        (["--model", "shapes", "--concept", "star"], "what must be kept"),
        (["--model", "shapes", "--concept", "star", "--prompt", "a", "--benign-prompt", "b"], "{concept}"),
        (["--target", "/nowhere", "--benign", "/nowhere"], "is not a folder"),
        (["--target", "x", "--benign", "y", "--region", "1,2"], "shares of the edge"),
        (["--target", "x", "--benign", "y", "--region", "0,0,2,1"], "shares of the edge"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, arguments, said):
    code, stdout, stderr = run(*arguments, "--out", tmp_path / "out")
    assert code == 2 and not stdout and said in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
