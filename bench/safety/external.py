"""Prompts of a file through any diffusers checkpoint, with any judge: no attacker, no caption, no oracle.

Seed and guidance of a prompt are the file's where it gives them; starting latents are then those that
diffusers draws with a CPU generator of that seed. Pictures have the model's own size: a prompt that asks for
another is counted. Networks run where the caller says, which the manifest records; the judge does not.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from safelight import __version__
from safelight.bench.rows import installed
from safelight.bench.safety import eval_unlearn as other_form
from safelight.bench.safety.cells import Cells, write_json
from safelight.bench.safety.judge import Judge
from safelight.bench.safety.library import OpenedSystem, open_systems
from safelight.bench.safety.measures import SUCCESS
from safelight.bench.safety.outcome import Outcome, Rate, Result
from safelight.bench.safety.place import Place
from safelight.bench.safety.prompt_sets import PromptSet, SetPrompt
from safelight.bench.safety.run import PACKAGES, errors_above
from safelight.bench.safety.served import Ask, Served
from safelight.bench.safety.serving import outcomes
from safelight.bench.safety.settings import Settings, seed_of
from safelight.bench.safety.system import System
from safelight.engine.backends import Backend
from safelight.engine.bundle import Bundle
from safelight.errors import SafelightError
from safelight.provenance import commit

STEPS, GUIDANCE = 50, 7.5
DETECTORS = {"crops": "full", "crops1": "image"}
COLUMN = "prompts"
CHUNK = 16  # prompts that a run that is cut off has to ask again
PROCESSOR = Place()  # onnxruntime, all threads
Key = tuple[Path, Path]


def systems_of(models: Mapping[str, Path], defences: Sequence[str]) -> dict[str, System]:
    """A row for each model and defence: `none`, `checker`, `crops`, `crops1`, by name `model` or
    `model+defence`.
    """
    rows = {}
    for name, path in models.items():
        turned = path if (path / "redirector").is_dir() else None
        for defence in defences:
            row = name if defence == "none" else f"{name}+{defence}"
            detector = DETECTORS.get(defence)
            rows[row] = System(row, path, turned, detector=detector, final_checker=defence != "none")
    return rows


def evaluate_prompts(
    models: Mapping[str, Path],
    file: Path,
    out: Path,
    *,
    judge: str | Judge = "checker",
    judge_model: Path | None = None,
    defences: Sequence[str] = ("none",),
    limit: int | None = None,
    steps: int | None = None,
    seed: int = 7,
    max_error_rate: float = 0.0,
    eval_unlearn: Path | None = None,
    concept: str = "unknown",
    place: Place = PROCESSOR,
    progress: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Measure each row that is not in `out` yet, write prompts.json and prompts.md, and return the rows with
    too many errors.

    `judge` is `checker` (of `judge_model`, or each model's own), `nudenet`, or a judge. Raises as `evaluate`,
    as `open_backend` for a `place` that cannot be had, and SafelightError where nothing but errors comes from
    it: what was measured before stays, and the same call goes on from there.
    """
    errors_above({}, max_error_rate)
    prompts = PromptSet.read(file, limit)
    settings = Settings(seed=seed, steps=steps or STEPS, guidance_scale=GUIDANCE, batch=4)
    manifest = {
        "prompts": {"name": prompts.name, "sha256": prompts.sha256, "count": len(prompts.prompts)},
        "settings": settings.to_json(),
        "place": place.to_json(),
        "seeds": "the file's, else derived from the run's seed; latents by torch's CPU generator",
        "safelight": __version__,
        "versions": {name: installed(name) for name in PACKAGES} | place.versions(),
        "commit": commit(),
    }
    Cells(out, manifest, {}, {}).compare()  # both before a model is exported, which may take long
    place.check()
    rows = open_systems(
        systems_of(models, defences), out, guidance_scale=GUIDANCE, progress=progress, bare=place.eager
    )
    places: dict[Key, Place] = {}
    backends: dict[Key, Backend] = {}  # one for all rows of a model; each opens its own networks there
    for row in rows.values():
        if (key := _key(row)) not in backends:
            places[key] = place.on(row.bundle)
            backends[key] = places[key].open(row.bundle, row.model)  # what cannot be had leaves no manifest
    judge_of = cache(partial(_judge, judge))
    records = {
        name: {
            **row.to_json(),
            "backend": places[_key(row)].backend,
            "judge": judge_of(judge_model or row.model).record,
        }
        for name, row in rows.items()
    }
    cells = Cells(out, manifest, records, {})
    cells.open()
    found: dict[str, dict[str, Any]] = {}
    last = {_key(row): name for name, row in rows.items()}
    for name, row in rows.items():
        key = _key(row)
        if cells.read(name, COLUMN) is None:
            known = judge_of(judge_model or row.model)
            _measure(row, backends[key], known, prompts, cells, settings, progress)
        if last[key] == name:
            del backends[key]
        gc.collect()  # networks lie in cycles of objects, and the next row's need the room
        cell = cells.read(name, COLUMN)
        assert cell is not None
        found[name] = cell
        if eval_unlearn is not None:
            _write_other_form(cell, name, eval_unlearn, concept, prompts, {**manifest, **records[name]})
    write_json(out / "prompts.json", {"manifest": manifest, "rows": records, "cells": found})
    (out / "prompts.md").write_text(_markdown(prompts, found), encoding="utf-8")
    return errors_above({(name, COLUMN): cell for name, cell in found.items()}, max_error_rate)


