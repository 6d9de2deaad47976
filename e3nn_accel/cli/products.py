"""Tensor products of known models by themselves: what `bench --ops` times where no model is given.

Each case is a stock module with random operands. `convolution` gathers node features, multiplies with
weights of each edge and sums at the receiver; `rows` multiplies row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from e3nn_accel.interception import stock_call
from e3nn_accel.structures import default_dtype

SH3 = "0e+1o+2e+3o"
EDGES_A_NODE = 30


@dataclass(frozen=True)
class Product:
    """One case.

    Attributes:
        name: Of the model and layer it stands for.
        irreps1, irreps2: Of the operands.
        outputs: Which irreps the product has; with uvw, and with how many channels.
        mode: uvu: every pair of inputs to every output that ``outputs`` has; uvw: fully connected.
        fused: A convolution, or row by row.
        is_sorted: The edges come sorted by receiver.
        share: Of the edges asked for that this case has.
        edges_a_node: Of a convolution.
    """

    name: str
    irreps1: str
    irreps2: str
    outputs: str
    mode: str = "uvu"
    fused: bool = True
    is_sorted: bool = True
    share: float = 1.0
    edges_a_node: int = EDGES_A_NODE


def _parities(muls: str, degrees: int) -> str:
    return "+".join(f"{muls}{degree}{parity}" for degree in range(degrees) for parity in "eo")


TETRIS = "64x0e+24x1e+24x1o+16x2e+16x2o"
DIFFDOCK = "10x1o+10x1e+48x0e+48x0o"
PRODUCTS = (
    Product("mace layer 1", "128x0e", SH3, SH3),
    Product("mace layer 2", "128x0e+128x1o", SH3, SH3),
    Product("mace layer 2, unsorted", "128x0e+128x1o", SH3, SH3, is_sorted=False),
    Product("mace large", "128x0e+128x1o+128x2e", SH3, SH3),
    Product(
        "tutorial, unsorted",
        "128x0e+128x1o",
        "0e+1o",
        "0e+1o",
        is_sorted=False,
        share=1 / 15,
        edges_a_node=10,
    ),
    Product("nequip", _parities("64x", 4), SH3, _parities("", 4), share=1 / 3),
    Product("sevennet", "128x0e+64x1e+32x2e", "0e+1e+2e", "0e+1e+2e", share=1 / 3),
    Product("mace layer 2, row by row", "128x0e+128x1o", SH3, SH3, fused=False),
    Product("diffdock", DIFFDOCK, "0e+1o", DIFFDOCK, "uvw", fused=False, share=2 / 15),
    Product("tetris", "0e+1o+2e+3o", "0e+1o+2e+3o", TETRIS, "uvw", fused=False, share=1 / 3),
)


@dataclass(frozen=True)
class Work:
    """A case with its operands.

    Attributes:
        product: The case.
        module: The stock module.
        instructions: (in1, in2, out, mode, weighted), sorted by output.
        tensors: x [nodes or rows, dim], y [rows, dim], w [rows, weights].
        edge_index: [2, edges] of a convolution, else None.
    """

    product: Product
    module: Any
    instructions: list[tuple[int, int, int, str, bool]]
    tensors: tuple[torch.Tensor, ...]
    edge_index: torch.Tensor | None

    def ours(self) -> Callable[..., torch.Tensor]:
        """The module as it is called while e3nn_accel is enabled."""
        if self.edge_index is None:
            return lambda x, y, w: self.module(x, y, w)
        return lambda x, y, w: self.module(x, y, w, self.edge_index)

    def stock(self) -> Callable[..., torch.Tensor]:
        """Stock e3nn, whether e3nn_accel is enabled or not."""

        def rows(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = stock_call(self.module, (x, y, w), {})
            return out

        if self.edge_index is None:
            return rows
        sender, receiver = self.edge_index

        def convolution(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            messages = rows(x[sender], y, w)
            return messages.new_zeros((len(x), messages.shape[1])).index_add(0, receiver, messages)

        return convolution


def work(product: Product, edges: int, dtype: torch.dtype, device: torch.device) -> Work:
    """A module and random operands, the same each time."""
    from e3nn import o3

    irreps1, irreps2 = o3.Irreps(product.irreps1), o3.Irreps(product.irreps2)
    outputs, instructions = _instructions(product, irreps1, irreps2)
    with default_dtype(dtype):  # constants of a float32 module are no float64 ones in float64
        module = o3.TensorProduct(
            irreps1, irreps2, outputs, instructions, shared_weights=False, internal_weights=False
        ).to(device, dtype)
    rows = max(2, round(edges * product.share))
    nodes = max(2, rows // product.edges_a_node)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    edge_index = None
    if product.fused:
        edge_index = torch.randint(nodes, (2, rows), generator=generator, device=device)
        if product.is_sorted:
            edge_index[1] = edge_index[1].sort().values
    tensors = (
        draw(nodes if product.fused else rows, irreps1.dim),
        draw(rows, irreps2.dim),
        draw(rows, module.weight_numel),
    )
    return Work(product, module, instructions, tensors, edge_index)


def _instructions(
    product: Product, irreps1: Any, irreps2: Any
) -> tuple[Any, list[tuple[int, int, int, str, bool]]]:
    from e3nn import o3

    target = o3.Irreps(product.outputs)
    pairs = [
        (i, j, c)
        for i, (_, a) in enumerate(irreps1)
        for j, (_, b) in enumerate(irreps2)
        for c in a * b
    ]
    if product.mode == "uvw":
        found = [
            (i, j, k, "uvw", True)
            for i, j, c in pairs
            for k, (_, irrep) in enumerate(target)
            if irrep == c
        ]
        return target, sorted(found, key=lambda instruction: instruction[2])
    kept = [(i, j, c) for i, j, c in pairs if c in target]
    outputs, places, _ = o3.Irreps([(irreps1[i].mul, c) for i, _, c in kept]).sort()
    found = [(i, j, places[n], "uvu", True) for n, (i, j, _) in enumerate(kept)]
    return outputs, sorted(found, key=lambda instruction: instruction[2])
