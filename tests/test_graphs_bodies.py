"""The bodies that a GPU captures, on the processor: compiled operations by Triton's interpreter, two bytes a
number against four, and that no body reads a value on the host.
"""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safelight.engine.backends import shape_of
from safelight.engine.bundle import Bundle
from safelight.engine.eager import load_detector, load_graph, load_latent_detector
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import KEPT, PlacedFolder, Placement
from safelight.engine.graphs.runner import Processor
from safelight.engine.graphs.screening import LatentScreening, PictureScreening
from safelight.engine.graphs.stage import detector_kept, part_body
from safelight.engine.model_folder import ModelFolder
from safelight.kernels import ops
from safelight.kernels.dispatch import use_backend
from safelight.probe import ProbeConfig

CASES = runpy.run_path(str(Path(__file__).with_name("graph_cases.py")))
bundle, folder, eager = (CASES[name] for name in ("bundle", "folder", "eager"))
PROMPTS, SEEDS, CPU = (CASES[name] for name in ("PROMPTS", "SEEDS", "CPU"))
ONE, TWO, SEEN, one_model = (CASES[name] for name in ("ONE", "TWO", "SEEN", "one_model"))
detector, assert_same = CASES["detector"], CASES["assert_same"]


# the compiled bodies, by Triton's interpreter where there is no GPU


@one_model
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles the kernels; tests marked gpu run them")
@pytest.mark.parametrize(
    "probe",
    [ProbeConfig(count=2, kind="circular", target="both"), ProbeConfig(count=2)],
    ids=lambda probe: f"{probe.kind}-{probe.target}",
)
def test_compiled_operations_take_what_they_are_given(
    bundle: Bundle, folder: ModelFolder, probe: ProbeConfig
) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which this machine has not")
    backend = GraphBackend(bundle, folder, Placement("float16"), Processor())
    found = []
    for name in ("triton", "reference"):
        with detector(bundle, backend, probe, checker="latent") as one, use_backend(name):
            found.append(one.check_batch(PROMPTS[:2], seed=SEEDS[:2]))
    assert_same(*found, within=1e-2)


# precision


@pytest.mark.parametrize(("precision", "within"), [("float16", 1e-2), ("bfloat16", 5e-2)])
@pytest.mark.parametrize(("any_model", "checker"), SEEN, indirect=["any_model"])
def test_two_bytes_are_near_four(
    bundle: Bundle, folder: ModelFolder, eager: Any, precision: Any, within: float, checker: Any
) -> None:
    backend = GraphBackend(bundle, folder, Placement(precision), Processor())
    probe = ProbeConfig(count=3, threshold=0.4)
    with detector(bundle, backend, probe, checker=checker) as one:
        found = one.check_batch(PROMPTS, seed=SEEDS)
        assert precision in found[0].backend
    with detector(bundle, eager, probe, checker=checker) as two:
        assert_same(found, two.check_batch(PROMPTS, seed=SEEDS), within)


@one_model
def test_what_the_checker_compares_with_stays_float32(bundle: Bundle, folder: ModelFolder) -> None:
    backend = GraphBackend(bundle, folder, Placement("bfloat16"), Processor())
    placed, whole = backend._folder.load("safety_checker"), folder.load("safety_checker")
    for name in KEPT:
        found = getattr(placed, name)
        assert found.dtype is torch.float32 and torch.equal(found, getattr(whole, name).float())
    others = [p for n, p in placed.named_parameters() if n not in KEPT]
    assert {p.dtype for p in others} == {torch.bfloat16}
    filters = [p for p in backend._folder.load("unet").parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert filters and all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)
    assert backend._folder.load("vae") is backend._folder.load("vae")


# what a capture does not allow: a value that is read on the host, a tensor that comes from there


class Captured(TorchDispatchMode):
    """Refuses whatever brings a value from the host to tensors that have none, as a capture does.

    A single number is an argument of most kernels, but `where` copies it to the device first.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        copied = func.overloadpacket is torch.ops.aten.where
        here, there = (
            {
                value.device.type
                for value in tree_leaves(part)
                if isinstance(value, torch.Tensor) and (value.dim() or copied)
            }
            for part in ((args, kwargs), made)
        )
        assert not ("cpu" in here and "meta" in there), f"{func} takes a value from the host"
        return made


@pytest.mark.parametrize("graph_name", ["detector", "detector_latent"])
def test_bodies_leave_the_host_alone(
    bundle: Bundle, folder: ModelFolder, graph_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without values, a body that waits for one cannot go on."""
    load = load_detector if graph_name == "detector" else load_latent_detector
    kind: Any = PictureScreening if graph_name == "detector" else LatentScreening
    module: Any = load(PlacedFolder.place(folder, CPU, Placement("float16"))).to("meta")
    spec = bundle.manifest.graphs[graph_name]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    size = bundle.manifest.checker.size
    # the reference's resizing reads its matrices from the host; the compiled body has them on the device
    monkeypatch.setattr(ops, "clip_input", lambda decoded, *_, **__: decoded[..., :size, :size])
    axes = {"requests": 2, "probes": 3}

    def empty(layout: Any) -> dict[str, torch.Tensor]:
        return {name: torch.empty(s, dtype=d, device="meta") for name, (d, s) in layout.items()}

    def layout(specs: Any) -> Any:
        return {item.name: (getattr(torch, item.dtype), shape_of(item, axes)) for item in specs}

    with torch.inference_mode():
        screening = kind(module, bundle.manifest)
        made = empty(layout(spec.outputs)) | empty(detector_kept(screening)(axes))
        taken = empty(layout(spec.inputs))
        with Captured():
            screening.take(taken, made)
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                bool(made["finite"].all())
            with pytest.raises(AssertionError, match="from the host"):
                torch.ones(3).to("meta")


@pytest.mark.parametrize(
    ("any_model", "graph_name"),
    [
        *((ONE, graph) for graph in ("text_encoder", "unet", "vae_decoder", "vae_encoder", "safety_checker")),
        *((ONE, graph) for graph in ("latent_checker", "redirector")),
        *((TWO, graph) for graph in ("text_encoder", "unet", "redirector")),
    ],
    indirect=["any_model"],
)
def test_stages_leave_the_host_alone(
    bundle: Bundle, folder: ModelFolder, graph_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does the body of every graph that is one module."""
    module = load_graph(PlacedFolder.place(folder, CPU, Placement("float16")), graph_name).to("meta")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    spec = bundle.manifest.graphs[graph_name]
    given, made = (
        {
            item.name: torch.empty(
                shape_of(item, {"batch": 3}), dtype=getattr(torch, item.dtype), device="meta"
            )
            for item in items
        }
        for items in (spec.inputs, spec.outputs)
    )
    with torch.inference_mode(), Captured():
        part_body(module)(given, made)
