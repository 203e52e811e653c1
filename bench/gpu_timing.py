"""Time on a GPU: calls inside a CUDA graph or one by one, launches as the profiler sees them, copy bandwidth.

Knows no operation. Events on the stream are the clock; a graph holds several calls, so that the cost of its
replay is shared by them.
"""

from collections.abc import Callable

import torch

Call = Callable[[], object]
WARM_UP = 3
COPIED_BYTES = 1 << 30


def in_graph(call: Call, *, calls: int = 20, repeats: int = 50) -> list[float]:
    """Microseconds a call, one sample a replay of a graph of `calls` calls.

    Raises what the call raises when it is captured: one that waits for the GPU cannot be.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    return _sample(graph.replay, calls=calls, repeats=repeats)


def one_by_one(call: Call, *, calls: int = 20, repeats: int = 50) -> list[float]:
    """Microseconds a call when the host starts each: the longer of the host's time and the GPU's."""

    def many() -> None:
        for _ in range(calls):
            call()

    return _sample(many, calls=calls, repeats=repeats)


def _sample(run: Call, *, calls: int, repeats: int) -> list[float]:
    for _ in range(WARM_UP):
        run()
    found = []
    for _ in range(repeats):
        start, end = _event(), _event()
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / calls)
    return found


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def launches(call: Call) -> int:
    """Kernels, copies and fills that one call starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    events = [event for event in seen.events() or [] if event.device_type.name == "CUDA"]
    return sum(not getattr(event, "is_user_annotation", False) for event in events)


def copy_bytes_per_second(size_bytes: int = COPIED_BYTES) -> float:
    """What a device-to-device copy of a large tensor reaches, bytes read and written both counted."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = sorted(one_by_one(lambda: target.copy_(source), calls=5, repeats=20))
    return 2 * size_bytes / (times[len(times) // 2] * 1e-6)
