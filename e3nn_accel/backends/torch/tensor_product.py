"""Tensor products of every instruction mode, path by path, in products of two tensors.

For a path the constants are first contracted with the (small) second input,
M[z,v,i,k] = sum_j C[i,j,k] y[z,v,j], then with the first, T[z,u,v,k] = sum_i x[z,u,i] M[z,v,i,k],
and the weights last. Paths with a scalar need no constants at all: C is a multiple of the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from e3nn_accel.descriptor import ProductPath, TensorProductDescriptor
from e3nn_accel.irreps import dim_of
from e3nn_accel.layout import flat_rows, split_blocks, split_weights
from e3nn_accel.plan import PlanContext

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FEWEST_ROWS, LEAST_WORK = 4, 200_000
"""On a CPU, calls of fewer rows, or of fewer multiplications in all, are stock e3nn's. Of most its forward takes two
thirds to all of the time, forward and gradients as long; of two or three rows of wide products up to 1.1 and 1.3 times
as long (tests/time_small_products.py), which is little, and buys stock's very bits where a few rows are looked at."""


@dataclass(frozen=True)
class Constants:
    """C[i,j,k] times the path weight, prepared for one dtype and device.

    Attributes:
        kind: "x scalar", "y scalar", "dot" where C is ``scale`` times the identity of the other
            two indices, else "general".
        first: [j, i k], contracts y; None unless general.
        pair: [i j, k], contracts x and y of the same channel; None unless general.
    """

    kind: str
    scale: float
    dims: tuple[int, int, int]
    first: torch.Tensor | None
    pair: torch.Tensor | None

    @classmethod
    def of(cls, path: ProductPath, context: PlanContext) -> Constants:
        """Prepare one path."""
        c = path.coupling.dense() * path.path_weight
        dims = (c.shape[0], c.shape[1], c.shape[2])
        for kind, axis in (("x scalar", 0), ("y scalar", 1), ("dot", 2)):
            if dims[axis] == 1:
                matrix = c.squeeze(axis)
                scale = float(matrix[0, 0])
                if np.array_equal(matrix, scale * np.eye(len(matrix))):
                    return cls(kind, scale, dims, None, None)
        first = torch.as_tensor(
            c.transpose(1, 0, 2).reshape(dims[1], -1), dtype=context.dtype, device=context.device
        )
        pair = torch.as_tensor(c.reshape(-1, dims[2]), dtype=context.dtype, device=context.device)
        return cls("general", 1.0, dims, first, pair)

    def across(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """T[z,u,v,k] of every channel of x [z,u,i] with every channel of y [z,v,j]."""
        z, u, v = x.shape[0], x.shape[1], y.shape[1]
        i, _, k = self.dims
        if self.kind == "dot":
            return (self.scale * (x @ y.transpose(1, 2))).unsqueeze(-1)
        if self.kind != "general":  # one of the two has a single component
            return x.unsqueeze(2) * (self.scale * y).unsqueeze(1)
        assert self.first is not None
        m = (y.reshape(z * v, self.dims[1]) @ self.first).view(z, v, i, k)
        if v == 1:
            return (x @ m.view(z, i, k)).unsqueeze(2)
        return (x @ m.transpose(1, 2).reshape(z, i, v * k)).view(z, u, v, k)

    def along(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """T[z,u,k] of each channel of x [z,u,i] with the same channel of y [z,u,j]."""
        if self.kind == "dot":
            return self.scale * (x * y).sum(-1, keepdim=True)
        if self.kind != "general":
            return x * (self.scale * y)
        z, u = x.shape[:2]
        i, j, k = self.dims
        assert self.pair is not None
        xy = x.unsqueeze(-1) * y.unsqueeze(-2)
        return (xy.reshape(z * u, i * j) @ self.pair).view(z, u, k)


def fewest_rows(d: TensorProductDescriptor, context: PlanContext) -> int:
    """From how many rows on a plan is worth it; 0: always, or asked for by name."""
    if context.device.type != "cpu" or context.config.backend != "auto":
        return 0
    return max(FEWEST_ROWS, -(-LEAST_WORK // max(multiplications(d), 1)))


def multiplications(d: TensorProductDescriptor) -> int:
    """Of a row: of pairs of channels with each other, and of what comes of them by the weights."""
    return sum(_of_path(d, path) for path in d.paths if 0 not in path.path_shape)


def _of_path(d: TensorProductDescriptor, path: ProductPath) -> int:
    first, second = d.irreps_in1[path.i_in1], d.irreps_in2[path.i_in2]
    out = d.irreps_out[path.i_out]
    pairs = first.mul if path.mode in ("uuw", "uuu") else first.mul * second.mul
    mixed = out.mul if path.mode in ("uvw", "uuw", "u<vw") else 1
    return pairs * (first.ir_dim * second.ir_dim + mixed * out.ir_dim)


def plan(d: TensorProductDescriptor, context: PlanContext) -> tuple[str, Run]:
    """A function (x, y, weight) -> out for rows that broadcast against each other."""
    paths = [p for p in d.paths if 0 not in p.path_shape]
    constants = [Constants.of(p, context) for p in paths]
    shapes: list[tuple[int, ...]] = [p.path_shape for p in paths if p.has_weight]
    dim1, dim2, dim_out = dim_of(d.irreps_in1), dim_of(d.irreps_in2), dim_of(d.irreps_out)

    def run(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        others = () if d.shared_weights else (weight.shape[:-1],)
        leading = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1], *others)
        if not paths:
            return x.new_zeros((*leading, dim_out))
        x, y = flat_rows(x, leading, dim1), flat_rows(y, leading, dim2)
        rows = x.shape[0]
        if not d.shared_weights:
            weight = flat_rows(weight, leading, weight.shape[-1])
        weights = iter(split_weights(weight, shapes))
        xs, ys = split_blocks(x, d.irreps_in1), split_blocks(y, d.irreps_in2)
        sums: list[torch.Tensor | None] = [None] * len(d.irreps_out)
        for path, c in zip(paths, constants, strict=True):
            w = next(weights) if path.has_weight else None
            out = _path(path.mode, c, xs[path.i_in1], ys[path.i_in2], w).reshape(
                rows, d.irreps_out[path.i_out].dim
            )
            before = sums[path.i_out]
            sums[path.i_out] = out if before is None else before + out
        blocks = [
            x.new_zeros((rows, block.dim)) if out is None else out
            for block, out in zip(d.irreps_out, sums, strict=True)
            if block.mul > 0
        ]
        return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)).reshape(
            *leading, dim_out
        )

    return f"{len(paths)} paths, constants with the second input first", run


def _path(
    mode: str, c: Constants, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None
) -> torch.Tensor:
    """[z, channels, k] of one path; w is [path shape] shared, or [z, path shape]."""
    if mode == "uvw":
        assert w is not None  # e3nn has no unweighted uvw
        if c.kind == "y scalar" and y.shape[1] > 1 and w.dim() == 3:
            return _species_first(c, x, y, w)
        return _mix(c.across(x, y).flatten(1, 2), w.flatten(-3, -2))
    if mode in ("uuw", "uuu"):
        t = c.along(x, y)
        if mode == "uuu":
            return t if w is None else t * w.unsqueeze(-1)
        return t.sum(1) if w is None else _mix(t, w)
    t = c.across(x, y)
    if mode in ("uvu<v", "u<vw"):
        upper = torch.triu_indices(x.shape[1], y.shape[1], 1, device=x.device)
        t = t[:, upper[0], upper[1]]
        if mode == "u<vw":
            assert w is not None
            return _mix(t, w)
        return t if w is None else t * w.unsqueeze(-1)
    t = t if w is None else t * w.unsqueeze(-1)
    if mode == "uvu":
        return t.squeeze(2) if t.shape[2] == 1 else t.sum(2)
    if mode == "uvv":
        return t.sum(1)
    assert mode == "uvuv", mode
    return t


def _mix(t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """out[z,w,k] = sum_q W[q,w] T[z,q,k], with W shared or [z,q,w]."""
    if w.dim() == 3:
        return w.transpose(1, 2) @ t
    z, q, k = t.shape
    if k == 1:
        return (t.reshape(z, q) @ w).unsqueeze(-1)
    return (t.transpose(1, 2).reshape(z * k, q) @ w).view(z, k, w.shape[1]).transpose(1, 2)


def _species_first(c: Constants, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Scalars y and shared weights: sum_v y[z,v] W[u,v,w] first, which saves a factor 2l+1."""
    u, v, out = w.shape
    mixed = (c.scale * y.squeeze(-1)) @ w.transpose(0, 1).reshape(v, u * out)
    return mixed.view(x.shape[0], u, out).transpose(1, 2) @ x
