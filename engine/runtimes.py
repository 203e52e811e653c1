"""ONNX Runtime and OpenVINO, imported without their telemetry: whom a detector looks at stays on the machine.

ONNX Runtime keeps events in the user's home and sends them, unless its environment variable says otherwise;
OpenVINO sends one when it is imported, where its telemetry package can be. All that uses one of the two takes
it from here. What another module of the process imported before cannot be unsent.
"""

import os
import sys
from importlib import import_module
from typing import Any

_ORT_SWITCH = "ORT_DISABLE_TELEMETRY"
_OV_PACKAGE = "openvino_telemetry"


def import_onnxruntime() -> Any:
    """The module `onnxruntime`, sending nothing. Raises ModuleNotFoundError where it is not installed."""
    os.environ.setdefault(_ORT_SWITCH, "1")  # read when the module is loaded; child processes inherit it
    module = import_module("onnxruntime")
    module.disable_telemetry_events()  # where it was loaded before
    return module


def import_openvino() -> Any:
    """The module `openvino`, sending nothing. Raises ModuleNotFoundError where it is not installed."""
    if "openvino" in sys.modules:
        return import_module("openvino")
    before = sys.modules.get(_OV_PACKAGE)
    sys.modules[_OV_PACKAGE] = None  # type: ignore[assignment]  # what is None cannot be imported
    try:
        return import_module("openvino")
    finally:
        del sys.modules[_OV_PACKAGE]
        if before is not None:
            sys.modules[_OV_PACKAGE] = before
