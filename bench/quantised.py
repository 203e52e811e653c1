"""The detector graph with parts of it in int8, by NNCF's post-training quantisation: for measurements alone.

Calibrated on the inputs that the detector itself makes of prompts. No backend serves this: a part in int8 is
worth it only where it is faster and judges alike, which `bench.agreement` says.
"""

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from safelight.engine.backends import Array, Stage, open_backend
from safelight.engine.backends.openvino import OvStage
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.signal_stack import own_signal_stack
from safelight.manifest import GraphEntry

PARTS = ("text_encoder", "unet", "vae", "checker")  # as the weights of the graph are named
_PASSED = ("Convert", "Reshape", "Transpose", "Broadcast")  # between a weight and what uses it


class _Recorder:
    """A stage that keeps its inputs."""

    def __init__(self, stage: Stage, kept: list[dict[str, Array]]) -> None:
        self._stage, self._kept = stage, kept
        self.spec: GraphEntry = stage.spec
        self.device, self.lanes = stage.device, 1

    def plan(self, **axes: int) -> None:
        """See `Stage`."""
        self._stage.plan(**axes)

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, lane: int = 0
    ) -> dict[str, Array]:
        """See `Stage`."""
        self._kept.append({name: np.array(value) for name, value in inputs.items()})
        return self._stage.run(inputs, deadline=deadline)

    def close(self) -> None:
        """See `Stage`."""
        self._stage.close()


class OneGraph:
    """A backend that has one stage, whatever it is asked for."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def stage(self, graph: str) -> Stage:
        """See `Backend`."""
        return self._stage


def record(bundle: Bundle, prompts: Sequence[str]) -> list[dict[str, Array]]:
    """The inputs of the detector graph for prompts, each with a seed of its own."""
    kept: list[dict[str, Array]] = []
    stage = _Recorder(open_backend("onnxruntime", bundle, threads=1).stage("detector"), kept)
    with Detector(bundle, OneGraph(stage), bundle.manifest.probe, early_exit=False) as detector:
        for seed, prompt in enumerate(prompts):
            detector.check(prompt, seed=seed)
    return kept


def quantise(path: Path, samples: Sequence[Mapping[str, Array]], parts: Sequence[str]) -> Any:
    """The graph with the matrix products and convolutions of `parts` in int8, an OpenVINO model."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    model = ov.Core().read_model(path)
    heavy = (op for op in model.get_ordered_ops() if op.get_type_name() in ("Convolution", "MatMul"))
    left = [op.get_friendly_name() for op in heavy if _part(op) not in parts]
    with (
        own_signal_stack(),
        contextlib.redirect_stdout(io.StringIO()),
    ):  # progress bars, which cannot be turned off
        return nncf.quantize(
            model,
            nncf.Dataset(samples),
            subset_size=len(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(
                names=left,
                types=["Add", "Multiply", "MVN", "Concat", "Softmax", "Gelu", "Interpolate"],
                validate=False,
            ),
        )


def _part(op: Any) -> str:
    """Which part's weights an operator uses, by their name; empty where it uses none."""
    waiting = [op]
    while waiting:
        for source in waiting.pop().inputs():
            node = source.get_source_output().get_node()
            name = node.get_friendly_name().partition(".")[0]
            if node.get_type_name() == "Constant" and name in PARTS:
                return str(name)
            if node.get_type_name() in _PASSED:
                waiting.append(node)
    return ""


def stage_of(model: Any, spec: GraphEntry, precision: str, threads: int) -> Stage:
    """A quantised graph as a stage; what is not int8 computes in `precision`, `f32` or `bf16`."""
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    with own_signal_stack():
        compiled = ov.Core().compile_model(model, "CPU", settings)
    return OvStage(compiled, spec, 1)
