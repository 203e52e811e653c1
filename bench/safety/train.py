"""The defended models of the evaluation, trained where they are absent: `python -m
safelight.bench.safety.train --out DIR`.

What is there is left alone; what was begun goes on. At most `--jobs` trainings run at once.
"""

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safelight.bench.safety.recipes import (
    LATENT_CHECKER,
    STARS,
    Training,
    clean_captions,
    recipes,
    templates,
)
from safelight.errors import SafelightError
from safelight.models.shapes.scene import RESTRICTED

BASE = Path("models/shapes/model")
TRIPLET_STEPS, TRIPLET_GUIDANCE = 10, 3.0
BENIGN = 600  # prompts of each side of the triplets

Progress = Callable[[str], None]


def train_models(
    out: Path,
    trainings: Mapping[str, Training],
    *,
    base: Path = BASE,
    jobs: int = 1,
    progress: Progress = lambda line: None,
) -> dict[str, Path]:
    """Train what `out` lacks, each into a folder of its name; returns the folders by name.

    Raises ValueError for a training that starts from an unknown one, and what the training raises.
    """
    paths = {name: out / name for name in trainings}
    for name, training in trainings.items():
        if training.base not in ("base", *trainings):
            raise ValueError(f"{name} starts from {training.base!r}, which is none of {tuple(trainings)}")
    waiting = {name: training for name, training in trainings.items() if not paths[name].is_dir()}
    for name in trainings.keys() - waiting.keys():
        progress(f"{paths[name]} is there; remove it to train it anew")
    start, pool = time.monotonic(), None if jobs == 1 else _pool(jobs)
    running: dict[Future[None], str] = {}
    try:
        while waiting or running:
            ready = [name for name, item in waiting.items() if item.base not in {*waiting, *running.values()}]
            if not ready and not running:
                raise ValueError(f"{sorted(waiting)} start from each other")
            for name in ready[: jobs - len(running)]:
                training = waiting.pop(name)
                source = base if training.base == "base" else paths[training.base]
                progress(f"{name}: training")
                running[_begun(pool, name, training, source, paths[name])] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                progress(f"[{time.monotonic() - start:.0f} s] {running.pop(future)} is trained")
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return paths


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_one_thread)


def _begun(pool: ProcessPoolExecutor | None, *arguments: Any) -> "Future[None]":
    """A training in the pool, or done here where there is none."""
    if pool is not None:
        return pool.submit(train_one, *arguments)
    future: Future[None] = Future()
    train_one(*arguments)
    future.set_result(None)
    return future


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def train_one(name: str, training: Training, source: Path, out: Path) -> None:
    """Train one folder. Raises what the training raises."""
    if training.method == LATENT_CHECKER:
        _distil(training, source, out)
        return
    from safelight.defenses.run import defend, recipe

    settings = dict(training.settings)
    if training.triplets:
        settings["triplets"] = str(_triplets(name, training, source, out.parent))
    defend(source, recipe(training.method, training.concepts, settings), out, cpu=True)


def _distil(training: Training, source: Path, out: Path) -> None:
    from safelight.defenses.latent_checker import PLAN, Config, distill

    config, plan = Config(), PLAN
    known = {item.name: "config" for item in fields(config)} | {item.name: "plan" for item in fields(plan)}
    if unknown := sorted(set(training.settings) - set(known)):
        raise ValueError(f"{LATENT_CHECKER} has no setting {unknown[0]!r}; it has {sorted(known)}")

    def chosen(part: str) -> dict[str, Any]:
        return {name: value for name, value in training.settings.items() if known[name] == part}

    distill(source, out, replace(config, **chosen("config")), replace(plan, **chosen("plan")), cpu=True)


def _triplets(name: str, training: Training, source: Path, folder: Path) -> Path:
    """The folder of triplets, drawn where it is absent."""
    from safelight.defenses.training_model import TrainingModel
    from safelight.defenses.triplets import Drawing, Mosaic, from_model, prompts_for

    out = folder / f"{name}-triplets"
    if not out.is_dir():
        prompts = prompts_for(training.concepts or STARS, templates(RESTRICTED, BENIGN))
        drawing = Drawing(training.triplets, TRIPLET_STEPS, TRIPLET_GUIDANCE, 0, "dpmpp_2m")
        model = TrainingModel.open(source)
        from_model(
            model, prompts, list(clean_captions(BENIGN)), out, drawing=drawing, mosaic=Mosaic(training.block)
        )
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and train; 2 where something in the world is not as it must be."""
    parser = argparse.ArgumentParser(prog="safelight.bench.safety.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model folders")
    parser.add_argument("--base", type=Path, default=BASE, help="the undefended model")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    parser.add_argument("--only", nargs="*", help="names of trainings; all where left out")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="safelight: %(message)s", stream=sys.stderr)
    known = recipes()
    if unknown := sorted(set(given.only or ()) - set(known)):
        parser.error(f"--only takes {tuple(known)}; got {unknown[0]!r}")
    chosen = {name: item for name, item in known.items() if not given.only or name in given.only}
    try:
        train_models(
            given.out, chosen, base=given.base, jobs=given.jobs, progress=logging.getLogger(__name__).info
        )
    except (SafelightError, ValueError, OSError) as fault:
        logging.getLogger(__name__).error("%s", fault)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
