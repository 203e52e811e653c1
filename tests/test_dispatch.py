"""Which body runs, what is launched, and the record of every kernel. Needs no GPU."""

import dataclasses
import inspect
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from safelight.errors import BackendUnavailable
from safelight.kernels import dispatch, fused, ops
from safelight.kernels.dispatch import OPERATIONS, use_backend
from safelight.kernels.philox import Stream

WITH_TRITON = pytest.mark.skipif(
    not dispatch._installed(), reason="the kernels need Triton, which is not installed"
)


def x0(latents: torch.Tensor) -> torch.Tensor:
    return ops.latent_to_x0(latents, latents, x0_z=1.0, x0_out=2.0)


def test_the_table_holds_every_operation_for_every_backend_with_one_signature() -> None:
    assert set(dispatch.TABLE) == {(name, backend) for name in OPERATIONS for backend in dispatch.BACKENDS}
    for name in OPERATIONS:
        wanted = inspect.signature(getattr(fused, name))
        assert inspect.signature(getattr(ops, name)) == wanted
        assert dispatch.load(name, "reference") is getattr(fused, name)


@WITH_TRITON
@pytest.mark.parametrize("name", OPERATIONS)
def test_triton_s_body_has_the_definition_s_signature(name: str) -> None:
    assert inspect.signature(dispatch.load(name, "triton")) == inspect.signature(getattr(fused, name))


def test_the_default_follows_the_device_and_a_name_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(dispatch, "load", lambda name, backend: lambda *_, **__: called.append(backend))
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    monkeypatch.setattr(dispatch, "_installed", lambda: True)
    x0(torch.zeros(1, 1, 4))
    x0(torch.zeros(1, 1, 4, device="meta"))
    with use_backend("triton"):
        x0(torch.zeros(1, 1, 4))
        with use_backend("reference"):
            x0(torch.zeros(1, 1, 4))
        ops.latent_to_x0(latents=torch.zeros(1, 1, 4), answers=torch.zeros(1, 1, 4), x0_z=1.0, x0_out=2.0)
    x0(torch.zeros(1, 1, 4))
    assert called == ["reference", "reference", "triton", "reference", "triton", "reference"]


@pytest.mark.parametrize(
    ("installed", "interpreted", "named"),
    [
        (False, True, r"needs Triton, which is not installed \(pip install 'safelight\[kernels\]'\)"),
        (True, False, "needs a CUDA device, and its tensors are on cpu; move them"),
    ],
)
def test_what_cannot_be_met_is_refused_and_nothing_else_is_tried(
    monkeypatch: pytest.MonkeyPatch, installed: bool, interpreted: bool, named: str
) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda: installed)
    monkeypatch.setattr(dispatch, "interpreted", lambda: interpreted)
    with (
        use_backend("triton"),
        pytest.raises(BackendUnavailable, match=f"triton: latent_to_x0 {named}.*available: reference"),
    ):
        x0(torch.zeros(1, 1, 4))


def test_an_unknown_backend_is_refused_and_none_stays_asked_for_after_a_fault() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of \('reference', 'triton'\); got 'cuda'"):
        use_backend("cuda").__enter__()
    with pytest.raises(RuntimeError), use_backend("triton"):
        raise RuntimeError
    assert dispatch._asked.get() is None


def test_neither_dispatch_nor_operations_load_triton() -> None:
    code = "import sys, safelight.kernels.ops, safelight.kernels.triton; print('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"


# the kernels' records


@WITH_TRITON
def test_every_record_is_of_its_function_and_every_variant_has_a_name_of_its_own() -> None:
    from safelight.kernels.triton import kernels

    names = [variant.name for kernel in kernels() for variant in kernel.variants]
    assert len(names) == len(set(names))
    for kernel in kernels():
        parameters = list(inspect.signature(kernel.function.fn).parameters)  # type: ignore[attr-defined]
        for variant in kernel.variants:
            assert list(variant.signature) == parameters, variant.name
            assert kernel.variant(variant.name) is variant
        with pytest.raises(ValueError, match=f"{kernel.name} has no variant 'none'; it has"):
            kernel.variant("none")


def test_a_variant_s_parts_must_fit_together() -> None:
    from safelight.kernels.triton.kernel import Variant

    right = Variant("v", {"x": "*fp32", "N": "constexpr"}, {"N": 4}, ("x",), 4, 1)
    with pytest.raises(ValueError, match=r"v: constexpr parameters \['N'\] and constants \[\]"):
        dataclasses.replace(right, constants={})
    with pytest.raises(ValueError, match=r"v: aligned names \['y'\], which are no parameters"):
        dataclasses.replace(right, aligned=("y",))


SERVED = {"512 px": (1024, 64, 8), "256 px": (768, 32, 16), "shapes": (64, 8, 8), "many": (64, 8, 64)}


