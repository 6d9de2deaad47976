# /// script
# requires-python = ">=3.10"
# dependencies = ["e3nn_accel[mace]"]
# ///
"""The four operations of cuEquivariance's tutorial on MACE, with e3nn's and MACE's own modules.

The tutorial (https://docs.nvidia.com/cuda/cuequivariance, "MACE Operations") replaces each module by
one of another library, with another layout of features and of weights. Here the module stays, and so
does its layout: the same object is called with e3nn_accel off and on, results are compared and times
printed. Small operands show that it works, not how fast: what a call costs by itself is most of it.

    python examples/6_tutorial.py
    python examples/6_tutorial.py --sizes tutorial   # the tutorial's sizes
    python examples/6_tutorial.py --sizes tutorial --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from mace.modules.irreps_tools import tp_out_irreps_with_instructions
from mace.modules.symmetric_contraction import SymmetricContraction

from e3nn import o3  # isort: skip  (after mace, which lets torch load the constants of e3nn 0.4)

import e3nn_accel


@dataclass(frozen=True)
class Sizes:
    """How large the operands are; the defaults are the tutorial's."""

    channels: int = 128
    convolution: tuple[int, int] = (1000, 10000)  # nodes, edges
    contraction: tuple[int, int] = (1000, 10)  # nodes, species
    linear: int = 10000  # nodes
    indexed_linear: tuple[int, int] = (10000, 20)  # nodes, species


Pair = tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]
"""What is called with stock e3nn, and with e3nn_accel."""

SIZES = {"small": Sizes(16, (100, 1000), (50, 10), 500, (500, 20)), "tutorial": Sizes()}


def convolution(sizes: Sizes, device: str) -> Pair:
    """Channelwise tensor product: a neighbour's features with the spherical harmonics of an edge."""
    nodes, edges = sizes.convolution
    irreps = o3.Irreps(f"{sizes.channels}x0e + {sizes.channels}x1o")
    harmonics = o3.Irreps("0e + 1o")
    irreps_mid, instructions = tp_out_irreps_with_instructions(irreps, harmonics, harmonics)
    conv_tp = o3.TensorProduct(
        irreps, harmonics, irreps_mid, instructions, shared_weights=False, internal_weights=False
    ).to(device)
    node_feats = torch.randn(nodes, irreps.dim, device=device)
    edge_attrs = torch.randn(edges, harmonics.dim, device=device)
    weights = torch.randn(edges, conv_tp.weight_numel, device=device)
    edge_index = torch.randint(nodes, (2, edges), device=device)
    sender, receiver = edge_index

    def stock() -> torch.Tensor:
        messages = conv_tp(node_feats[sender], edge_attrs, weights)
        out = messages.new_zeros(nodes, irreps_mid.dim)
        return out.scatter_add(0, receiver.unsqueeze(-1).expand_as(messages), messages)

    def ours() -> torch.Tensor:  # what MACE's interaction blocks call while e3nn_accel is on
        return conv_tp(node_feats, edge_attrs, weights, edge_index)

    return stock, ours


def contraction(sizes: Sizes, device: str) -> Pair:
    """Symmetric contraction: a node's features with themselves, up to three times."""
    nodes, species = sizes.contraction
    n = sizes.channels
    components = o3.Irreps("0e + 1o + 2e + 3o")
    module = SymmetricContraction(
        irreps_in=o3.Irreps([(n, ir) for _, ir in components]),
        irreps_out=o3.Irreps(f"{n}x0e + {n}x1o"),
        correlation=3,
        num_elements=species,
    ).to(device)
    node_feats = torch.randn(nodes, n, components.dim, device=device)
    node_attrs = one_hot(nodes, species, device)
    return (call := lambda: module(node_feats, node_attrs)), call


def linear(sizes: Sizes, device: str) -> Pair:
    """Linear layer: channels of each irrep are mixed."""
    irreps = o3.Irreps(f"{sizes.channels}x0e + {sizes.channels}x1o")
    module = o3.Linear(irreps, irreps).to(device)
    node_feats = torch.randn(sizes.linear, irreps.dim, device=device)
    return (call := lambda: module(node_feats)), call


def indexed_linear(sizes: Sizes, device: str) -> Pair:
    """Indexed linear layer (`skip_tp`): a matrix for each species; it finds the species by itself."""
    nodes, species = sizes.indexed_linear
    irreps = o3.Irreps(f"{sizes.channels}x0e + {sizes.channels}x1o")
    skip_tp = o3.FullyConnectedTensorProduct(irreps, f"{species}x0e", irreps).to(device)
    node_feats = torch.randn(nodes, irreps.dim, device=device)
    node_attrs = one_hot(nodes, species, device)
    return (call := lambda: skip_tp(node_feats, node_attrs)), call


def one_hot(nodes: int, species: int, device: str) -> torch.Tensor:
    """Random species as MACE's node_attrs."""
    kinds = torch.randint(species, (nodes,), device=device)
    return torch.nn.functional.one_hot(kinds, species).to(torch.get_default_dtype())


def timed(call: Callable[[], torch.Tensor], repetitions: int) -> tuple[torch.Tensor, float]:
    """The result, and the median of a call's milliseconds after two that don't count."""
    milliseconds = []
    for _ in range(repetitions + 2):
        synchronize()
        started = time.perf_counter()
        result = call()
        synchronize()
        milliseconds.append(1e3 * (time.perf_counter() - started))
    return result, statistics.median(milliseconds[2:])


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """One line for each operation."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=10)
    options = parser.parse_args()
    sizes = SIZES[options.sizes]

    print("forward, float32  stock, ms   ours, ms  speedup  greatest difference")
    for operation in (convolution, contraction, linear, indexed_linear):
        torch.manual_seed(0)
        stock, ours = operation(sizes, options.device)
        with torch.no_grad():
            expected, before = timed(stock, options.repetitions)
            with e3nn_accel.enabled(strict=True):
                found, after = timed(ours, options.repetitions)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        name = operation.__name__
        print(f"{name:16}  {before:9.3f}  {after:9.3f}  {before / after:6.2f}x  {difference:.1e}")
        assert difference < 1e-5, f"{name} differs from stock e3nn"


if __name__ == "__main__":
    main()
