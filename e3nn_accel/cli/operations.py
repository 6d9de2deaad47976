"""Every distinct operation of a model, timed by itself on the operands that it really gets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from e3nn_accel.active import active
from e3nn_accel.cli.timing import Measurement, Prepare, measure
from e3nn_accel.interception import stock_call
from e3nn_accel.unfused import is_fused

OURS, STOCK = "e3nn_accel", "e3nn"
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Operation:
    """Modules of one kind that are called with operands of one kind.

    Attributes:
        module: The first of them.
        paths: Their names in the model.
        arguments: Of the first's call; tensors are detached, and require grad where they did.
        operation: What it was: linear, tensor_product, convolution, contraction or radial_mlp.
    """

    module: Any
    paths: tuple[str, ...]
    arguments: Arguments
    operation: str

    @property
    def shapes(self) -> str:
        """Of the operands."""
        return " ".join("x".join(map(str, x.shape)) for x in self._tensors())

    @property
    def device(self) -> torch.device:
        """Where its operands are."""
        return self._tensors()[0].device

    def _tensors(self) -> list[torch.Tensor]:
        args, kwargs = self.arguments
        return [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]


def operations_of(model: torch.nn.Module, call: Callable[[], object]) -> list[Operation]:
    """Record the calls of supported modules while ``call`` runs the accelerated model."""
    paths = {module: path for path, module in model.named_modules()}
    found: dict[Any, Operation] = {}
    with _recording() as calls:
        call()
    for module, operation, (args, kwargs) in calls:
        kept = tuple(_kept(x) for x in args), {name: _kept(x) for name, x in kwargs.items()}
        first = Operation(module, (paths[module],), kept, operation)
        key = (type(module), repr(_kind(module, operation)), first.shapes, str(_needs(kept)))
        before = found.get(key)
        if before is not None:
            first = Operation(
                before.module, (*before.paths, paths[module]), before.arguments, operation
            )
        found[key] = first
    return list(found.values())


@contextlib.contextmanager
def _recording() -> Iterator[list[tuple[Any, str, Arguments]]]:
    """Note every call that reaches the dispatcher."""
    dispatcher: Any = active.dispatcher
    original = dispatcher.call
    calls: list[tuple[Any, str, Arguments]] = []

    def call(module: Any, runner: Any, target: Any, args: Any, kwargs: Any) -> Any:
        fused = is_fused(module, args, kwargs)
        calls.append((module, "convolution" if fused else target.operation, (args, kwargs)))
        return original(module, runner, target, args, kwargs)

    dispatcher.call = call
    try:
        yield calls
    finally:
        del dispatcher.call


def _kind(module: torch.nn.Module, operation: str) -> Any:
    assert active.dispatcher is not None
    return active.dispatcher.registry.describe(module, operation)


def _kept(value: Any) -> Any:
    if not torch.is_tensor(value):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _leaves(arguments: Arguments) -> list[torch.Tensor]:
    args, kwargs = arguments
    return [x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.requires_grad]


def _needs(arguments: Arguments) -> list[bool]:
    args, kwargs = arguments
    return [torch.is_tensor(x) and x.requires_grad for x in (*args, *kwargs.values())]


def time_operation(operation: Operation, rounds: int, train: bool) -> dict[str, Measurement]:
    """By mode: forward; with the gradients of its inputs; if asked for, with those of its weights.

    Each call gets fresh copies, so that what we find out about an edge index or a species is found
    out anew; in a model, several operations share it.
    """
    found = {"forward": _measure(operation, rounds, _forward)}
    if _leaves(operation.arguments):
        found["forward+backward"] = _measure(operation, rounds, _gradients)
    weights = list(operation.module.parameters())
    if train and weights:
        operation.module.requires_grad_(True)
        found["with weights"] = _measure(operation, rounds, _gradients)
        operation.module.requires_grad_(False)
    return found


def _measure(
    operation: Operation,
    rounds: int,
    mode: Callable[[Callable[[Arguments], torch.Tensor], Operation], Prepare],
) -> Measurement:
    module = operation.module
    stock = _unfused if operation.operation == "convolution" else stock_call
    ways = {
        STOCK: mode(lambda a: _tensor_of(stock(module, a[0], a[1])), operation),
        OURS: mode(lambda a: _tensor_of(module(*a[0], **a[1])), operation),
    }
    return measure(ways, OURS, rounds, operation.device)


def _tensor_of(result: Any) -> torch.Tensor:
    """A radial embedding returns what it hasn't changed, too."""
    found: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return found


def _unfused(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """What MACE's interaction blocks do themselves: gather, product, sum over neighbours."""
    from mace.tools.scatter import scatter_sum

    nodes, edges, weights = args[:3]
    index = args[3] if len(args) > 3 else kwargs["edge_index"]
    messages = stock_call(module, (nodes[index[0]], edges, weights), {})
    total: torch.Tensor = scatter_sum(messages, index[1], dim=0, dim_size=nodes.shape[0])
    return total


def _forward(run: Callable[[Arguments], torch.Tensor], operation: Operation) -> Prepare:
    def prepare() -> Callable[[], object]:
        arguments = _copies(operation.arguments)

        def call() -> object:
            with torch.no_grad():
                return run(arguments)

        return call

    return prepare


def _gradients(run: Callable[[Arguments], torch.Tensor], operation: Operation) -> Prepare:
    weights = [p for p in operation.module.parameters() if p.requires_grad]
    with torch.no_grad():
        direction = torch.randn_like(run(operation.arguments))

    def prepare() -> Callable[[], object]:
        arguments = _copies(operation.arguments)
        wanted = [*_leaves(arguments), *weights]
        return lambda: torch.autograd.grad(run(arguments), wanted, direction, allow_unused=True)

    return prepare


def _copies(arguments: Arguments) -> Arguments:
    args, kwargs = arguments
    return tuple(_kept(x) for x in args), {name: _kept(x) for name, x in kwargs.items()}
