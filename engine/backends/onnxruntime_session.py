"""ONNX Runtime's providers by name, and how a session is opened on one: on that provider, or not at all.

ONNX Runtime itself answers a provider that cannot run with a warning and a session on the processor, and
gives single operators to the processor without a word. Both are errors here.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from safelight.engine.runtimes import import_onnxruntime
from safelight.errors import BackendUnavailable, BundleError

ort = import_onnxruntime()

CPU = "CPUExecutionProvider"
# What computes on whole tensors. The rest, such as arithmetic on shapes, providers leave on the processor on
# purpose.
HEAVY = frozenset(
    {
        *("Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "Attention"),
        *("MultiHeadAttention", "Softmax", "LayerNormalization", "SkipLayerNormalization"),
        *("SimplifiedLayerNormalization", "GroupNorm", "GroupNormalization", "InstanceNormalization"),
        *("Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Erf", "Sigmoid", "Tanh", "Resize", "Upsample"),
        *("ReduceMean", "ReduceL2", "ReduceSumSquare", "AveragePool", "GlobalAveragePool", "MaxPool"),
    }
)
_RECORD = "session.record_ep_graph_assignment_info"


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider of ONNX Runtime: its own name, the device on which its tensors lie, and its settings.

    `graph` says that runs are captured once a plan and replayed. `plugin` is the package that brings the
    provider where ONNX Runtime does not. `needs` is what pip is asked for, quoted for a shell.
    """

    name: str
    device: str
    needs: str
    settings: Mapping[str, str] = field(default_factory=dict)
    graph: bool = False
    plugin: str | None = None


_GPU = "'onnxruntime-gpu[cuda,cudnn]'"
_CUDA = {  # ONNX Runtime's default is TF32, a mantissa of ten bits, and `auto` takes float32 on trust
    "cudnn_conv_algo_search": "HEURISTIC",
    "prefer_nhwc": "1",
    "use_tf32": "0",
}
PROVIDERS = {  # variant of the backend -> provider
    "": Provider(CPU, "cpu", "onnxruntime"),
    "int8": Provider(CPU, "cpu", "onnxruntime"),
    "cuda": Provider("CUDAExecutionProvider", "cuda", _GPU, _CUDA),
    "cuda-graph": Provider(
        "CUDAExecutionProvider", "cuda", _GPU, _CUDA | {"enable_cuda_graph": "1"}, graph=True
    ),
    "tensorrt": Provider("TensorrtExecutionProvider", "cuda", f"{_GPU} tensorrt"),
    "nv_tensorrt_rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "cuda",
        "onnxruntime-ep-nv-tensorrt-rtx-cu13",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
    ),
}


def open_session(path: Path, provider: Provider, options: Any, *, backend: str) -> Any:
    """A session whose heavy operators all run on that provider.

    Raises BackendUnavailable where ONNX Runtime has no such provider, cannot start it, or gives the work to
    another, and BundleError for a file that it cannot read.
    """
    if provider.name != CPU:
        options.add_session_config_entry(_RECORD, "1")
    devices = _devices(provider, backend)
    chosen = {} if devices else {"providers": [(provider.name, dict(provider.settings))]}
    try:
        if devices:
            options.add_provider_for_devices(devices, dict(provider.settings))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            session: Any = ort.InferenceSession(path, options, **chosen)
    except Exception as fault:  # ONNX Runtime's own exceptions share no base class
        if provider.name != CPU:
            raise BackendUnavailable(
                f"{backend}: {provider.name} could not be started ({fault}); {_mended(provider)}"
            ) from fault
        raise BundleError(
            f"{path} cannot be opened by ONNX Runtime ({fault}); export the bundle again"
        ) from fault
    _check_provider(session, provider, backend, said)
    return session


def _mended(provider: Provider) -> str:
    """What mends a provider that is installed and does not start."""
    return f"do: nvidia-smi, to see that there is a GPU and its driver; then pip install -U {provider.needs}"


def _devices(provider: Provider, backend: str) -> list[Any]:
    """The devices of a provider that a package brings; none for one of ONNX Runtime's own."""
    remedy = f"do: pip install {provider.needs}"
    available = ort.get_available_providers()
    if provider.name in available:
        return []
    if provider.plugin is None:
        raise BackendUnavailable(
            f"{backend}: this onnxruntime has no {provider.name}, only {', '.join(available)}; {remedy}"
        )
    try:
        plugin = import_module(provider.plugin)
    except ImportError as fault:
        raise BackendUnavailable(f"{backend}: {fault}; {remedy}") from fault
    name = plugin.get_ep_name()
    try:
        if not any(device.ep_name == name for device in ort.get_ep_devices()):
            ort.register_execution_provider_library(name, plugin.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    except Exception as fault:  # ONNX Runtime's own exceptions share no base class
        raise BackendUnavailable(
            f"{backend}: {name} could not be loaded ({fault}); {_mended(provider)}"
        ) from fault
    if not devices:
        raise BackendUnavailable(
            f"{backend}: {name} finds no GPU that it runs on; do: nvidia-smi, and install its driver"
        )
    return devices


def _check_provider(session: Any, provider: Provider, backend: str, said: list[Any]) -> None:
    """Raises BackendUnavailable where the session, or a heavy operator of it, is not where it was asked
    to be.
    """
    found = list(session.get_providers())
    if found[:1] != [provider.name]:
        reason = "; ".join(str(item.message).splitlines()[0] for item in said) or "no reason given"
        raise BackendUnavailable(
            f"{backend}: asked for {provider.name}, the session runs on {found} ({reason}); "
            f"{_mended(provider)}"
        )
    if provider.name == CPU:
        return
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise BackendUnavailable(
            f"{backend}: this onnxruntime does not say where its operators run; do: pip install -U "
            f"{provider.needs}"
        )
    elsewhere = (
        part for part in session.get_provider_graph_assignment_info() if part.ep_name != provider.name
    )
    if strays := sorted({node.op_type for part in elsewhere for node in part.get_nodes()} & HEAVY):
        raise BackendUnavailable(
            f"{backend}: {provider.name} leaves {strays} to another provider, most likely the processor; "
            "use another backend, or a newer onnxruntime"
        )
