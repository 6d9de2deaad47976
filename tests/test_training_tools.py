"""What people train with works as without us: averages, adapters, hooks, several processes."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_ran_on_torch, usage
from small_models import (
    BUILD,
    build,
    energy_and_forces,
    inputs_of,
    mace,
    molecules,
    same,
    value_and_gradients,
    without_torchscript,
)

import e3nn_accel

Log = list[tuple[Any, ...]]
OPERATION = {name: "linear" if name == "Linear" else "tensor_product" for name in BUILD}


def both(run: Callable[[], Any], tolerance: float = 1e-5) -> Any:
    """The same experiment with stock e3nn and enabled; they must agree. Returns the latter."""
    stock = run()
    with e3nn_accel.enabled():
        ours = run()
    same(ours, stock, tolerance)
    return ours


def test_moving_averages() -> None:
    """torch_ema writes through `param.data`, which no version counter notices."""
    torch_ema = pytest.importorskip("torch_ema")

    def run() -> list[torch.Tensor]:
        module = build("FullyConnectedTensorProduct")
        inputs = inputs_of(module)
        average = torch_ema.ExponentialMovingAverage(module.parameters(), decay=0.5)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            module(*inputs).square().sum().backward()
            optimizer.step()
            average.update()
            found.append(module(*inputs).detach())
            with average.average_parameters():
                found.append(module(*inputs).detach())
            found.append(module(*inputs).detach())
        return found

    found = both(run)
    assert not torch.allclose(found[-2], found[-1])
    assert torch.equal(found[-3], found[-1])


def test_moving_averages_of_a_mace() -> None:
    """The same for a whole model's energies and forces."""
    torch_ema = pytest.importorskip("torch_ema")
    batch = molecules(1)

    def run() -> list[list[torch.Tensor]]:
        model = mace()
        average = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        average.update()
        found = [energy_and_forces(model, batch)]
        with average.average_parameters():
            found.append(energy_and_forces(model, batch))
        return [*found, energy_and_forces(model, batch)]

    found = both(run, 1e-9)
    assert not torch.allclose(found[0][1], found[1][1])


