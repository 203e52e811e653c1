"""Compiled kernels are launched through the driver as their manifest says, and every fault is one sentence.

Against a driver that needs no GPU and writes down its calls; results on a GPU: `test_kernels_gpu.py`.
"""

import ctypes
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from safelight.errors import BackendUnavailable, SafelightError
from safelight.kernels.ahead.driver import Driver
from safelight.kernels.ahead.launcher import KernelLibrary
from safelight.kernels.ahead.manifest import MANIFEST, KernelManifest

pytest.importorskip("triton", reason="compiling needs triton, which this machine has not")
ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here to make the stub driver")


@pytest.fixture(scope="module")
def folder(two_kernels: Callable[..., Path]) -> Path:
    """The test's kernels for sm_80 and sm_90."""
    return two_kernels("sm_80", "sm_90")


class Stub:
    """A driver library of the test's own; `log` is what was called since `reset`."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.stub_log.restype = ctypes.c_char_p

    def reset(
        self, *, capability: tuple[int, int] = (9, 0), devices: int = 1, shared: int = 232448, **codes: int
    ) -> None:
        values = (*capability, devices, shared, codes.get("init", 0), codes.get("load", 0))
        self.library.stub_reset(*values)

    def sizes(self, *sizes: int) -> None:
        self.library.stub_parameters((ctypes.c_int * len(sizes))(*sizes), len(sizes))

    @property
    def log(self) -> list[str]:
        return self.library.stub_log().decode().splitlines()


@pytest.fixture(scope="module")
def compiled_stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    library = tmp_path_factory.mktemp("stub") / "libstub.so"
    command = [str(COMPILER), "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(library)]
    subprocess.run([*command, str(ROOT / "tests/stub_cuda.c")], check=True)
    return Stub(library)


@pytest.fixture
def stub(compiled_stub: Stub) -> Stub:
    compiled_stub.reset()
    return compiled_stub


@dataclass
class FakeTensor:
    """What the launcher asks of a tensor on a GPU."""

    address: int
    dtype: str = "torch.bfloat16"
    is_cuda: bool = True
    index: int = 0

    def data_ptr(self) -> int:
        return self.address

    @property
    def device(self) -> "FakeTensor":
        return self


def opened(folder: Path, stub: Stub) -> KernelLibrary:
    return KernelLibrary.open(folder, driver=Driver(stub.path))


@needs_compiler
def test_a_launch_hands_over_the_argument_block(folder: Path, stub: Stub) -> None:
    with opened(folder, stub) as library:
        assert library.target == "sm_90"
        kernel = library.function("axpy_bf16")
        assert library.function("axpy_bf16") is kernel
        assert stub.log == ["retain 40", "push 0xc0", "load ELF", "function 0x60d axpy", "pop"]
        stub.reset()
        stub.sizes(8, 8, 8, 8, 4, 8, 8)
        x, y, out = (FakeTensor(address) for address in (0x1000, 0x7F0000000010, 0x20))
        kernel.launch((3, 1, 1), x, y, 0x30, 2**33, 0.1, stream=0xABC)
        kernel.launch((2**31 - 1, 65535, 65535), x, y, out, 16, 1, stream=0)
    values = [(0, "Q", 0x1000), (8, "Q", 0x7F0000000010), (16, "Q", 0x30), (24, "q", 2**33)]
    values += [(32, "f", 0.1), (40, "Q", 0), (48, "Q", 0)]
    lines = [
        f"parameter {at} at {offset}: {struct.pack(kind, value).hex(' ')}"
        for at, (offset, kind, value) in enumerate(values)
    ]
    first = "launch 0xf0 grid 3 1 1 block 128 1 1 shared 0 stream 0xabc extra (nil)"
    assert stub.log[:10] == ["push 0xc0", first, *lines, "pop"]
    second = "launch 0xf0 grid 2147483647 65535 65535 block 128 1 1 shared 0 stream (nil) extra (nil)"
    assert stub.log[11] == second
    assert stub.log[-4:] == ["push 0xc0", "unload 0x60d", "pop", "release 40"]


@needs_compiler
def test_shared_memory_above_48_kib_is_asked_for(folder: Path, stub: Stub) -> None:
    with opened(folder, stub) as library:
        kernel = library.function("product_fp16")
        size = KernelManifest.read(folder).variant("product_fp16").binaries["sm_90"].shared_bytes
        assert size > 48 << 10 and stub.log[-2:] == [f"attribute 0xf0 8 {size}", "pop"]
        stub.reset()
        kernel.launch((1, 1, 1), 0, 0, 0, 128, 5, stream=0)
        assert f"block 256 1 1 shared {size} stream" in stub.log[1]
    stub.reset(shared=64 << 10)
    with (
        opened(folder, stub) as library,
        pytest.raises(SafelightError, match="shared memory a block, this GPU"),
    ):
        library.function("product_fp16")


@needs_compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda call: call.pop(), r"takes 5 arguments \(x: \*bf16, .*scale: fp32\); got 4"),
        (lambda call: call.append(0), "takes 5 arguments .*; got 6"),
        (lambda call: call.__setitem__(0, 0.5), r"x: \*bf16 takes a tensor or an address; got float"),
        (lambda call: call.__setitem__(0, None), r"x: \*bf16 takes a tensor or an address; got NoneType"),
        (
            lambda call: call.__setitem__(1, FakeTensor(16, "torch.float32")),
            r"y: takes \*bf16; got .* float32",
        ),
        (lambda call: call.__setitem__(1, FakeTensor(16, is_cuda=False)), "y: the tensor is on .* to GPU 0"),
        (lambda call: call.__setitem__(1, FakeTensor(16, index=1)), "y: the tensor is on .* to GPU 0"),
        (lambda call: call.__setitem__(2, FakeTensor(8)), "out: compiled for multiples of 16, got 8"),
        (lambda call: call.__setitem__(3, 17), "n: compiled for multiples of 16, got 17"),
        (lambda call: call.__setitem__(3, 16.0), "n: i64 takes a whole number; got float"),
        (lambda call: call.__setitem__(3, 2**63), "a number does not fit its type"),
        (lambda call: call.__setitem__(4, "1"), "scale: fp32 takes a number; got str"),
        (lambda call: call.__setitem__(4, 1e300), r"scale: 1e\+300 does not fit its type, fp32"),
    ],
)
def test_a_wrong_argument_is_refused_before_the_driver(
    folder: Path, stub: Stub, change: Callable[[list], object], message: str
) -> None:
    with opened(folder, stub) as library:
        kernel = library.function("axpy_bf16")
        call: list = [16, 32, 48, 64, 1.0]
        change(call)
        stub.reset()
        with pytest.raises(ValueError, match=message):
            kernel.launch((1, 1, 1), *call, stream=0)
        assert not any(line.startswith("launch") for line in stub.log)
        kernel.launch((1, 1, 1), 16, 32, 48, 64, 1.0, stream=0)
        assert stub.log.count("push 0xc0") == stub.log.count("pop")


@needs_compiler
@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 1), (1, 65536, 1), (2**31, 1, 1), (1.0, 1, 1), (-1, 1, 1)])
def test_a_wrong_grid_is_refused(folder: Path, stub: Stub, grid: tuple) -> None:
    with opened(folder, stub) as library, pytest.raises(ValueError, match="a grid is three counts"):
        library.function("axpy_bf16").launch(grid, 16, 32, 48, 64, 1.0, stream=0)


@needs_compiler
@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_the_code_of_this_gpu_is_chosen(folder: Path, stub: Stub, name: str) -> None:
    stub.reset(capability=(8, 6) if name == "sm_80" else (9, 0))
    with opened(folder, stub) as library:
        assert library.target == name


@needs_compiler
@pytest.mark.parametrize(
    ("capability", "message"),
    [
        ((12, 0), r"has kernels for sm_80, sm_90, .* capability is 12\.0; build again .* --targets sm_120"),
        ((7, 5), r"capability is 7\.5; use the backend `reference`"),
    ],
)
def test_a_gpu_without_code_is_named(
    folder: Path, stub: Stub, capability: tuple[int, int], message: str
) -> None:
    stub.reset(capability=capability)
    with pytest.raises(BackendUnavailable, match=message):
        opened(folder, stub)
    assert stub.log == []


@needs_compiler
def test_what_the_driver_refuses_is_told(folder: Path, stub: Stub) -> None:
    stub.reset(init=100)
    with pytest.raises(BackendUnavailable, match=r"finds no GPU \(cuInit failed with CUDA_ERROR_NO_DEVICE"):
        Driver(stub.path)
    stub.reset(load=209)
    with opened(folder, stub) as library:
        with pytest.raises(
            SafelightError, match=r"cuModuleLoadData failed with CUDA_ERROR_NO_BINARY_FOR_GPU"
        ):
            library.function("axpy_bf16")
        assert stub.log[-1] == "pop"
    with pytest.raises(ValueError, match="there is no GPU 1; the driver sees 1, counted from 0"):
        KernelLibrary.open(folder, device=1, driver=Driver(stub.path))


@pytest.mark.parametrize("library", ["libno_such_driver.so.1", "libc.so.6"])
def test_no_driver_is_one_sentence(library: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"need the NVIDIA driver, and {library} cannot be used"):
        Driver(library)


@needs_compiler
def test_an_altered_cubin_never_reaches_the_driver(folder: Path, stub: Stub, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "sm_90/axpy_bf16.cubin"
    path.write_bytes(path.read_bytes() + b"\0")
    with opened(copy, stub) as library:
        with pytest.raises(SafelightError, match="axpy_bf16.cubin was altered"):
            library.function("axpy_bf16")
        with pytest.raises(ValueError, match=r"no compiled variant 'axpy'; the folder has \['axpy_bf16'"):
            library.function("axpy")
        library.function("axpy_fp16")
    assert stub.log.count("load ELF") == 1


@needs_compiler
def test_a_stale_folder_is_not_opened(folder: Path, stub: Stub, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    values = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(values | {"safelight": "0.0.1"}))
    with pytest.raises(SafelightError, match="compiled by safelight 0.0.1"):
        opened(copy, stub)


@needs_compiler
def test_a_kernel_of_other_sources_is_refused_alone(folder: Path, stub: Stub, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    values = json.loads((copy / MANIFEST).read_text())
    values["kernels"][0]["sources"]["kernel.py"] = "0" * 64
    (copy / MANIFEST).write_text(json.dumps(values))
    with opened(copy, stub) as library:
        library.function("product_fp16")
        with pytest.raises(SafelightError, match="axpy was compiled from another kernel.py than"):
            library.function("axpy_bf16")
        with pytest.raises(SafelightError, match="axpy was compiled from another kernel.py than"):
            library.check_fresh()  # of all kernels, as a service asks at its start
    assert stub.log.count("load ELF") == 1
    with opened(folder, stub) as library:
        library.check_fresh()


@needs_compiler
def test_a_closed_library_launches_nothing(folder: Path, stub: Stub) -> None:
    library = opened(folder, stub)
    kernel = library.function("axpy_bf16")
    library.close()
    library.close()
    assert stub.log.count("release 40") == 1
    with pytest.raises(ValueError, match="axpy_bf16 is closed"):
        kernel.launch((1, 1, 1), 16, 32, 48, 64, 1.0, stream=0)


@needs_compiler
def test_a_runner_passes_arguments_by_their_names(folder: Path, stub: Stub) -> None:
    variant = SimpleNamespace(name="axpy_bf16")
    arguments = {"n": 64, "scale": 0.5, "out": FakeTensor(48), "y": FakeTensor(32), "x": FakeTensor(16)}
    with opened(folder, stub) as library:
        library.function("axpy_bf16")
        stub.reset()
        stub.sizes(8, 8, 8)
        library.run(SimpleNamespace(), variant, (5, 1, 1), arguments)
        assert "grid 5 1 1 block 128 1 1" in stub.log[1]
        assert [line.split()[-8] for line in stub.log[2:5]] == ["10", "20", "30"]
        with pytest.raises(ValueError, match="no compiled variant 'axpy_fp64'"):
            library.run(SimpleNamespace(), SimpleNamespace(name="axpy_fp64"), (1, 1, 1), arguments)


@needs_compiler
def test_launching_imports_no_compiler_and_no_torch(folder: Path, stub: Stub) -> None:
    code = f"""
import sys
from pathlib import Path
from safelight.kernels.ahead.driver import Driver
from safelight.kernels.ahead.launcher import KernelLibrary
with KernelLibrary.open(Path({str(folder)!r}), driver=Driver({stub.path!r})) as library:
    library.function("axpy_fp16").launch((1, 1, 1), 16, 32, 48, 64, 1.0)
print(sorted({{"torch", "triton"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
