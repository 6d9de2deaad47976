"""MACE's operations on nodes, and on edges one by one: what `bench --ops` times beside tensor products.

Symmetric contractions, linears, and the species-indexed product of the skip connection, with frozen weights
as in a force call: derivatives are those by the features. Of edges, the radial MLP, spherical harmonics and the
radial embedding: derivatives are those by its input, vectors and lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from e3nn_accel.cli.products import EDGES_A_NODE, SH3
from e3nn_accel.interception import stock_call
from e3nn_accel.structures import default_dtype

HIDDEN = "128x0e+128x1o"
ALL = "128x0e+128x1o+128x2e+128x3o"
CORRELATION = 3
R_MAX, EXPONENT = 6.0, 5
"""MACE-MP-0's cutoff, in A, and the exponent of its function."""
RADIAL = (64, 64, 64)


@dataclass(frozen=True)
class NodeOperation:
    """One case.

    Attributes:
        name: Of the model and place it stands for.
        kind: What it is.
        irreps_in, irreps_out: Of features; of a contraction, too; of a radial embedding, numbers as scalars.
        species: How many one-hot node_attrs tell apart; 0 for what hasn't any.
        share: Rows for each of the nodes that the edges asked for have. One on edges has EDGES_A_NODE.
    """

    name: str
    kind: Literal["contraction", "linear", "skip connection", "radial MLP", "harmonics", "radial"]
    irreps_in: str
    irreps_out: str
    species: int = 0
    share: float = 1.0


NODE_OPERATIONS = (
    NodeOperation("contraction", "contraction", ALL, HIDDEN, 89),
    NodeOperation("contraction, tutorial", "contraction", ALL, HIDDEN, 10, 0.2),
    NodeOperation("linear after convolution", "linear", "256x0e+384x1o+384x2e+256x3o", ALL),
    NodeOperation("linear, tutorial", "linear", HIDDEN, HIDDEN, share=2.0),
    NodeOperation("skip connection", "skip connection", HIDDEN, HIDDEN, 89),
    NodeOperation("radial MLP, layer 2", "radial MLP", "8x0e", "1280x0e", share=EDGES_A_NODE),
    NodeOperation("skip connection, tutorial", "skip connection", HIDDEN, HIDDEN, 20, 2.0),
    NodeOperation("spherical harmonics", "harmonics", "1o", SH3, share=EDGES_A_NODE),
    NodeOperation("radial embedding", "radial", "1x0e", "10x0e", share=EDGES_A_NODE),
)


@dataclass(frozen=True)
class NodeWork:
    """A case with its operands.

    Attributes:
        product: The case.
        module: The stock module.
        tensors: The features, [nodes, dim] or, of a contraction, [nodes, channels, components]; vectors [edges, 3];
            lengths [edges, 1].
        species: Index of each node's, [nodes], or None.
        attrs: The same one-hot, [nodes, species], or None.
    """

    product: NodeOperation
    module: Any
    tensors: tuple[torch.Tensor]
    species: torch.Tensor | None
    attrs: torch.Tensor | None

    edge_index = None

    def ours(self) -> Callable[..., torch.Tensor]:
        """The module as it is called while e3nn_accel is enabled."""
        return lambda x: self._result(self.module(*self._arguments(x)))

    def stock(self) -> Callable[..., torch.Tensor]:
        """Stock e3nn or MACE, whether e3nn_accel is enabled or not."""

        def call(x: torch.Tensor) -> torch.Tensor:
            return self._result(stock_call(self.module, self._arguments(x), {}))

        return call

    def _arguments(self, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if self.product.kind == "radial":
            return x, None, None, None  # without a distance transform MACE looks at nothing else
        return (x,) if self.attrs is None else (x, self.attrs)

    def _result(self, out: Any) -> torch.Tensor:
        found: torch.Tensor = out[0] if self.product.kind == "radial" else out
        return found


def node_work(
    operation: NodeOperation, edges: int, dtype: torch.dtype, device: torch.device
) -> NodeWork:
    """A module and random operands, the same each time.

    Raises:
        ModuleNotFoundError: MACE isn't installed, for a contraction or a radial embedding.
    """
    nodes = max(2, round(edges / EDGES_A_NODE * operation.share))
    torch.manual_seed(0)
    with default_dtype(dtype):  # couplings of a float32 module aren't as dependent as exact ones
        module = _module(operation).to(device, dtype).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn((nodes, *_features(operation)), generator=generator, device=device, dtype=dtype)
    if operation.kind == "radial":
        x = 0.5 + 2 * x.abs()  # A: a few beyond the cutoff
    if not operation.species:
        return NodeWork(operation, module, (x,), None, None)
    species = torch.randint(operation.species, (nodes,), generator=generator, device=device)
    attrs = torch.nn.functional.one_hot(species, operation.species).to(dtype)
    return NodeWork(operation, module, (x,), species, attrs)


def _features(operation: NodeOperation) -> tuple[int, ...]:
    """Shape of a node's: [dim] or, of a contraction, [channels, components]."""
    from e3nn import o3

    irreps = o3.Irreps(operation.irreps_in)
    if operation.kind != "contraction":
        return (irreps.dim,)
    return irreps[0].mul, irreps.dim // irreps[0].mul


def _module(operation: NodeOperation) -> Any:
    from e3nn import o3

    irreps_in, irreps_out = o3.Irreps(operation.irreps_in), o3.Irreps(operation.irreps_out)
    if operation.kind == "radial MLP":
        from e3nn.nn import FullyConnectedNet

        widths = [irreps_in.dim, *RADIAL, irreps_out.dim]
        return FullyConnectedNet(widths, torch.nn.functional.silu)
    if operation.kind == "linear":
        return o3.Linear(irreps_in, irreps_out)
    if operation.kind == "skip connection":
        return o3.FullyConnectedTensorProduct(irreps_in, f"{operation.species}x0e", irreps_out)
    if operation.kind == "harmonics":
        return o3.SphericalHarmonics(irreps_out, normalize=True, normalization="component")
    if operation.kind == "radial":
        from mace.modules.blocks import RadialEmbeddingBlock

        return RadialEmbeddingBlock(R_MAX, irreps_out.dim, EXPONENT)
    from mace.modules.symmetric_contraction import SymmetricContraction

    return SymmetricContraction(irreps_in, irreps_out, CORRELATION, num_elements=operation.species)
