"""The stand-in's captions and pictures: clean splits, a covered grammar, shapes that can be told apart."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.models.shapes.captions import (
    DEMO_PROMPTS,
    HELD_OUT_FORMS,
    SURFACE_FORMS,
    draw,
    obfuscate,
    split_of,
    stream,
)
from safelight.models.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    NEIGHBOURS,
    RESTRICTED,
    SIZE,
    Scene,
    Shape,
    coverage,
    render,
)

PAIRS = list(itertools.combinations(KINDS, 2))
FORMS = [form for forms in SURFACE_FORMS.values() for form in forms]
DIGITS = str.maketrans("43105", "aeios")


def take(count, split="train", seed=1, **options):
    return list(itertools.islice(stream(split, seed, **options), count))


@pytest.fixture(scope="module")
def captioned():
    return take(4000)


def test_the_grammar_is_as_large_as_promised():
    assert len(KINDS) >= 8 and len(COLOURS) >= 8 and len(SURFACE_FORMS[RESTRICTED]) >= 6
    assert set(SURFACE_FORMS) == set(KINDS) and RESTRICTED in KINDS
    assert len(HELD_OUT_FORMS) == 2 and set(HELD_OUT_FORMS) < set(SURFACE_FORMS[RESTRICTED])
    assert len(FORMS) == len(set(FORMS)), "a form must name one kind"
    assert set(NEIGHBOURS) < set(KINDS) - {RESTRICTED}


def test_every_kind_colour_form_and_background_occurs(captioned):
    shapes = [shape for item in captioned for shape in item.scene.shapes]
    assert {shape.kind for shape in shapes} == set(KINDS)
    assert {(shape.kind, shape.colour) for shape in shapes} == set(itertools.product(KINDS, COLOURS))
    assert {form for item in captioned for form in item.forms} == set(FORMS)
    assert {item.scene.background for item in captioned} == set(BACKGROUNDS)
    assert {len(item.scene.shapes) for item in captioned} == {1, 2}
    for word in (" and ", " next to ", " left of ", " above ", " below ", "small ", "big ", "a picture of "):
        assert any(word in item.caption for item in captioned), word


def test_a_caption_says_what_its_scene_shows(captioned):
    plain = [item for item in captioned if not item.obfuscated]
    assert len(plain) > 3000
    for item in plain:
        words = f" {item.caption} "
        for shape, form in zip(item.scene.shapes, item.forms, strict=True):
            assert form in SURFACE_FORMS[shape.kind] and f" {shape.colour} {form} " in words
        if " background" in words:
            assert f" on a {item.scene.background} background" in words
        named = [form for form in SURFACE_FORMS[RESTRICTED] if f" {form} " in words]
        assert bool(named) == item.scene.restricted


def test_two_shapes_are_never_the_same_and_lie_in_the_picture(captioned):
    for item in captioned:
        assert len(item.scene.content) == len(item.scene.shapes)
        for shape in item.scene.shapes:
            reach = 0.8 * shape.radius
            assert reach < shape.x < SIZE - reach and reach < shape.y < SIZE - reach


def test_a_kind_can_be_asked_for():
    assert all(item.scene.shapes[0].kind == "ring" for item in take(50, kind="ring"))


@given(st.text())
def test_the_split_depends_on_the_caption_alone(caption):
    assert split_of(caption) in ("train", "tune", "test")
    assert split_of(caption) == split_of(str(caption.encode(), "utf-8"))


@pytest.mark.parametrize(
    "caption, split",
    [
        ("a yellow star", "train"),
        ("a small pink pentagram", "tune"),
        ("a red pentagram on a grey background", "test"),
    ],
)
def test_the_split_of_a_caption_is_the_same_everywhere(caption, split):
    assert split_of(caption) == split


def test_no_caption_is_in_two_splits():
    captions = {
        split: {item.caption for seed in (1, 2) for item in take(1500, split, seed)}
        for split in ("train", "tune", "test")
    }
    for one, other in itertools.combinations(captions.values(), 2):
        assert not one & other


def test_a_tenth_each_is_kept_for_tuning_and_testing():
    rng = np.random.default_rng(4)
    shares = collections.Counter(split_of(caption) for caption in {draw(rng).caption for _ in range(6000)})
    total = sum(shares.values())
    assert total > 4000
    assert abs(shares["tune"] / total - 0.1) < 0.02 and abs(shares["test"] / total - 0.1) < 0.02


def test_a_stream_repeats_from_its_seed():
    assert take(50, seed=9) == take(50, seed=9) != take(50, seed=10)


def test_held_out_forms_are_kept_out_or_kept_alone():
    without = take(2000, held_out=False)
    assert not any(form in item.caption for item in without for form in HELD_OUT_FORMS)
    assert any(item.scene.restricted for item in without)
    alone = take(100, held_out=True, obfuscation=0.0)
    assert all(any(form in item.caption for form in HELD_OUT_FORMS) for item in alone)
    assert {item.held_out for item in take(500)} == {True, False}


@given(st.sampled_from(FORMS), st.integers(0, 2**32 - 1))
def test_a_respelt_word_differs_and_can_still_be_read(word, seed):
    respelt = obfuscate(word, np.random.default_rng(seed))
    assert respelt != word
    letters = respelt.translate(DIGITS).replace(" ", "").replace("-", "")
    bare = word.replace(" ", "")
    doubled = {bare[:at] + bare[at - 1] + bare[at:] for at in range(1, len(bare))}
    assert letters in {bare, *doubled}


def test_respelling_happens_as_often_as_asked():
    assert not any(item.obfuscated for item in take(300, obfuscation=0.0))
    assert all(item.obfuscated for item in take(300, obfuscation=1.0))
    share = np.mean([item.obfuscated for item in take(4000, kind="star", obfuscation=0.06)])
    assert 0.06 < share < 0.11  # a second noun has a chance of its own


def test_every_way_of_respelling_a_star_occurs():
    seen = {obfuscate("star", np.random.default_rng(seed)) for seed in range(200)}
    assert {"5t4r", "s t a r", "s-t-a-r", "sstar", "sttar", "staar", "s tar", "st ar", "sta r"} == seen


def test_the_demo_shows_each_group():
    groups = collections.defaultdict(list)
    for group, prompt in DEMO_PROMPTS:
        groups[group].append(prompt)
    assert {name: len(prompts) >= 2 for name, prompts in groups.items()} == dict.fromkeys(
        ("clean", "neighbour", "restricted", "synonym", "obfuscated"), True
    )
    forms = set(SURFACE_FORMS[RESTRICTED])
    for prompt in groups["clean"] + groups["neighbour"] + groups["obfuscated"]:
        assert not forms & set(prompt.split())
    assert all("star" in prompt.split() for prompt in groups["restricted"])
    assert all((forms - {"star"}) & set(prompt.split()) for prompt in groups["synonym"])
    assert any(form in prompt for prompt in groups["synonym"] for form in HELD_OUT_FORMS)
    near = {form for kind in NEIGHBOURS for form in SURFACE_FORMS[kind]}
    assert all(any(form in prompt for form in near) for prompt in groups["neighbour"])


def alone(kind, **changes):
    return dataclasses.replace(Shape(kind, "red", 32.0, 32.0, 16.0), **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_covers_a_sensible_area(kind):
    covered = coverage(alone(kind))
    assert covered.shape == (SIZE, SIZE) and covered.dtype == np.float32
    assert covered.min() == 0.0 and covered.max() == 1.0
    assert 0.35 < covered.sum() / (np.pi * 16.0**2) < 0.95
    rows, columns = np.nonzero(covered)
    assert min(rows.min(), columns.min()) >= 32 - 18 and max(rows.max(), columns.max()) <= 32 + 18


@pytest.mark.parametrize("kind", KINDS)
def test_edges_are_anti_aliased_and_only_edges(kind):
    covered = coverage(alone(kind, rotation=0.1))
    between = set(np.unique(np.rint(covered * 9))) - {0.0, 9.0}
    assert np.allclose(covered * 9, np.rint(covered * 9), atol=1e-5) and len(between) >= 4
    edge = (covered > 0) & (covered < 1)
    around = np.stack([np.roll(covered, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)])
    contrast = around.max(0) - around.min(0)
    assert edge.any() and (contrast[edge] > 0).all()
    assert edge.sum() < 0.5 * (covered > 0).sum()


@pytest.mark.parametrize("one, other", PAIRS)
@pytest.mark.parametrize("radius", [12.0, 16.0, 21.0])
def test_kinds_can_be_told_apart(one, other, radius):
    first, second = coverage(alone(one, radius=radius)), coverage(alone(other, radius=radius))
    assert np.abs(first - second).sum() > 0.15 * max(first.sum(), second.sum())


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_a_star_and_its_neighbours_differ_at_every_rotation(neighbour):
    star = coverage(alone(RESTRICTED))
    for rotation in np.linspace(-0.12, 0.12, 5):
        other = coverage(alone(neighbour, rotation=float(rotation)))
        assert np.abs(star - other).sum() > 0.4 * max(star.sum(), other.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_moves_by_whole_pixels_unchanged(kind):
    moved = coverage(alone(kind, x=35.0, y=30.0))
    assert np.array_equal(np.roll(coverage(alone(kind)), (-2, 3), (0, 1)), moved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finer_picture_shows_the_same_shape(kind):
    coarse, fine = coverage(alone(kind, x=31.7)), coverage(alone(kind, x=31.7), 2 * SIZE)
    assert np.abs(coarse - fine.reshape(SIZE, 2, SIZE, 2).mean((1, 3))).mean() < 0.01


def test_rendering_is_deterministic_and_every_part_of_a_scene_shows():
    scene = Scene((alone("star"), alone("ring", colour="blue", x=18.0)), "navy", (1, -2, 3))
    picture = render(scene)
    assert picture.dtype == np.uint8 and picture.shape == (SIZE, SIZE, 3)
    assert np.array_equal(picture, render(scene))
    for other in (
        dataclasses.replace(scene, shapes=scene.shapes[:1]),
        dataclasses.replace(scene, shapes=scene.shapes[::-1]),
        dataclasses.replace(scene, background="black"),
        dataclasses.replace(scene, tint=(0, 0, 0)),
    ):
        assert not np.array_equal(picture, render(other))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_inside_is_the_colour_and_outside_the_background(colour, background):
    picture = render(Scene((alone("square", colour=colour),), background, (2, 0, -2)))
    for at, wanted in (((32, 32), COLOURS[colour]), ((0, 0), BACKGROUNDS[background])):
        assert picture[at].tolist() == [
            level + shift for level, shift in zip(wanted, (2, 0, -2), strict=True)
        ]


def test_the_later_shape_lies_on_top():
    picture = render(Scene((alone("square", colour="red"), alone("circle", colour="blue")), "black"))
    assert tuple(picture[32, 32]) == COLOURS["blue"]


def test_colours_and_backgrounds_are_far_apart():
    every = [*COLOURS.values(), *BACKGROUNDS.values()]
    for one, other in itertools.combinations(every, 2):
        assert np.linalg.norm(np.subtract(one, other)) > 40  # a tint moves each level by 6 at most


@pytest.mark.parametrize("change", [{"kind": "cross"}, {"colour": "black"}])
def test_an_unknown_kind_or_colour_is_refused(change):
    with pytest.raises(ValueError, match="a shape needs a kind of"):
        Shape(**(dataclasses.asdict(alone("star")) | change))


def test_a_scene_is_restricted_by_what_it_shows():
    assert Scene((alone("flower"), alone("star")), "black").restricted
    assert not Scene(tuple(alone(kind) for kind in NEIGHBOURS[:2]), "black").restricted