def _key(row: OpenedSystem) -> Key:
    """Rows that are equal in this share a backend."""
    return row.bundle.folder, row.model


def _judge(judge: str | Judge, folder: Path) -> Judge:
    if not isinstance(judge, str):
        return judge
    if judge == "nudenet":
        from safelight.bench.safety.nudenet_judge import NudeNetJudge

        return NudeNetJudge()
    if judge != "checker":
        raise ValueError(f"judge must be checker or nudenet; got {judge!r}")
    from safelight.bench.safety.checker_judge import CheckerJudge

    return CheckerJudge(folder)


def _measure(
    row: OpenedSystem,
    backend: Backend,
    judge: Judge,
    prompts: PromptSet,
    cells: Cells,
    settings: Settings,
    progress: Callable[[str], None],
) -> None:
    """Measure and write a row. None of its networks is held by anything when this returns, but what the
    backend shares.
    """
    with Served(row.system, row.bundle, row.model, settings, backend) as served:
        cell = _measured(served, judge, prompts, cells, seed=settings.seed, progress=progress)
    cells.write(row.system.name, COLUMN, cell)


def _measured(
    served: Served,
    judge: Judge,
    prompts: PromptSet,
    cells: Cells,
    *,
    seed: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """The row's cell; every `CHUNK` prompts of it are kept as a cell of their own meanwhile. Raises
    SafelightError, and keeps nothing of them, where an exception is all that comes of each.
    """
    size, name = served.bundle.manifest.picture.size, served.system.name
    requests: list[dict[str, Any]] = []
    devices: set[str] = set()  # more than one where a run went on elsewhere
    for at in range(0, len(prompts.prompts), CHUNK):
        known = cells.read(name, f"{COLUMN}:{at}")
        if known is None:
            part = prompts.prompts[at : at + CHUNK]
            asks = {item.number: _ask(item, seed, served.bundle) for item in part if item.fault is None}
            made = dict(zip(asks, outcomes(served, judge, list(asks.values())), strict=True))
            _check_place(name, made)
            unread = (Result(Outcome.ERROR, "prompt", detail=item.fault or "") for item in part)
            found = [made.get(item.number, fault) for item, fault in zip(part, unread, strict=True)]
            known = {
                "device": served.device,
                "requests": [
                    {"number": item.number, **result.to_json()}
                    for item, result in zip(part, found, strict=True)
                ],
            }
            cells.write(name, f"{COLUMN}:{at}", known)
        requests += known["requests"]
        devices.add(known["device"])
        progress(f"{name}: {len(requests)} of {len(prompts.prompts)}")
    other = sum((item.width or size, item.height or size) != (size, size) for item in prompts.prompts)
    return {
        "rate": Rate.of_outcomes((Outcome(item["outcome"]) for item in requests), SUCCESS).to_json(),
        "timestamp": time.time(),
        "devices": sorted(devices),
        "picture_size": size,
        "asked_for_another_size": other,
        "requests": requests,
    }


def _check_place(name: str, made: Mapping[int, Result]) -> None:
    """Raises SafelightError where no request of a row got through detector and generator: that says something
    of the place where they run, out of memory say, and nothing of the requests.
    """
    faults = [item for item in made.values() if item.raised and item.decided_by in ("detector", "generator")]
    if made and len(faults) == len(made):
        raise SafelightError(
            f"{name}: each of {len(made)} requests, from number {min(made)} on, ended in an error "
            f"({faults[0].detail}); mend that and run the same command again, which goes on from there"
        )


def _ask(item: SetPrompt, run_seed: int, bundle: Bundle) -> Ask:
    import torch

    seed = seed_of(run_seed, "prompt", item.number) if item.seed is None else item.seed
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn((1, *bundle.manifest.picture.latents), generator=generator)[0].numpy()
    return Ask(
        item.text,
        seed,
        seed_of(run_seed, "prompt probes", item.number),
        latents=np.ascontiguousarray(latents),
        guidance_scale=item.guidance_scale,
    )


def _write_other_form(
    cell: Mapping[str, Any],
    name: str,
    folder: Path,
    concept: str,
    prompts: PromptSet,
    manifest: Mapping[str, Any],
) -> None:
    results = [
        Result(Outcome(item["outcome"]), item["decided_by"], item["score"], item["detail"])
        for item in cell["requests"]
    ]
    values = other_form.report(
        results,
        Rate.from_json(cell["rate"]),
        technique=name,
        concept=concept,
        metric="asr_prompts",
        dataset=prompts.name,
        manifest=manifest,
        timestamp=cell["timestamp"],
    )
    other_form.write_report(values, folder)


def _markdown(prompts: PromptSet, cells: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        f"# {prompts.name}: {len(prompts.prompts)} prompts, SHA-256 {prompts.sha256[:16]}",
        "",
        "| system | unsafe and delivered | errors | ran on |",
        "| --- | --- | --- | --- |",
    ]
    for name, cell in cells.items():
        rate = Rate.from_json(cell["rate"])
        low, high = rate.interval
        value = "nothing known" if rate.value is None else f"{rate.value:.1%}"
        lines.append(
            f"| {name} | {value} ({rate.hits}/{rate.total}, {low:.1%} to {high:.1%}) | {rate.errors} "
            f"| {'; '.join(cell['devices'])} |"
        )
    return "\n".join([*lines, "", f"Counted are {SUCCESS}."]) + "\n"
