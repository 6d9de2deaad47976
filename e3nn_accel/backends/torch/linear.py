"""``o3.Linear`` as one matrix product for each path, accumulated inside the product.

For each path, rows are (sample, component) and columns channels, so that all components share one
matrix product. Path weights ride along as ``alpha`` and sums over paths as ``beta`` of addmm: neither
costs a pass over memory of its own, which is what the stock version spends most of its time on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from e3nn_accel.descriptor import LinearDescriptor, LinearPath
from e3nn_accel.irreps import MulIr, dim_of
from e3nn_accel.layout import split_weights
from e3nn_accel.plan import PlanContext

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def plan(d: LinearDescriptor, context: PlanContext) -> tuple[str, Run]:
    """A function (x, weight, bias) -> out, and its name for ``explain``."""
    if (
        d.f_in is None
        and d.shared_weights
        and not d.bias_numel
        and all(block.mul for block in d.irreps_in)
    ):
        return "one matrix product a path", _plain(d, context)
    return _general(d)


def _plain(d: LinearDescriptor, context: PlanContext) -> Run:
    """The ordinary case with as few torch calls as it takes: small models spend their time between them."""
    paths = [p for p in d.paths if 0 not in p.path_shape]
    in_sizes, dim_in, dim_out = (
        [block.dim for block in d.irreps_in],
        dim_of(d.irreps_in),
        dim_of(d.irreps_out),
    )
    numels = [p.path_shape[0] * p.path_shape[1] for p in paths]
    numel = sum(numels)
    nothing = torch.zeros(1, dtype=context.dtype, device=context.device)
    outputs = [
        (
            block,
            [(n, p.i_in, p.path_shape, p.path_weight) for n, p in enumerate(paths) if p.i_out == o],
        )
        for o, block in enumerate(d.irreps_out)
        if block.mul
    ]
    dims_in = [block.ir_dim for block in d.irreps_in]

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        flat = x if len(shape) == 2 else x.reshape(shape[:-1].numel(), dim_in)
        rows = flat.shape[0]
        if not paths:
            return x.new_zeros((*shape[:-1], dim_out))
        if weight.dim() != 1:
            weight = weight.reshape(numel)
        weights = weight.split(numels) if len(numels) > 1 else (weight,)
        blocks = list(flat.split(in_sizes, 1)) if len(in_sizes) > 1 else [flat]
        ready = [dim == 1 for dim in dims_in]
        out = []
        for block, feeds in outputs:
            k, product = block.ir_dim, nothing
            for n, i_in, path_shape, path_weight in feeds:
                if not ready[i_in]:
                    u = path_shape[0]
                    blocks[i_in] = (
                        blocks[i_in].reshape(rows, u, k).transpose(1, 2).reshape(rows * k, u)
                    )
                    ready[i_in] = True
                matrix = weights[n].reshape(path_shape)
                beta = 0 if product is nothing else 1
                product = torch.addmm(product, blocks[i_in], matrix, beta=beta, alpha=path_weight)
            if product is nothing:
                product = flat.new_zeros((rows, block.dim))
            elif k > 1:
                product = product.view(rows, k, block.mul).transpose(1, 2).reshape(rows, block.dim)
            out.append(product)
        result = out[0] if len(out) == 1 else torch.cat(out, 1)
        return result if len(shape) == 2 else result.view(*shape[:-1], dim_out)

    return run


def _general(d: LinearDescriptor) -> tuple[str, Run]:
    """Biases, feature columns and weights of each row's own."""
    weighted = [p for p in d.paths if p.i_in != -1 and 0 not in p.path_shape]
    biases = [p for p in d.paths if p.i_in == -1 and 0 not in p.path_shape]
    shapes: list[tuple[int, ...]] = [p.path_shape for p in weighted]
    bias_sizes = [p.path_shape[0] for p in biases]
    in_sizes = [block.dim for block in d.irreps_in]
    feeds = [
        [(n, p) for n, p in enumerate(weighted) if p.i_out == o] for o in range(len(d.irreps_out))
    ]
    bias_of = {p.i_out: n for n, p in enumerate(biases)}
    f_in, f_out = d.f_in or 1, d.f_out or 1
    out_dim = dim_of(d.irreps_out)
    own_dims = 1 if d.f_in is None else 3

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        leading = x.shape[:-1] if d.f_in is None else x.shape[:-2]
        rows = leading.numel()
        out_shape = (*leading, out_dim) if d.f_out is None else (*leading, f_out, out_dim)
        if not weighted and not biases:
            return x.new_zeros(out_shape)
        blocks = x.reshape(rows, f_in, dim_of(d.irreps_in)).split(in_sizes, dim=-1)
        if d.shared_weights:
            columns = _Columns(blocks, d.irreps_in, f_in)
            if weight.dim() != own_dims:
                weight = weight.reshape(
                    *((f_in, f_out) if d.f_in is not None else ()), weight.shape[-1]
                )
            matrices = [_as_matrix(w, f_in, f_out) for w in split_weights(weight, shapes)]
        else:
            columns = _BatchColumns(blocks, d.irreps_in, f_in)
            flat = weight.reshape(
                -1, *((f_in, f_out) if d.f_in is not None else ()), weight.shape[-1]
            )
            matrices = [_as_batch(w, f_in, f_out, rows) for w in split_weights(flat, shapes)]
        offsets = bias.reshape(f_out, -1).split(bias_sizes, dim=-1) if biases else ()
        out = []
        for o, block in enumerate(d.irreps_out):
            if block.mul == 0:
                continue
            offset = offsets[bias_of[o]].reshape(1, -1) if o in bias_of else None
            product = columns.multiply(matrices, feeds[o], offset, block.ir_dim)
            if product is None:
                product = x.new_zeros((rows, f_out * block.dim))
                product = product if offset is None else product + offset
            out.append(product.reshape(rows, f_out, block.dim))
        return (out[0] if len(out) == 1 else torch.cat(out, dim=-1)).reshape(out_shape)

    kind = (
        "one matrix product a path"
        if d.shared_weights
        else "batched matrix products, a weight a row"
    )
    return kind, run


