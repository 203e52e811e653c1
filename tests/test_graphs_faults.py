"""The GPU's way through the networks, on the processor: whatever goes wrong on the device blocks, and two
threads may share it.
"""

import math
import runpy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.engine.bundle import Bundle
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import Placement
from safelight.engine.graphs.runner import Processor
from safelight.engine.model_folder import ONE_STEP, ModelFolder
from safelight.engine.neighbourhood import Request
from safelight.probe import ProbeConfig

CASES = runpy.run_path(str(Path(__file__).with_name("graph_cases.py")))
bundle, folder, graphs = (CASES[name] for name in ("bundle", "folder", "graphs"))
PROMPTS = CASES["PROMPTS"]
ONE, TWO, one_model = (CASES[name] for name in ("ONE", "TWO", "one_model"))
Noted, noted, ids_each = (CASES[name] for name in ("Noted", "noted", "ids_each"))
detector = CASES["detector"]


@pytest.mark.parametrize(
    ("any_model", "part"),
    [
        *((ONE, part) for part in ("text_encoder", "its unet", "vae", "safety_checker", "latent_checker")),
        *((TWO, part) for part in ("text_encoder", "its unet")),
    ],
    indirect=["any_model"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_block(
    bundle: Bundle, folder: ModelFolder, part: str, value: float
) -> None:
    backend = GraphBackend(bundle, folder, Placement("float32"), Processor())
    unet = ONE_STEP if folder.has_one_step else "unet"
    network = backend._folder.load(unet if part == "its unet" else part)
    used: Any = getattr(network, "decoder", network)
    weights = next(p for n, p in used.named_parameters() if p.dim() > 1 and "position" not in n)
    with torch.inference_mode():
        weights.data.fill_(value)
    checker: Any = "latent" if part == "latent_checker" else "image"
    with detector(bundle, backend, ProbeConfig(count=3, threshold=1.0), checker=checker) as one:
        verdict = one.check(PROMPTS[0], seed=0)
    assert verdict.blocked and verdict.reason == "non_finite"


def test_one_request_that_is_not_finite_blocks_no_other(bundle: Bundle, folder: ModelFolder) -> None:
    """One token's embedding is spoilt: whoever spells it is blocked, in whatever company, padded or not."""
    backend = GraphBackend(bundle, folder, Placement("float32"), Processor())
    encoder: Any = backend._folder.load("text_encoder")
    with torch.inference_mode():
        encoder.get_input_embeddings().weight.data[5].fill_(math.nan)
    model = backend.one_step(ProbeConfig(count=3, threshold=1.0), latent=False)
    window = ids_each(bundle)
    clean, spoilt = Request(np.full(window, 7), 1), Request(np.full(window, 5), 2)
    for requests in ([clean, spoilt, clean], [spoilt], [clean] * 4 + [spoilt]):
        looks = model.look(requests, range(3))
        for row, request in enumerate(requests):
            assert looks.finite[row].all() == (request is clean)
            assert looks.flagged[row].all() or request is clean
            assert np.isfinite(looks.margins[row]).all() == (request is clean)


def test_an_angle_that_is_not_finite_blocks(bundle: Bundle, graphs: GraphBackend) -> None:
    for target in ("prompt", "latent"):
        model: Any = graphs.one_step(ProbeConfig(count=3, target=target), latent=True)
        object.__setattr__(model, "_config", ProbeConfig(count=3, target=target))
        values = model._values([Request(np.full(ids_each(bundle), 7), 1)], range(3))
        program, result = model._plans.of(1, 3)
        program.run({**values, "angle": np.full(1, math.nan, np.float32)}, result)
        finite = result.arrays()["block"][0, -5:-2]
        assert (finite[1:] == 0).all(), target


@one_model
@pytest.mark.parametrize("checker", ["image", "latent", "cascade"])
@pytest.mark.parametrize(
    "fault", [RuntimeError("CUDA error: an illegal memory access"), torch.OutOfMemoryError("no memory")]
)
def test_what_the_device_reports_when_it_is_waited_for_blocks(
    bundle: Bundle, folder: ModelFolder, checker: Any, fault: Exception
) -> None:
    backend = GraphBackend(bundle, folder, Placement("float32"), Noted())
    with detector(bundle, backend, ProbeConfig(count=3, threshold=1.0), checker=checker) as one:
        passed = one.check(PROMPTS[1], seed=0)
        noted(backend).fault = fault
        verdict = one.check(PROMPTS[1], seed=0)
        assert verdict.blocked and verdict.reason == "error" and str(fault) in (verdict.detail or "")
        noted(backend).fault = None
        assert one.check(PROMPTS[1], seed=0).margins == passed.margins


@one_model
def test_a_detection_keeps_to_its_time(bundle: Bundle, graphs: GraphBackend) -> None:
    with detector(bundle, graphs, ProbeConfig(count=2), timeout_s=1e-9) as one:
        assert one.check(PROMPTS[0]).reason == "timeout"
    with detector(bundle, graphs, ProbeConfig(count=2), timeout_s=60) as one:
        assert one.check(PROMPTS[0]).reason in (None, "concept")


@one_model
def test_two_threads_share_a_detector(bundle: Bundle, graphs: GraphBackend) -> None:
    with detector(bundle, graphs, ProbeConfig(count=3)) as one:
        truth = [one.check(prompt, seed=5).margins for prompt in PROMPTS]
        wrong: list[str] = []

        def work() -> None:
            for _ in range(3):
                for prompt, margins in zip(PROMPTS, truth, strict=True):
                    if one.check(prompt, seed=5).margins != margins:
                        wrong.append(prompt)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []
