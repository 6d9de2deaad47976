"""Kernels on a device: streams, threads, graphs, devices. Run with pytest -m gpu."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from kernel_programs import axpy

from e3nn_accel import launch
from e3nn_accel.availability import cuda_availability
from e3nn_accel.compile import KernelProgram, Toolchain
from e3nn_accel.config import Config
from e3nn_accel.kernel_cache import KernelCache
from e3nn_accel.launch import Kernel, LoadedProgram, load_all
from e3nn_accel.nvrtc import Compiler, cupy_compiler

pytestmark = pytest.mark.gpu

PARAMETERS = {"axpy": "PPqf", "arguments": "PPiqfd", "reverse": "Pi"}
BLOCK = (128, 1, 1)


@pytest.fixture(autouse=True)
def possible() -> None:
    """Where there is a device, a CuPy that doesn't work is a failure and not a skip."""
    found = cuda_availability()
    assert found.ok, found.reason


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """With a cache of its own."""
    return Config(cache_dir=str(tmp_path_factory.getbasetemp() / "kernels"))


@pytest.fixture
def device() -> torch.device:
    """The first."""
    return torch.device("cuda", 0)


def kernel(name: str, device: torch.device, config: Config) -> Kernel:
    """One of axpy.cu's."""
    (loaded,) = load_all([axpy()], device, config)
    return loaded.kernel(name, PARAMETERS[name])