def _as_matrix(w: torch.Tensor, f_in: int, f_out: int) -> torch.Tensor:
    """[f_in, f_out, u, w] to [f_in u, f_out w]; a view without feature columns."""
    if w.dim() == 2:
        return w
    return w.permute(0, 2, 1, 3).reshape(f_in * w.shape[2], f_out * w.shape[3])


def _as_batch(w: torch.Tensor, f_in: int, f_out: int, rows: int) -> torch.Tensor:
    """[rows or 1, (f_in, f_out,) u, w] to [rows, f_out w, f_in u]."""
    u, v = w.shape[-2:]
    w = (
        w.reshape(-1, f_in, f_out, u, v)
        .permute(0, 2, 4, 1, 3)
        .reshape(w.shape[0], f_out * v, f_in * u)
    )
    return w.expand(rows, -1, -1)


class _Columns:
    """Inputs as [rows * components, channels], made once a block and shared by its paths."""

    def __init__(
        self, blocks: tuple[torch.Tensor, ...], irreps: tuple[MulIr, ...], f_in: int
    ) -> None:
        self.blocks, self.irreps, self.f_in = blocks, irreps, f_in
        self.made: dict[int, torch.Tensor] = {}

    def of(self, i_in: int) -> torch.Tensor:
        if i_in not in self.made:
            x, (block, dim) = self.blocks[i_in], (self.irreps[i_in], self.irreps[i_in].ir_dim)
            rows = x.shape[0]
            x = x.reshape(rows, self.f_in, block.mul, dim)
            self.made[i_in] = x.permute(0, 3, 1, 2).reshape(rows * dim, self.f_in * block.mul)
        return self.made[i_in]

    def multiply(
        self,
        matrices: list[torch.Tensor],
        paths: list[tuple[int, LinearPath]],
        offset: torch.Tensor | None,
        dim: int,
    ) -> torch.Tensor | None:
        out = offset  # a bias exists for scalars alone, where rows are samples
        for n, path in paths:
            x, w = self.of(path.i_in), matrices[n]
            beta = 0 if out is None else 1
            out = torch.addmm(
                x.new_zeros(1) if out is None else out, x, w, beta=beta, alpha=path.path_weight
            )
        if not paths or out is None:
            return None
        rows = out.shape[0] // dim
        return out.view(rows, dim, out.shape[1]).transpose(1, 2) if dim > 1 else out


class _BatchColumns(_Columns):
    """Inputs as [rows, channels, components] for a weight of each row's own."""

    def of(self, i_in: int) -> torch.Tensor:
        if i_in not in self.made:
            x, block = self.blocks[i_in], self.irreps[i_in]
            self.made[i_in] = x.reshape(x.shape[0], self.f_in * block.mul, block.ir_dim)
        return self.made[i_in]

    def multiply(
        self,
        matrices: list[torch.Tensor],
        paths: list[tuple[int, LinearPath]],
        offset: torch.Tensor | None,
        dim: int,
    ) -> torch.Tensor | None:
        out = None if offset is None else offset.reshape(1, -1, 1)
        for n, path in paths:
            x, w = self.of(path.i_in), matrices[n]
            beta = 0 if out is None else 1
            out = torch.baddbmm(
                x.new_zeros(1) if out is None else out, w, x, beta=beta, alpha=path.path_weight
            )
        return out if paths else None
