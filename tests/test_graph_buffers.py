"""Static buffers, and programs over them, on the processor: one copy in, one copy out, one wait, and no
buffer that ever moves. How what is recorded computes.
"""

import math
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safelight.engine.graphs.program import Program
from safelight.engine.graphs.runner import Body, Processor, arithmetic
from safelight.engine.graphs.slab import ALIGNMENT, Layout, Slab, bucket, fill

CPU = torch.device("cpu")


# blocks of memory, and the lengths that are planned


@given(st.integers(1, 5000))
def test_a_bucket_holds_its_length_and_at_most_half_as_many_more(length: int) -> None:
    size = bucket(length)
    assert length <= size <= max(length, 3 * length // 2)
    assert bucket(size) == size


def test_the_buckets_are_few() -> None:
    assert sorted({bucket(length) for length in range(1, 65)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            bucket(wrong)


def test_a_slab_is_one_block_whose_views_do_not_touch() -> None:
    layout = {
        "a": (torch.bool, (3, 5)),
        "none": (torch.float32, (0, 4)),
        "b": (torch.float32, (7,)),
        "one": (torch.float32, ()),
        "c": (torch.int64, (2, 3)),
        "d": (torch.float16, (1, 3)),
    }
    slab = Slab(layout, CPU)
    for name, (dtype, shape) in layout.items():
        assert slab.tensors[name].dtype == dtype and slab.tensors[name].shape == shape
        assert slab.tensors[name].storage_offset() * dtype.itemsize % ALIGNMENT == 0
    for at, tensor in enumerate(slab.tensors.values()):
        tensor.fill_(at % 2)
    for at, (name, tensor) in enumerate(slab.tensors.items()):
        assert (tensor == at % 2).all(), name
        assert np.shares_memory(slab.arrays()[name], slab.whole.numpy()) or tensor.numel() == 0


def test_what_is_shorter_is_followed_by_zeros() -> None:
    target = np.full((3, 4), 9.0, np.float32)
    fill(target, np.ones((2, 3), np.float32))
    assert target.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    fill(target, np.full((4, 3), 2, np.float32).T)
    assert (target == 2).all()
    for wrong in (np.ones((4, 4), np.float32), np.ones((2, 5), np.float32), np.ones(4, np.float32)):
        with pytest.raises(ValueError, match=r"does not fit a buffer of \(3, 4\)"):
            fill(target, wrong)
    with pytest.raises(TypeError):
        fill(target, np.ones((3, 4), np.float64))


# a program


class Watched(Processor):
    """The processor, noting which blocks it copies, and when it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def upload(self, source: Slab, target: Slab) -> None:
        self.seen.append(("in", source.whole.data_ptr()))
        super().upload(source, target)

    def finish(self, source: Slab, target: Slab, deadline: float | None) -> None:
        self.seen.append(("out and wait", source.whole.data_ptr()))
        super().finish(source, target, deadline)


def doubling(runner: Processor) -> Program:
    """`y = x + x`, then as many times `y += 1`."""
    program = Program(
        runner,
        inputs={"x": (torch.float32, (4,)), "more": (torch.int64, (3,))},
        outputs={"y": (torch.float32, (4,)), "seen": (torch.int64, (3,))},
        kept={"held": (torch.float32, (4,))},
    )
    x, y, more, seen = program.given["x"], program.made["y"], program.given["more"], program.made["seen"]

    def first() -> None:
        torch.add(x, x, out=y)
        seen.copy_(more)

    return program.record(first, lambda: y.add_(1))


def test_a_run_is_one_copy_in_one_copy_out_and_one_wait() -> None:
    runner = Watched()
    program = doubling(runner)
    result = program.result()
    runner.seen.clear()
    places = {name: tensor.data_ptr() for name, tensor in {**program.given, **program.made}.items()}
    for turn in range(3):
        values = {"x": np.arange(4, dtype=np.float32), "more": np.array([turn], np.int64)}
        program.run(values, result, repeats=(1, turn))
        assert result.arrays()["y"].tolist() == [0 + turn, 2 + turn, 4 + turn, 6 + turn]
        assert result.arrays()["seen"].tolist() == [turn, 0, 0]
        found = {name: tensor.data_ptr() for name, tensor in {**program.given, **program.made}.items()}
        assert found == places
    assert [kind for kind, _ in runner.seen] == ["in", "out and wait"] * 3
    assert len({place for _, place in runner.seen}) == 2


class Guarded(Processor):
    """The processor, refusing whoever calls a verb out of turn: on a GPU zeros that a thread writes into new
    buffers would go into the graph that another one is capturing on the same stream.
    """

    def slab(self, layout: Layout, *, host: bool = False) -> Slab:
        self.held()
        return super().slab(layout, host=host)

    def record(self, body: Body) -> Body:
        self.held()
        return super().record(body)

    def held(self) -> None:
        """Another thread cannot take the turn now."""
        found: list[bool] = []

        def take() -> None:
            if self.turn.acquire(blocking=False):
                self.turn.release()
                found.append(True)

        other = threading.Thread(target=take)
        other.start()
        other.join()
        assert not found, "the turn is not held"


def test_buffers_are_made_in_turn() -> None:
    runner = Guarded()
    with pytest.raises(AssertionError, match="the turn is not held"):
        runner.slab({"x": (torch.float32, (4,))})
    doubling(runner).result()


def test_results_are_the_callers_own() -> None:
    program = doubling(Processor())
    one, two = program.result(), program.result()
    for value, into in ((1.0, one), (5.0, two)):
        program.run({"x": np.full(4, value, np.float32), "more": np.zeros(3, np.int64)}, into)
    assert one.arrays()["y"].tolist() == [3] * 4 and two.arrays()["y"].tolist() == [11] * 4


def test_a_program_keeps_to_its_time() -> None:
    program = doubling(Processor())
    values = {"x": np.ones(4, np.float32), "more": np.zeros(3, np.int64)}
    result = program.result()
    with pytest.raises(TimeoutError, match="time limit"):
        program.run(values, result, deadline=time.monotonic() - 1)
    assert result.arrays()["y"].tolist() == [0] * 4
    program.run(values, result, deadline=math.inf)
    assert result.arrays()["y"].tolist() == [3] * 4


def test_waiting_for_a_turn_counts_as_time() -> None:
    """Another thread's long run, of a sampler on the same device, say, must not make a late run later."""
    program = doubling(Processor())
    values = {"x": np.ones(4, np.float32), "more": np.zeros(3, np.int64)}
    result, held, done = program.result(), threading.Event(), threading.Event()

    def hold() -> None:
        with program._runner.turn:
            held.set()
            done.wait(20)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="time limit"):
        program.run(values, result, deadline=start + 0.05)
    late = time.monotonic() - start
    done.set()
    other.join()
    assert 0.05 <= late < 10 and result.arrays()["y"].tolist() == [0] * 4
    program.run(values, result, deadline=time.monotonic() + 20)
    assert result.arrays()["y"].tolist() == [3] * 4


def test_threads_take_turns_on_one_program() -> None:
    program, wrong = doubling(Processor()), []

    def work(number: int) -> None:
        result = program.result()
        for turn in range(200):
            value = np.full(4, number * 1000 + turn, np.float32)
            program.run({"x": value, "more": np.zeros(3, np.int64)}, result)
            if not np.array_equal(result.arrays()["y"], 2 * value + 1):
                wrong.append((number, turn))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_long_walk_ends_soon_after_its_time() -> None:
    """Whoever starts body after body looks at the clock in between, and the next run is a whole one."""
    program = doubling(Processor())
    values, result = {"x": np.ones(4, np.float32), "more": np.zeros(3, np.int64)}, program.result()
    first, slow = program._recorded
    started: list[float] = []

    def late() -> None:
        started.append(time.monotonic())
        time.sleep(0.02)
        slow()

    program._recorded = [first, late]
    deadline = time.monotonic() + 0.05
    with pytest.raises(TimeoutError, match="time limit"):
        program.run(values, result, repeats=(1, 1000), deadline=deadline)
    assert 0 < len(started) < 10 and max(started) < deadline
    program.run(values, result, repeats=(1, 3))
    assert result.arrays()["y"].tolist() == [2 + 3] * 4


# arithmetic of what is recorded


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("outside", ["high", "highest"])
def test_convolutions_alone_may_round_while_a_body_is_recorded(tf32: bool, outside: str) -> None:
    """Products of matrices, which hold the cosines, stay float32; what was set outside is set again."""
    convolutions, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    allowed = convolutions.allow_tf32
    try:
        torch.set_float32_matmul_precision(outside)
        with pytest.raises(KeyError), arithmetic(tf32):
            assert convolutions.allow_tf32 is tf32 and convolutions.benchmark
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            raise KeyError
        assert torch.get_float32_matmul_precision() == outside
        assert convolutions.allow_tf32 is allowed
    finally:
        torch.set_float32_matmul_precision(before)
