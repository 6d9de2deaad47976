"""The only place that knows versions, and private names of torch, e3nn and MACE."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.fx
import torch.utils.checkpoint

from e3nn_accel.tensor_keys import OfTensors

StopRecomputation: type[Exception] = getattr(
    torch.utils.checkpoint, "_StopRecomputationError", type("StopRecomputation", (Exception,), {})
)
"""How torch.utils.checkpoint ends a recomputation early, from within an operation: no failure."""

OutOfMemory: type[Exception] = torch.cuda.OutOfMemoryError
"""A device's memory is full, for which no plan is to blame."""

DeviceType: Any = torch._C._autograd.DeviceType
"""Kinds of devices, as profiled events name them."""

Function = TypeVar("Function", bound=Callable[..., Any])

WRITTEN_FOR = {
    "python": ">=3.10",
    "torch": ">=2.4",
    "e3nn": ">=0.4.4,<0.7",
    "mace-torch": ">=0.3.6,<0.4",
}
"""What plans were written for, as PEP 440 specifiers. ``doctor`` reports others, nothing refuses them: the self-check
decides whether a plan is right."""

CALCULATORS = ("0.3.16",)
"""Versions of MACE whose calculator is known; others keep their own."""

CUPY = "14.*"
"""Versions of CuPy that have what kernels need."""

VESIN = ">=0.6,<0.7"
"""Versions of vesin that search on a GPU, for torch's tensors, in the way that is known."""


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def within(version: str, versions: str) -> bool:
    """Whether a version is among those of a PEP 440 specifier; a nightly build counts for its release."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(versions).contains(version, prereleases=True)


def nvrtc_can_forget(version: Sequence[int]) -> bool:
    """Whether this NVRTC is told not to keep what it compiled, as it does since 12.9 in the driver's cache."""
    return tuple(version) >= (13, 0)


def unknown_calculator() -> str:
    """Why the installed MACE keeps its calculator, or an empty string."""
    version = version_of("mace-torch")
    if version in CALCULATORS:
        return ""
    return f"the calculator of MACE {version} isn't known, only {CALCULATORS}"


def vesin_neighbor_list() -> Any:
    """The class that finds pairs.

    Raises:
        ImportError: There is none, or another version.
    """
    version = version_of("vesin")
    if version is None or not within(version, VESIN):
        raise ImportError(f"vesin {VESIN} isn't installed" + (f" but {version}" if version else ""))
    from vesin import NeighborList

    return NeighborList


# Every call asks these. Their names are resolved once: after something large has gone through the
# caches, each step from torch to a function deep within it is a wait for memory.

jit_tracing_state: Callable[[], object] = torch._C._get_tracing_state
"""What torch.jit is tracing, or None."""

functorch_transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack
"""The functorch transform (vmap, grad, jvp) that is running, whose tensors are not plain ones, or None."""

_CPU = torch.device("cpu")
_forward_ad: Any = torch.autograd.forward_ad
_hooks: Any = torch.nn.modules.module
_fx: Any = torch.fx._symbolic_trace


any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether torch.autocast is on for CPUs, CUDA devices or some others: far quicker to ask than for one."""


def autocast_active(device: torch.device) -> bool:
    """Whether torch.autocast changes dtypes on this kind of device."""
    return bool(torch.is_autocast_enabled(device.type))


def autocast_takes(x: torch.Tensor) -> bool:
    """Whether torch.autocast changes dtypes on this tensor's kind of device.

    A device's type is a text, which torch writes and reads again: several times what the rest costs.
    """
    if (x.is_cuda or x.device == _CPU) and not any_autocast():
        return False
    return autocast_active(x.device)


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation (dual numbers) is on; plans have no rules for it."""
    return int(_forward_ad._current_level) >= 0


def symbolically_tracing() -> bool:
    """Whether torch.fx is tracing (torch.fx.symbolic_trace calls modules with proxies)."""
    fx: Any = sys.modules.get("torch.fx._symbolic_trace")
    if fx is None or not getattr(fx, "_is_fx_tracing_flag", True):
        return False
    tracing = (
        getattr(fx, "is_fx_symbolic_tracing", None) or fx.is_fx_tracing
    )  # the old name warns on new torch
    return bool(tracing())


def _fx_tracing_function() -> Callable[[], object]:
    """What says quickest whether torch.fx is tracing: a flag, or, since torch 2.14, one of each thread."""
    if hasattr(_fx, "_is_fx_tracing_flag"):
        return lambda: _fx._is_fx_tracing_flag
    return getattr(_fx, "_get_is_fx_tracing", symbolically_tracing)