def with_adapters() -> Any:
    """A MACE with LoRA in every linear, its second factors no longer zero."""
    model = mace()
    from mace.modules import lora

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora.inject_lora(model, rank=2, alpha=1.0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.normal_(std=0.1)
    return model.double()


def test_low_rank_adapters() -> None:
    """LoRA swaps `weight.data` for one call in inference, and adds a branch in training."""
    batch = molecules(1)

    def run() -> list[torch.Tensor]:
        model = with_adapters()
        found = energy_and_forces(model, batch)
        with torch.no_grad():
            for _ in range(2):
                found.append(model(dict(batch), compute_force=False)["energy"])
        model(dict(batch), training=True)["forces"].square().sum().backward()
        found += [p.grad for p in model.parameters() if p.grad is not None]
        from mace.modules import lora

        return [*found, *energy_and_forces(lora.merge_lora_weights(model), batch)]

    assert len(both(run, 1e-8)) > 10


def test_adapters_are_accelerated() -> None:
    """The wrapped linears and the adapters themselves run through plans."""
    model = with_adapters()
    e3nn_accel.enable()
    energy_and_forces(model, molecules(1))
    rows = {row.path: row for row in e3nn_accel.explain(model).rows}
    assert rows["products.0.linear.base"].backend == "torch"
    assert rows["products.0.linear.lora_A"].backend == "torch"
    assert all(row.backend == "torch" for row in rows.values())


def outline(value: Any) -> Any:
    """What a hook was given, comparable between runs."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), round(float(value.detach().double().sum()), 4))
    if isinstance(value, tuple | list):
        return [outline(v) for v in value]
    return {k: outline(v) for k, v in value.items()} if isinstance(value, dict) else value


def hook_every_way(module: torch.nn.Module, name: str, log: Log) -> list[Any]:
    """Every kind of hook that a module offers; each notes what it is given."""

    def note(kind: str) -> Callable[..., None]:
        return lambda m, *rest: log.append((name, kind, type(m).__name__, outline(rest)))

    return [
        module.register_forward_pre_hook(note("pre")),
        module.register_forward_pre_hook(note("pre with keywords"), with_kwargs=True),
        module.register_forward_hook(note("forward")),
        module.register_forward_hook(note("always"), always_call=True),
        module.register_full_backward_pre_hook(note("backward pre")),
        module.register_full_backward_hook(note("backward")),
    ]


@pytest.mark.parametrize("name", BUILD)
def test_hooks_of_a_module(name: str) -> None:
    """All fire in stock's order with stock's arguments; removed, the plan is back."""

    def run(module: torch.nn.Module) -> Log:
        log: Log = []
        handles = hook_every_way(module, name, log)
        module(*inputs_of(module)).square().sum().backward()
        for handle in handles:
            handle.remove()
        return log

    stock = run(build(name))
    assert len(stock) == 6
    e3nn_accel.enable()
    module = build(name)
    assert run(module) == stock
    module(*inputs_of(module))
    assert usage(module)[OPERATION[name], "torch"] == 1


def test_hooks_change_what_they_change() -> None:
    """Hooks that replace inputs, outputs and gradients do so."""

    def run() -> list[torch.Tensor]:
        module = build("Linear")
        with contextlib.ExitStack() as stack:
            for handle in (
                module.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
                module.register_forward_hook(lambda m, args, out: out + 1),
                module.register_full_backward_hook(lambda m, gi, go: (3 * gi[0],)),
            ):
                stack.callback(handle.remove)
            return value_and_gradients(module, *inputs_of(module))

    both(run)


@pytest.mark.parametrize("scripted", [False, True])
def test_hooks_of_all_modules(scripted: bool) -> None:
    """Global hooks see every module of a model, in stock's order; where stock raises, the same."""
    hooks = torch.nn.modules.module

    def run() -> Log:
        with contextlib.nullcontext() if scripted else without_torchscript():
            module = torch.nn.Sequential(build("Linear"), torch.nn.Tanh())
        log: Log = []
        note = lambda kind: lambda m, *rest: log.append((kind, type(m).__name__, outline(rest)))  # noqa: E731
        with contextlib.ExitStack() as stack:
            for handle in (
                hooks.register_module_forward_pre_hook(note("pre")),
                hooks.register_module_forward_hook(note("forward")),
                hooks.register_module_full_backward_pre_hook(note("backward pre")),
                hooks.register_module_full_backward_hook(note("backward")),
            ):
                stack.callback(handle.remove)
            try:
                module(*inputs_of(module[0])).square().sum().backward()
            except RuntimeError as error:  # hooks on a ScriptModule
                log.append((str(error),))
        return log

    stock = run()
    assert len(stock) > 2
    e3nn_accel.enable()
    assert run() == stock
    module = build("Linear")
    module(*inputs_of(module))
    assert_ran_on_torch(module, "linear", 1)


def test_hooks_in_a_mace() -> None:
    """On every module at once: the same log as stock, convolutions called edge by edge."""
    batch = molecules(1)

    def run() -> Log:
        model = mace()
        log: Log = []
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_hook(
                    lambda m, args, out, name=name: log.append((name, outline(args), outline(out)))
                )
        energy_and_forces(model, batch)
        return log

    stock = run()
    with e3nn_accel.enabled():
        ours = run()
    assert [entry[0] for entry in ours] == [entry[0] for entry in stock]
    assert "interactions.0.conv_tp" in {entry[0] for entry in stock}
    assert [e for e in ours if e[0]] == [e for e in stock if e[0]]


def test_one_hook_leaves_the_others_accelerated() -> None:
    """A hook on one product keeps that one on stock e3nn and no other."""
    model, batch = mace(), molecules(1)
    stock = energy_and_forces(model, batch)
    seen: list[tuple[int, ...]] = []
    hooked = model.interactions[0].conv_tp
    hooked.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    e3nn_accel.enable()
    same(energy_and_forces(model, batch), stock, 1e-9)
    assert seen == [(batch["edge_index"].shape[1], hooked.irreps_out.dim)]
    assert [row.path for row in e3nn_accel.explain(model).fallbacks] == ["interactions.0.conv_tp"]


def steps(module: torch.nn.Module, wrapped: torch.nn.Module, rank: int) -> list[torch.Tensor]:
    """Losses and gradients of two steps of training on a rank's own data."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    found = []
    for step in range(2):
        optimizer.zero_grad()
        loss = wrapped(*inputs_of(module, seed=10 * rank + step)).square().mean()
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in module.parameters() if p.numel())]  # type: ignore[union-attr]
        optimizer.step()
    return found


def rank_of_two(rank: int, folder: str) -> None:
    """One process of a data-parallel training, with stock e3nn and enabled."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    results, kept = [], []
    for options in (None, {"strict": True}):
        if options is not None:
            e3nn_accel.enable(**options)
        module = build("FullyConnectedTensorProduct")
        kept.append(torch.nn.parallel.DistributedDataParallel(module))
        results.append(steps(module, kept[-1], rank))
    assert_ran_on_torch(module, "tensor_product", 2)
    torch.save(results, f"{folder}/rank{rank}.pt")
    while not Path(folder, f"rank{1 - rank}.pt").exists():  # it may still be receiving from us
        time.sleep(0.01)
    os._exit(0)  # torch joins gloo's thread with the GIL held, which that thread may be waiting for


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo: losses and averaged gradients are stock's on each rank."""
    import torch.multiprocessing

    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for stock, ours in ranks:
        same(ours, stock)
    same(ranks[0][1][1], ranks[1][1][1])
    assert not torch.allclose(ranks[0][1][0], ranks[1][1][0])


@pytest.mark.parametrize("name", [n for n in BUILD if n not in ("FullTensorProduct",)])
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
def test_functional_call(name: str, leaf: bool) -> None:
    """Parameters swapped for one call, leaves or computed ones; the module's own stay."""

    def run() -> list[torch.Tensor]:
        module = build(name)
        inputs = inputs_of(module)
        own = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
        swapped = {k: p if leaf else 2 * p for k, p in own.items()}
        out = torch.func.functional_call(module, swapped, inputs)
        wanted = [*inputs, *(p for p in own.values() if p.numel())]
        gradients = torch.autograd.grad(out.square().sum(), wanted)
        return [out.detach(), *gradients, module(*inputs).detach()]

    both(run)


def test_functional_call_first_spoils_nothing() -> None:
    """Where the first call of all has computed parameters, later calls are still accelerated."""
    e3nn_accel.enable()
    module = build("FullyConnectedTensorProduct")
    weights = {k: (2 * p.detach().requires_grad_()) for k, p in module.named_parameters()}
    torch.func.functional_call(module, weights, inputs_of(module))
    module(*inputs_of(module))
    assert usage(module)["tensor_product", "torch"] >= 1


class Halved(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def test_parametrizations() -> None:
    """A parametrized weight, for which torch changes the class, is computed at each use."""

    def run() -> list[torch.Tensor]:
        module = build("Linear")
        torch.nn.utils.parametrize.register_parametrization(module, "weight", Halved())
        found = value_and_gradients(module, *inputs_of(module))
        with torch.no_grad():
            module.parametrizations.weight.original.mul_(3)
        found.append(module(*inputs_of(module)).detach())
        torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
        return [*found, module(*inputs_of(module)).detach()]

    both(run)
    e3nn_accel.enable()
    module = build("Linear")
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Halved())
    module(*inputs_of(module))
    assert_ran_on_torch(module, "linear", 1)


@pytest.mark.parametrize("name", BUILD)
def test_requires_grad_toggles(name: str) -> None:
    """Gradients are there for what asks for them, and nothing else, also when that changes."""

    def run() -> list[Any]:
        module = build(name)
        found: list[Any] = []
        for parameters, inputs in ((True, True), (False, True), (True, False), (False, False)):
            module.requires_grad_(parameters)
            tensors = [x.detach().requires_grad_(inputs) for x in inputs_of(module)]
            out = module(*tensors)
            found += [out.detach(), torch.tensor(out.requires_grad)]
            if out.requires_grad:
                out.square().sum().backward()
            found += [
                torch.zeros(1) if x.grad is None else x.grad
                for x in (*tensors, *module.parameters())
            ]
            module.zero_grad()
        with torch.no_grad():
            found.append(torch.tensor(module(*inputs_of(module)).requires_grad))
        with torch.inference_mode():
            found.append(module(*(x.detach() for x in inputs_of(module))).clone())
        return found

    both(run)


@pytest.mark.parametrize("name", BUILD)
def test_first_use_in_inference_mode(name: str) -> None:
    """A plan made in inference mode serves training afterwards."""
    module = build(name)
    expected = value_and_gradients(module, *inputs_of(module))
    e3nn_accel.enable()
    with torch.inference_mode():
        module(*(x.detach() for x in inputs_of(module)))
    same(value_and_gradients(module, *inputs_of(module)), expected)
    assert_ran_on_torch(module, OPERATION[name], 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    """Recomputing in the backward gives the same gradients, without further fallbacks."""
    from torch.utils.checkpoint import checkpoint

    with without_torchscript():  # in which stock e3nn can't be recomputed without reentry
        modules = [build("Linear"), build("FullyConnectedTensorProduct")]

    def run() -> list[torch.Tensor]:
        found = []
        for module in modules:
            inputs = inputs_of(module)
            module.zero_grad()
            checkpoint(module, *inputs, use_reentrant=reentrant).square().sum().backward()
            found += [x.grad for x in (*inputs, *module.parameters())]
        return found

    both(run)


@contextlib.contextmanager
def optimised(module: torch.nn.Module) -> Iterator[torch.optim.Optimizer]:
    """An optimizer, one step."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    optimizer.zero_grad()
    yield optimizer
    optimizer.step()


def test_training_a_mace_on_forces() -> None:
    """Three steps of Adam on energies and forces: losses and parameters follow stock's."""
    batch = molecules(1)

    def run() -> list[torch.Tensor]:
        model = mace()
        losses = []
        for _ in range(3):
            with optimised(model):
                out = model(dict(batch), training=True)
                loss = out["energy"].square().sum() + out["forces"].square().sum()
                loss.backward()
            losses.append(loss.detach())
        return [*losses, *(p.detach() for p in model.parameters())]

    both(run, 1e-6)


def test_seeds_give_the_same_run() -> None:
    """Enabling, planning and checking draw nothing from the user's random numbers."""

    def run() -> list[torch.Tensor]:
        torch.manual_seed(7)
        module = BUILD["FullyConnectedTensorProduct"]()
        twin = copy.deepcopy(module)
        module(*inputs_of(module))
        return [torch.rand(3), next(twin.parameters()).detach(), torch.rand(3)]

    stock = run()
    with e3nn_accel.enabled():
        assert all(map(torch.equal, run(), stock))
