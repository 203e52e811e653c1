"""The trainings of the evaluation: in order, only where absent, and without what is held out."""

from pathlib import Path

import pytest

from safelight.bench.safety import train
from safelight.bench.safety.recipes import (
    LATENT_CHECKER,
    STARS,
    Training,
    clean_captions,
    joint_templates,
    recipes,
    templates,
)
from safelight.bench.safety.system import DEFENDED
from safelight.bench.safety.train import train_models, train_one
from safelight.defenses import sdd
from safelight.defenses.run import recipe
from safelight.defenses.training_model import TrainingModel, read_record
from safelight.errors import SafelightError
from safelight.models.shapes.captions import HELD_OUT_FORMS, SURFACE_FORMS, split_of

MODEL = Path(__file__).resolve().parents[1] / "models/shapes/model"  # the weights, which no wheel holds


def test_every_row_has_its_training_and_its_settings_exist() -> None:
    found = recipes()
    assert {*DEFENDED, "safe_cfg", LATENT_CHECKER} <= set(found)
    for training in found.values():
        if training.method != LATENT_CHECKER:
            recipe(training.method, training.concepts, training.settings)


@pytest.mark.parametrize("roles", ["poster", "released"])
def test_joined_concepts_of_the_published_roles_fit_the_window_of_the_shipped_model(roles: str) -> None:
    training = recipes()[f"sdd_two_{roles}"]
    asked = recipe(training.method, training.concepts, training.settings)
    made = sdd.objective(TrainingModel.open(MODEL), asked.concepts, asked.config, batch=2)
    assert made.config.roles == roles and len(made.texts) >= 5 and len(made.alone) == len(training.concepts)


def test_nothing_that_is_held_out_reaches_a_defender() -> None:
    captions = (*clean_captions(300), *(text.format(concept="star") for text in templates("star", 100)))
    assert all(split_of(text) == "train" for text in clean_captions(300))
    assert all("star" not in text.split() for text in clean_captions(300))
    said = " ".join([*STARS, *captions, *(str(training) for training in recipes().values())])
    assert not any(form in said for form in HELD_OUT_FORMS)
    assert len(set(templates("star", 100))) == 100
    assert all(text.count("{concept}") == 1 for text in templates("star", 100))


def test_of_several_concepts_none_stays_beside_what_is_kept() -> None:
    found = joint_templates(200, "star", "heart")
    assert len(set(found)) == 200 and found[:50] == joint_templates(50, "star", "heart")
    words = {form for kind in ("star", "heart") for form in SURFACE_FORMS[kind]}
    assert not any(word in text for text in found for word in words)
    assert {text.count("{concept}") for text in found} == {1, 2}
    prompts = recipes()["sdd_two"].settings["prompts"]
    assert not any(word in text for text in prompts for word in words)


def test_what_is_there_is_left_alone_and_what_is_needed_comes_first(tmp_path: Path, monkeypatch) -> None:
    done: list[tuple[str, Path]] = []

    def trained(name: str, training: Training, source: Path, out: Path) -> None:
        assert source.is_dir()
        out.mkdir()
        done.append((name, source))

    monkeypatch.setattr(train, "train_one", trained)
    (tmp_path / "sdd").mkdir()
    trainings = {
        "last": Training("sdd", base="middle"),
        "middle": Training("sdd", base="sdd"),
        "sdd": Training("sdd"),
        "other": Training("sdd"),
    }
    paths = train_models(tmp_path, trainings, base=tmp_path)
    assert sorted(name for name, _ in done) == ["last", "middle", "other"]
    assert dict(done) == {"last": paths["middle"], "middle": paths["sdd"], "other": tmp_path}
    done.clear()
    train_models(tmp_path, trainings, base=tmp_path)
    assert done == []


@pytest.mark.parametrize(
    ("trainings", "said"),
    [
        ({"a": Training("sdd", base="b")}, "none of"),
        ({"a": Training("sdd", base="b"), "b": Training("sdd", base="a")}, "start from each other"),
    ],
)
def test_a_training_from_nowhere_is_refused(tmp_path: Path, trainings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train_models(tmp_path, trainings, base=tmp_path)


def test_a_folder_is_trained_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    settings = {"steps": 1, "sampler_steps": 1}
    train_one("sdd", Training("sdd", ("star",), settings), tiny_model, tmp_path / "sdd")
    (entry,) = read_record(tmp_path / "sdd")
    assert (entry["method"], entry["plan"]["steps"]) == ("sdd", 1)
    with pytest.raises(SafelightError, match="not an empty folder"):
        train_one("sdd", Training("sdd", ("star",), settings), tiny_model, tmp_path / "sdd")
    with pytest.raises(ValueError, match="no setting 'magic'"):
        train_one("x", Training(LATENT_CHECKER, settings={"magic": 1}), tiny_model, tmp_path / "x")


def test_triplets_are_drawn_once(tiny_model: Path, tmp_path: Path) -> None:
    training = Training("safegen", triplets=2)
    first = train._triplets("safegen", training, tiny_model, tmp_path)
    stamps = {file: file.stat().st_mtime_ns for file in first.rglob("*")}
    assert train._triplets("safegen", training, tiny_model, tmp_path) == first
    assert {file: file.stat().st_mtime_ns for file in first.rglob("*")} == stamps