_fx_tracing = _fx_tracing_function()


def run_while_tracing(function: Function) -> Function:
    """Mark a function that torch.compile runs, rather than traces, and whose result it takes for constant.

    What `torch.compiler.assume_constant_result` does, without its import of torch._dynamo (seconds)
    in programs that never compile. Its arguments must be constants, modules are none before torch 2.13.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


COMPILER_TRACES_CALLS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5)
"""Whether torch.compile takes a module's ``__call__``; torch 2.4 goes from a module to its forward, so that
what it compiles is stock e3nn."""


def compiling_forwards() -> bool:
    """Whether torch.compile is tracing, and goes past ``__call__``."""
    return not COMPILER_TRACES_CALLS and _translator() is not None


def _translator() -> Any:
    """What torch._dynamo traces with in this thread, or None.

    `InstructionTranslator.current_tx` raises an AttributeError in a thread that never compiled, which
    within a property would say that the property isn't there.
    """
    dynamo: Any = sys.modules.get("torch._dynamo.symbolic_convert")
    return getattr(getattr(dynamo, "tls", None), "current_tx", None)


def exporting() -> bool:
    """Whether torch.export is tracing; to be asked from functions that torch.compile doesn't trace."""
    if hasattr(torch.compiler, "is_exporting"):
        return bool(torch.compiler.is_exporting())
    translator = _translator()  # before torch 2.7
    return torch.compiler._is_compiling_flag or bool(translator and translator.export)


def opaque_operation_tags() -> tuple[torch.Tag, ...]:
    """Tags of an operation that torch.compile need not look into, and can't capture in a CUDA graph.

    Plans may wait for the device (is ``node_attrs`` one-hot?). Before torch had the second tag,
    ``mode="reduce-overhead"`` on a GPU would meet that only when it captures.
    """
    names = ("pt2_compliant_tag", "cudagraph_unsafe")
    return tuple(getattr(torch.Tag, name) for name in names if hasattr(torch.Tag, name))


@contextlib.contextmanager
def autograd_within_operations() -> Iterator[None]:
    """Let autograd record within the kernel of a custom operation, below which torch switches it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


def global_module_hooks() -> bool:
    """Whether hooks are registered for every nn.Module of the process."""
    return bool(
        _hooks._global_forward_hooks
        or _hooks._global_forward_pre_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
    )


def module_hooks(module: torch.nn.Module) -> bool:
    """Whether the module has hooks of its own (pickles of old torch lack some of these fields)."""
    fields = module.__dict__
    return bool(
        fields.get("_forward_hooks")
        or fields.get("_forward_pre_hooks")
        or fields.get("_backward_hooks")
        or fields.get("_backward_pre_hooks")
    )


def is_plain_call(module: torch.nn.Module, forward: Any) -> bool:
    """Whether a call of it comes to this forward and nothing else, but for what `likeness_of` sees.

    Which are torch.jit's tracing and functorch's transforms: no tensors are alike then. The rest is asked in one step,
    since a call at a glance takes little longer than `e3nn_accel.guard` does, which has the reasons.
    """
    fields = module.__dict__
    try:
        return not (
            type(module).forward is not forward
            or "forward" in fields
            or fields["_forward_hooks"]
            or fields["_forward_pre_hooks"]
            or fields["_backward_hooks"]
            or fields["_backward_pre_hooks"]
            or _hooks._global_forward_hooks
            or _hooks._global_forward_pre_hooks
            or _hooks._global_backward_hooks
            or _hooks._global_backward_pre_hooks
            or _forward_ad._current_level >= 0
            or _fx_tracing()
        )
    except (AttributeError, KeyError):  # pickles of old torch, or a torch with other names
        return False


def original_forward(cls: type[torch.nn.Module]) -> Any:
    """The forward that the class was written with, or None where another was put in its place."""
    defining = next(base for base in cls.__mro__ if "forward" in base.__dict__)
    written_in = getattr(cls.forward, "__globals__", {}).get("__name__")
    return cls.forward if written_in == defining.__module__ else None


def version_counter(tensor: torch.Tensor) -> int | None:
    """How often the tensor was written in place, or None where torch doesn't count (inference tensors)."""
    return None if tensor.is_inference() else int(tensor._version)


def current_stream_function() -> Callable[[int], int]:
    """The quickest way to the address of a device's current CUDA stream."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # as torch's own Triton kernels do
    return raw or (lambda index: int(torch.cuda.current_stream(index).cuda_stream))


def new_memory_function() -> Callable[..., torch.Tensor] | None:
    """The quickest way to a tensor on the current CUDA device, or None.

    Given shape, strides and dtype, as code that torch compiled calls it.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return getattr(guards, "_empty_strided_cuda", None)


