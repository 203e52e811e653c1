"""A run of the evaluation on the tiny model: resumes, refuses another manifest, and gives one table."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.safety import plots, table
from safelight.bench.safety.cells import Cells
from safelight.bench.safety.columns import columns_of
from safelight.bench.safety.crafting import Attack, attack_of, plain
from safelight.bench.safety.library import OpenedSystem
from safelight.bench.safety.oracle import OracleJudge
from safelight.bench.safety.prompts import Prompts
from safelight.bench.safety.run import Run, errors_above, manifest_of, measure
from safelight.bench.safety.settings import Settings, seed_of
from safelight.bench.safety.system import System, standard_rows
from safelight.engine.bundle import open_bundle
from safelight.errors import SafelightError
from safelight.models.shapes.captions import HELD_OUT_FORMS, split_of
from safelight.models.shapes.scene import NEIGHBOURS
from safelight.statistics import wilson

ORACLE = Path(__file__).resolve().parents[1] / "models/shapes/oracle/model.safetensors"
SETTINGS = Settings(count=3, tasks=2, steps=2, probe_steps=2, timed=1, guidance_scale=3.0)
CRAFTED: list[str] = []


def seedless(victim, base, tasks, settings):
    """One attempt on the generator with embeddings, one with latents that are not finite."""
    CRAFTED.append(str(victim))
    hidden = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    wild = np.full((4, 8, 8), np.nan, dtype=np.float32)
    return [Attempt(tasks[0], 3, hidden=hidden[:, : _width(base)]), Attempt(tasks[1], 4, latents=wild)]


def _width(model) -> int:
    return json.loads((Path(model) / "text_encoder/config.json").read_text())["hidden_size"]


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, tiny_bundle: Path) -> Run:
    bundle = open_bundle(tiny_bundle)
    systems = [
        System("none", tiny_model),
        System("checker", tiny_model, final_checker=True),
        System("crops1", tiny_model, detector="image", final_checker=True),
    ]
    rows = {system.name: OpenedSystem(system, tiny_model, bundle, "tiny") for system in systems}
    attacks = {
        "plain": Attack("plain", "generator", plain),
        "odd": Attack("odd", "generator", seedless),
        "at_checker": Attack("at_checker", "checker", plain),
        "at_probes": Attack("at_probes", "checker", plain, ("detector",)),
    }
    base = rows["none"]
    manifest = manifest_of(SETTINGS, Prompts.make(SETTINGS), OracleJudge(ORACLE), base)
    return Run(tmp_path / "run", SETTINGS, rows, base, attacks, manifest, ORACLE)


def results_of(run: Run) -> dict:
    return table.collect(run, {})


def without_times(results: dict) -> dict:
    for cells in results["cells"].values():
        cells["cost"] = {"calls": cells["cost"].get("calls")}
        for cell in cells.values():
            cell.pop("seconds", None)
    return results


def test_a_run_that_was_stopped_gives_the_table_of_one_that_was_not(run: Run, monkeypatch) -> None:
    whole = dataclasses.replace(run, out=run.out.with_name("whole"))
    whole.cells().open()
    measure(whole)

    run.cells().open()
    written = Cells.write
    left = [3]

    def stops(self, row, column, values):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        written(self, row, column, values)

    monkeypatch.setattr(Cells, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        measure(run)
    monkeypatch.setattr(Cells, "write", written)
    done = {path: path.stat().st_mtime_ns for path in run.out.glob("cells/*/*.json")}
    assert len(done) == 3
    assert table.NOT_MEASURED in json.dumps(results_of(run))
    run.cells().open()
    measure(run)
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert without_times(results_of(run)) == without_times(results_of(whole))
    CRAFTED.clear()
    measure(run)
    assert CRAFTED == []  # nothing is missing, so nothing is attacked


def test_the_table_holds_counts_intervals_reasons_and_errors(run: Run, tmp_path: Path) -> None:
    run.cells().open()
    measure(run)
    results = results_of(run)
    table.write(results, run.out)
    cells = results["cells"]
    for cell in table.measured(results).values():
        if "rate" in cell:
            rate = cell["rate"]
            assert (rate["low95"], rate["high95"]) == wilson(rate["hits"], rate["total"])
    odd = cells["none"]["attack:odd"]  # latents that are not finite: an error, not a safe picture
    assert (odd["rate"]["total"], odd["rate"]["errors"]) == (1, 1)
    assert odd["requests"][1]["outcome"] == "error"
    assert "checks pictures" in cells["none"]["attack:at_checker"]["empty"]
    assert "detector to adapt" in cells["checker"]["attack:at_probes"]["empty"]
    assert "rate" in cells["crops1"]["attack:at_probes"]
    assert "blocks" in cells["none"]["false_positives:clean"]["empty"]
    assert "undefended" in cells["crops1"]["frechet"]["empty"]
    assert cells["none"]["cost"]["calls"]["unet"] == 2 * SETTINGS.steps
    assert cells["crops1"]["cost"]["calls"]["safety_checker"] >= 1
    faults = errors_above(table.measured(results), 0.0)
    assert any("none, attack:odd: 1 of 2" in fault for fault in faults)
    assert errors_above(table.measured(results), 0.5) == []

    lines = list(csv.DictReader((run.out / "results.csv").open(encoding="utf-8")))
    line = next(item for item in lines if (item["row"], item["column"]) == ("none", "attack:odd"))
    assert (line["total"], line["errors"]) == ("1", "1")
    assert all(item["value"] or item["empty"] for item in lines)
    text = (run.out / "results.md").read_text(encoding="utf-8")
    assert re.search(r"\| none \| .*\(0/1, .*; 1 errors\)", text)

    assert {path.name for path in plots.plot_all(results, run.out)} == {
        "results.png",
        "false_positives.png",
        "cost.png",
    }
    table.publish(run.out, tmp_path / "published")
    published = json.loads((tmp_path / "published" / "safety.json").read_text(encoding="utf-8"))
    assert "requests" not in published["cells"]["none"]["attack:odd"]
    assert {path.suffix for path in (tmp_path / "published").iterdir()} == {".json", ".csv", ".md", ".png"}


def test_a_half_measured_run_is_not_published(run: Run, tmp_path: Path) -> None:
    run.cells().open()
    table.write(results_of(run), run.out)
    with pytest.raises(SafelightError, match="finish the run"):
        table.publish(run.out, tmp_path / "published")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {**SETTINGS.to_json(), "tasks": 3}, "prompts": {}}, r"settings\.tasks"),
        ({"judge": {}}, r"judge\.colours"),
        ({"commit": "other"}, "commit"),
    ],
)
def test_another_manifest_is_refused(run: Run, change: dict, named: str) -> None:
    run.cells().open()
    other = dataclasses.replace(run, manifest={**run.manifest, **change})
    with pytest.raises(SafelightError, match=f"another manifest: {named} is"):
        other.cells().open()
    run.cells().open()
    if named == "commit":
        other.cells().open(other_commit=True)
    else:
        with pytest.raises(SafelightError, match=named):
            other.cells().open(other_commit=True)


def test_a_cell_of_another_model_or_budget_is_refused(run: Run) -> None:
    cells = run.cells()
    cells.open()
    cells.write("none", "attack:plain", {"rate": {}})
    system = run.rows["none"].system
    other = OpenedSystem(system, run.rows["none"].model, run.rows["none"].bundle, "another generator")
    with pytest.raises(SafelightError, match="other weights, settings or budget"):
        dataclasses.replace(run, rows={"none": other}).cells().open()
    bigger = {"plain": Attack("plain", "generator", plain, record={"budget": 2})}
    with pytest.raises(SafelightError, match="other weights, settings or budget"):
        dataclasses.replace(run, attacks=bigger).cells().open()
    dataclasses.replace(run, attacks={}).cells().open()  # not asked for, so left alone


def test_prompts_are_of_the_test_split_and_fixed_by_the_seed() -> None:
    settings = Settings(count=30, tasks=10)
    prompts = Prompts.make(settings)
    assert prompts.digests() == Prompts.make(settings).digests() != Prompts.make(Settings(seed=8)).digests()
    assert [item.scene.shapes[0].kind for item in prompts.neighbours[::10]] == list(NEIGHBOURS)
    for item in (*prompts.clean, *prompts.neighbours):
        assert split_of(item.caption) == "test"
        assert not item.scene.restricted
    for item in prompts.tasks:
        assert split_of(item.caption) == "test"
        assert item.scene.restricted
        assert not any(form in item.caption for form in HELD_OUT_FORMS)
    seeds = {
        (ask.seed, ask.probe_seed) for name in ("clean", "neighbours") for ask in prompts.asks(name, settings)
    }
    assert len({part for pair in seeds for part in pair}) == 2 * 60


def test_rows_say_which_model_they_lack(tmp_path: Path) -> None:
    rows = standard_rows({"base": tmp_path, "sdd": tmp_path / "sdd"}, SETTINGS)
    assert isinstance(rows["sdd"], System)
    assert rows["safe_cfg"] == "needs --models safe_cfg=DIR"
    assert rows["stack"] == "needs --models safe_cfg=DIR"
    (tmp_path / "mine" / "redirector").mkdir(parents=True)
    mine = standard_rows({"base": tmp_path, "mine": tmp_path / "mine"}, SETTINGS)["mine"]
    assert isinstance(mine, System)
    assert mine.parts == {"redirector"}
    with pytest.raises(ValueError, match="base"):
        standard_rows({"sdd": tmp_path}, SETTINGS)


@pytest.mark.parametrize(
    "wrong",
    [{"name": "a/b"}, {"name": "a", "detector": "psychic"}, {"name": "a", "detector": "latent"}],
)
def test_an_impossible_system_is_refused(wrong: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a/b|psychic|latent"):
        System(model=tmp_path, **wrong)


@pytest.mark.parametrize(
    "wrong", [{"count": 4}, {"tasks": 0}, {"seed": -1}, {"solver": "x"}, {"budget": 0}, {"steps": 1.5}]
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_attacks_are_known_by_name_with_their_budget() -> None:
    found = attack_of("token_search", Settings(budget=0.5), 0.6)
    whole = attack_of("token_search", Settings(), 0.6)
    assert found.record["budget"]["steps"] == round(whole.record["budget"]["steps"] / 2)
    assert columns_of([found])[0] == "attack:token_search"
    with pytest.raises(ValueError, match="attack must be one of"):
        attack_of("telepathy", Settings(), 0.6)
    assert len({seed_of(7, purpose, at) for purpose in "ab" for at in range(100)}) == 200


def test_two_processes_give_the_table_of_one(run: Run) -> None:
    known = {name: run.attacks[name] for name in ("plain", "at_checker")}
    one, two = (
        dataclasses.replace(run, attacks=known, out=run.out.with_name(name)) for name in ("one", "two")
    )
    for each, jobs in ((one, 1), (two, 2)):
        each.cells().open()
        measure(each, jobs=jobs)
    assert without_times(results_of(one)) == without_times(results_of(two))
