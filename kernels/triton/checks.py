"""What launchers ask of their tensors, as sentences. Knows no operation."""

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST = 2**31 - 1


def shaped(operation: str, tensors: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Raises ValueError where a tensor has not the shape beside it."""
    for name, (tensor, shape) in tensors.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{operation}: {name} must be {tuple(shape)}; got {tuple(tensor.shape)}")


def typed(operation: str, tensors: Mapping[str, tuple[Tensor, tuple[torch.dtype, ...]]]) -> None:
    """Raises ValueError where a tensor is of none of the dtypes beside it."""
    for name, (tensor, dtypes) in tensors.items():
        if tensor.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{operation}: {name} must be {allowed}; got {tensor.dtype}; convert it")


def together(operation: str, **tensors: Tensor | None) -> None:
    """Raises ValueError where the tensors are not all on one device, or one spans 2**31 elements or more."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {name: str(tensor.device) for name, tensor in given.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{operation}: all tensors must be on one device; got {devices}; move them")
    for name, tensor in given.items():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = sum((length - 1) * stride for length, stride in steps) if tensor.numel() else 0
        if span >= _LARGEST:
            raise ValueError(
                f"{operation}: {name} spans {span + 1} elements in memory; at most {_LARGEST} are allowed; "
                "split it"
            )


def dense(operation: str, **tensors: Tensor | None) -> None:
    """Raises ValueError where a tensor is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{operation}: {name} must be contiguous; got strides {tensor.stride()} for "
                f"{tuple(tensor.shape)}; call contiguous() on it"
            )


def row_strides(operation: str, name: str, tensor: Tensor, kept: int) -> tuple[int, ...]:
    """Strides of the first `kept` axes, whatever they are, of a tensor whose other axes are contiguous.

    Raises ValueError where they are not.
    """
    if tensor.numel() and not tensor[(0,) * kept].is_contiguous():
        raise ValueError(
            f"{operation}: the axes of {name} after the first {kept} must be contiguous; got strides "
            f"{tensor.stride()} for {tuple(tensor.shape)}; call contiguous() on it"
        )
    return tuple(tensor.stride()[:kept])