def current_device_function() -> Callable[[], int]:
    """The quickest way to the index of the current CUDA device."""
    return getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device


def likeness_of(tensors: Sequence[torch.Tensor], with_rows: int) -> Callable[..., bool] | None:
    """What says of as many tensors whether they are like these, as torch's compiler guards its code; None: nothing.

    In class, dtype, device, layout, whether they want gradients, what the thread's modes (autocast, inference) make
    of them, and in shape, each in one piece; but for the first dimension of the first ``with_rows``.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    make = getattr(guards, "TensorGuards", None)
    if make is None:
        return None
    sizes: list[list[int | None]] = [list(t.shape) for t in tensors]
    strides = [[math.prod(t.shape[n + 1 :]) for n in range(t.dim())] for t in tensors]
    for size in sizes[:with_rows]:
        size[0] = None
    try:
        alike: Callable[..., bool] = make(
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check
    except (AttributeError, RuntimeError, TypeError):  # another torch's takes something else
        return None
    return alike


def dispatch_mode_active() -> bool:
    """Whether a TorchDispatchMode (a counter of operations, say) is to see every operation."""
    return int(torch._C._len_torch_dispatch_stack()) > 0


def numeric_settings() -> tuple[Any, ...]:
    """Settings of the process on which the operations that torch picks, and so roundings, depend."""
    try:
        precision = torch.get_float32_matmul_precision()
    except (
        RuntimeError
    ):  # some precisions were set by the newer interface, which names each by itself
        precision = "mixed"
    return torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), precision


def copy_together(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors of one dtype, each in one piece, in a kernel; other lists torch takes one by one."""
    torch._foreach_copy_(targets, sources)


def product_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The ``_w3j_*`` constants that e3nn compiled into a tensor product, in the module's own precision."""
    compiled = module._modules.get("_compiled_main_left_right")
    if compiled is None:
        return {}
    return {
        name.rsplit(".", 1)[-1]: buffer
        for name, buffer in compiled.named_buffers()
        if "_w3j_" in name
    }


def as_numpy(constants: torch.Tensor) -> Any:
    """Constants as a numpy array in their own precision; numpy has no bfloat16."""
    constants = constants.detach().cpu()
    exact = constants if constants.dtype in (torch.float32, torch.float64) else constants.float()
    return exact.numpy()


def wigner_3j(l1: int, l2: int, l3: int) -> torch.Tensor:
    """e3nn's own coefficients, float64: signs differ between e3nn versions, so never shipped."""
    from e3nn import o3

    coefficients: torch.Tensor = o3.wigner_3j(l1, l2, l3, dtype=torch.float64)
    return coefficients


_captured_leaves: OfTensors[bool] = OfTensors()


def zero_all(tensors: Sequence[torch.Tensor]) -> None:
    """Fill each with zeros, by a kernel for all of a dtype."""
    torch._foreach_zero_(list(tensors))


def double_of(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Another parameter of the same class on the same memory, with a place of its own in autograd's graphs."""
    found: torch.nn.Parameter = torch.Tensor._make_subclass(
        type(parameter), parameter.detach(), parameter.requires_grad
    )
    found.__dict__.update(parameter.__dict__)
    return found


def gradients_wanted(ctx: Any, inputs: int) -> tuple[bool, ...]:
    """Whether this backward pass asks for the gradient of each of the first inputs of a custom operation.

    ``ctx.needs_input_grad`` is true for every input that requires a gradient, also where
    ``autograd.grad`` asks for others alone; the engine knows which of the next functions will run.
    """
    needed = ctx.needs_input_grad[:inputs]
    if sum(ctx.needs_input_grad) == 1:
        return needed  # type: ignore[no-any-return]  # or this wouldn't run
    functions = ctx.next_functions  # made anew each time it is read
    return tuple([bool(needed[n]) and engine_wants(functions[n][0]) for n in range(inputs)])


def engine_wants(function: Any) -> bool:
    """Whether the engine will go on to this function, the next one of an input, in this backward pass.

    It refuses to say so of a leaf that ``autograd.grad`` captures, by an exception that costs more than
    a small kernel: such a leaf is wanted, and from then on taken for wanted.
    """
    if function is None:
        return False
    leaf = getattr(function, "variable", None)
    if leaf is not None and _captured_leaves.get(leaf):
        return True
    try:
        return bool(torch._C._will_engine_execute_node(function))
    except RuntimeError:
        if leaf is not None:
            _captured_leaves.put(leaf, True)
        return True