def add_twice(run: Kernel, x: torch.Tensor, y: torch.Tensor, a: float = 1.0) -> None:
    """y += 2 a x."""
    run(((x.numel() + 127) // 128, 1, 1), BLOCK, x, y, x.numel(), a)


def test_axpy(device: torch.device, config: Config) -> None:
    """On the current stream, at odd sizes, with an offset into the storage."""
    run = kernel("axpy", device, config)
    for size in (0, 1, 127, 128, 100_003):
        x = torch.randn(size + 3, device=device)[3:]
        y = torch.randn(size, device=device)
        expected = y + 2 * 0.5 * x
        add_twice(run, x, y, 0.5)
        assert torch.equal(y, expected)


def test_double_is_another_program(device: torch.device, config: Config) -> None:
    """By a macro; compiled beside the other."""
    (loaded,) = load_all([axpy(macros=("REAL=double",))], device, config)
    x = torch.randn(1000, device=device, dtype=torch.float64)
    y = torch.zeros_like(x)
    loaded.kernel("axpy", "PPqd")((8, 1, 1), BLOCK, x, y, 1000, 1 / 3)
    torch.testing.assert_close(y, 2 / 3 * x, rtol=1e-15, atol=0)


def test_every_kind_of_argument(device: torch.device, config: Config) -> None:
    """As the kernel reads it."""
    out = torch.zeros(5, dtype=torch.float64, device=device)
    run = kernel("arguments", device, config)
    run((1, 1, 1), (1, 1, 1), out, None, -5, 2**40 + 1, 0.25, 1 / 3)
    assert out.tolist() == [1.0, -5.0, 2.0**40 + 1, 0.25, 1 / 3]


def test_large_shared_memory(device: torch.device, config: Config) -> None:
    """Beyond the 48 KiB that need no permission; too much is an error, the next launch works."""
    run = kernel("reverse", device, config)
    for size in (100, 15_000, 100):
        x = torch.arange(float(size), device=device)
        run((1, 1, 1), BLOCK, x, size, shared=4 * size)
        assert torch.equal(x, torch.arange(float(size), device=device).flip(0))
    with pytest.raises(RuntimeError):
        run((1, 1, 1), BLOCK, x, 100, shared=2**20)
    run((1, 1, 1), BLOCK, x, 100, shared=400)
    assert torch.equal(x, torch.arange(100.0, device=device))


def test_side_stream(device: torch.device, config: Config) -> None:
    """The launch is in order with torch's work on that stream, which starts late."""
    run = kernel("axpy", device, config)
    x = torch.ones(1 << 20, device=device)
    y = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        y.fill_(5)
        add_twice(run, x, y)
        y.mul_(2)
    side.synchronize()
    assert torch.equal(y, torch.full_like(y, 14))


def test_no_waiting(device: torch.device, config: Config) -> None:
    """A launch returns while the device is still busy."""
    run = kernel("axpy", device, config)
    x, y = torch.ones(128, device=device), torch.zeros(128, device=device)
    add_twice(run, x, y)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(500_000_000)
    add_twice(run, x, y)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()
    assert torch.equal(y, torch.full_like(y, 4))


def test_graph_capture(device: torch.device, config: Config) -> None:
    """Captured at its first launch, replayed with new contents."""
    run = kernel("axpy", device, config)
    x, y = torch.ones(1000, device=device), torch.zeros(1000, device=device)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        z = y * 1
        add_twice(run, x, z)
        z = z + 1
    for value in (1.0, 3.0):
        x.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(z, torch.full_like(z, 2 * value + 1))


def test_nothing_is_allocated(device: torch.device, config: Config) -> None:
    """Neither by torch nor beside it."""
    run = kernel("axpy", device, config)
    x, y = torch.ones(1000, device=device), torch.zeros(1000, device=device)
    add_twice(run, x, y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    for _ in range(100):
        add_twice(run, x, y)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]) == before


def test_a_thread_that_has_not_used_cuda(device: torch.device, config: Config) -> None:
    """Its first work on the device is ours."""
    run = kernel("axpy", device, config)
    x, y = torch.ones(128, device=device), torch.zeros(128, device=device)
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            add_twice(run, x, y)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert errors == []
    assert torch.equal(y, torch.full_like(y, 2))


def test_many_threads(device: torch.device, config: Config) -> None:
    """Arguments of one never reach the launch of another."""
    run = kernel("axpy", device, config)
    x = torch.ones(1000, device=device)
    results = [torch.zeros(1000, device=device) for _ in range(8)]
    torch.cuda.synchronize()

    def work(y: torch.Tensor, a: float) -> None:
        for _ in range(200):
            add_twice(run, x, y, a)

    threads = [threading.Thread(target=work, args=(y, float(n))) for n, y in enumerate(results)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert [y.unique().tolist() for y in results] == [[400.0 * n] for n in range(8)]


def test_in_the_backward_pass(device: torch.device, config: Config) -> None:
    """The engine of autograd launches from a thread of its own."""
    run = kernel("axpy", device, config)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return 2 * x

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            out = torch.zeros_like(g)
            add_twice(run, g.contiguous(), out)
            return out

    x = torch.ones(1000, device=device, requires_grad=True)
    Twice.apply(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x.grad, 2))


def test_second_device(config: Config) -> None:
    """Loaded there, too, and launched there while the first is current; the first stays current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    second = torch.device("cuda", 1)
    run = kernel("axpy", second, config)
    with torch.cuda.device(0):
        x, y = torch.ones(1000, device=second), torch.zeros(1000, device=second)
        add_twice(run, x, y)
        assert torch.cuda.current_device() == 0
    assert torch.equal(y, torch.full_like(y, 2))


def test_ptx_is_compiled_by_the_driver(device: torch.device, tmp_path: Path) -> None:
    """What a device gets that NVRTC doesn't know yet."""
    found = cupy_compiler()
    major, minor = torch.cuda.get_device_capability(device)
    older = tuple(a for a in found.architectures if a < 10 * major + minor)
    if not older:
        pytest.skip("the oldest device that NVRTC knows")
    tools = Toolchain(Compiler(found.version, older, found.run), KernelCache(tmp_path))
    for _ in range(2):  # the second time from the disk
        binary = Toolchain(tools.compiler, tools.cache).build(axpy(), 10 * major + minor)
        assert binary.target == f"compute_{older[-1]}"
        run = LoadedProgram(axpy(), binary, 0).kernel("axpy", "PPqf")
        x, y = torch.ones(1000, device=device), torch.zeros(1000, device=device)
        add_twice(run, x, y)
        assert torch.equal(y, torch.full_like(y, 2))


def test_from_the_cache(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process loads what the first has compiled; with CuPy's own NVRTC."""
    config = Config(cache_dir=str(tmp_path))
    program = axpy(name="cached")
    for _ in range(2):
        monkeypatch.setattr(launch, "_loaded", {})
        launch._toolchain.cache_clear()
        (loaded,) = load_all([program], device, config)
        x, y = torch.ones(1000, device=device), torch.zeros(1000, device=device)
        add_twice(loaded.kernel("axpy", "PPqf"), x, y)
        assert torch.equal(y, torch.full_like(y, 2))
    assert len(list(tmp_path.iterdir())) == 1
    assert loaded.binary.resources["axpy"].registers > 0
    assert loaded.binary.image[:4] == b"\x7fELF"


def test_several_in_parallel(device: torch.device, config: Config) -> None:
    """Compiled by threads, loaded in order."""
    programs: list[KernelProgram] = [
        axpy(name=f"several{n}", header=f"constexpr int FACTOR = {n};") for n in range(6)
    ]
    x = torch.ones(1000, device=device)
    for n, loaded in enumerate(load_all(programs, device, config)):
        y = torch.zeros(1000, device=device)
        add_twice(loaded.kernel("axpy", "PPqf"), x, y)
        assert torch.equal(y, torch.full_like(y, n))


def test_host_time_of_a_launch(device: torch.device, config: Config) -> None:
    """A few microseconds: a launch by CuPy took 8.7 where this was written for 3 or 4."""
    import time

    run = kernel("axpy", device, config)
    x, y = torch.ones(128, device=device), torch.zeros(128, device=device)
    for _ in range(100):
        add_twice(run, x, y)
    torch.cuda.synchronize()
    times = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(100):
            run((1, 1, 1), BLOCK, x, y, 128, 1.0)
        times.append((time.perf_counter() - started) / 100)
        torch.cuda.synchronize()
    microseconds = 1e6 * sorted(times)[len(times) // 2]
    print(f"launch: {microseconds:.2f} us")
    assert microseconds < 30