def served(dtype: torch.dtype, what: str) -> dict[str, Any]:
    """Calls of an engine that serves two requests: the operation's arguments by its name. `what` is a key of
    SERVED: the width of a text, the edge of latents, the number of probes.
    """
    width, edge, probes = SERVED[what]
    requests, half = 2, {"dtype": dtype}
    seeds, angle = torch.zeros(requests, dtype=torch.int64), torch.ones(requests)
    numbers, finite = torch.arange(probes), torch.ones(requests, probes, dtype=torch.bool)
    hidden = torch.empty(requests, 77, width, **half)
    latents = torch.empty(requests, probes, 4, edge, edge)
    answers = torch.empty(requests, probes, 4, edge, edge, **half)
    need = torch.ones(requests, dtype=torch.int64)
    known = fused.Concepts(torch.ones(17, 768), torch.ones(17), torch.ones(3, 768), torch.ones(3))
    sampled = {"x": latents[:, 0], "x0_prev": latents[:, 1], "scale": angle, "table": torch.ones(25, 6)}
    sampled |= {"step": torch.zeros(1, dtype=torch.int64)}
    branches = torch.empty(3, requests, 4, edge, edge, **half)
    mask = torch.ones(requests, 77, dtype=torch.bool)
    turning = {"seeds": seeds, "angle": angle, "numbers": numbers}
    prompt, start = fused.Directions(Stream.PROMPT_U), fused.Directions(Stream.LATENT_U)
    pictures = torch.empty(requests * probes, 3, 8 * edge, 8 * edge, **half)
    normal = {"size": 224, "mean": torch.zeros(3), "deviation": torch.ones(3), "finite": finite}
    return {
        "probe_rotate": turning | {"z": hidden, "directions": prompt, "mask": mask, "finite": finite},
        "probe_latents": turning | {"shape": (4, edge, edge), "directions": start},
        "guidance_step": sampled | {"answers": branches, "strength": angle, "threshold": angle},
        "latent_to_x0": {"latents": latents, "answers": answers, "x0_z": 1, "x0_out": 1, "finite": finite},
        "clip_input": normal | {"decoded": pictures.contiguous(memory_format=torch.channels_last)},
        "margin_vote": {"margins": torch.ones(requests, probes, 17, **half), "finite": finite, "need": need},
        "concept_vote": {"image_embeds": torch.ones(requests, probes, 768, **half), "concepts": known}
        | {"finite": finite, "need": need},
    }


@WITH_TRITON
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("what", SERVED)
def test_every_call_that_is_served_has_a_variant_and_the_grid_of_its_rule(
    operation: str, dtype: torch.dtype, what: str
) -> None:
    from safelight.kernels.triton.kernel import Kernel, Variant
    from safelight.kernels.triton.launch import use_runner

    started: list[tuple[str, str]] = []
    named = {"requests": 2, "pictures": 2 * SERVED[what][2], "ceil": math.ceil}

    def run(kernel: Kernel, variant: Variant, grid: tuple[int, int, int], given: Mapping[str, Any]) -> None:
        parameters = [name for name, kind in variant.signature.items() if kind != "constexpr"]
        assert list(given) == parameters
        sizes = {name: value for name, value in given.items() if isinstance(value, int)}
        assert eval(kernel.grid, {}, named | sizes | dict(variant.constants)) == grid
        started.append((kernel.name, variant.name))

    with use_runner(run):
        dispatch.load(operation, "triton")(**served(dtype, what)[operation])
    expected = {
        "probe_rotate": ["probe_rotate"],
        "probe_latents": ["probe_rotate"],
        "guidance_step": ["guidance_moments", "guidance_step"],
        "latent_to_x0": ["latent_to_x0"],
        "clip_input": ["resize_axis", "resize_runs"],
        "margin_vote": ["margin_vote"],
        "concept_vote": ["concept_margins", "margin_vote"],
    }
    assert [kernel for kernel, _ in started] == expected[operation]


@WITH_TRITON
def test_a_kernel_starts_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself starts on the current device, where the addresses of another one mean nothing."""
    from safelight.kernels.triton.kernel import Kernel
    from safelight.kernels.triton.launch import launch

    seen: list[str] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        seen.append(f"on {tensor.device}")
        yield
        seen.append("left")

    class Function:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda **_: seen.append(f"start {grid}")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kernel = Kernel("k", Function(), (), "(n, 1, 1)")  # type: ignore[arg-type]
    given = {"n": 2, "x": torch.empty(2, device="meta")}
    launch(kernel, (0, 1, 1), given, {})
    launch(kernel, (2, 1, 1), given, {})
    assert seen == ["on meta", "start (2, 1, 1)", "left"]


@WITH_TRITON
def test_a_call_that_nothing_was_built_for_is_refused() -> None:
    from safelight.kernels.triton.launch import use_runner

    call = served(torch.float16, "512 px")["latent_to_x0"]
    for name in ("latents", "answers"):  # 60 elements a probe, and variants promise multiples of 16
        call[name] = call[name][..., :5, :3].contiguous()
    with (
        use_runner(lambda *_: pytest.fail("it was started")),
        pytest.raises(BackendUnavailable, match="latent_to_x0: no variant was built ahead of time for"),
    ):
        dispatch.load("latent_to_x0", "triton")(**call)
