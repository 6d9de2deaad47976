"""Linears with feature columns, or with weights of each row's own, as what there are kernels for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from e3nn_accel.descriptor import (
    Coupling,
    LinearDescriptor,
    LinearPath,
    ProductPath,
    TensorProductDescriptor,
)
from e3nn_accel.irreps import MulIr


def without_columns(d: LinearDescriptor) -> LinearDescriptor:
    """The same on rows of all columns side by side: a path from each column to each.

    Weights [f_in, f_out, numel] and biases [f_out, numel] are then in the order of the paths as they lie.
    """
    if d.f_in is None:
        return d
    columns_in, columns_out = d.f_in, d.f_out or 1
    weighted = [p for p in d.paths if p.i_in != -1]
    biases = [p for p in d.paths if p.i_in == -1]
    blocks_in, blocks_out = len(d.irreps_in), len(d.irreps_out)

    def moved(path: LinearPath, column_in: int, column_out: int) -> LinearPath:
        i_in = path.i_in if path.i_in == -1 else path.i_in + column_in * blocks_in
        return replace(path, i_in=i_in, i_out=path.i_out + column_out * blocks_out)

    paths = [
        moved(p, i, o) for i in range(columns_in) for o in range(columns_out) for p in weighted
    ]
    paths += [moved(p, 0, o) for o in range(columns_out) for p in biases]
    return replace(
        d, irreps_in=d.irreps_in * columns_in, irreps_out=d.irreps_out * columns_out,
        paths=tuple(paths), f_in=None, f_out=None,
    )  # fmt: skip


def as_product(d: LinearDescriptor) -> TensorProductDescriptor:
    """The product with a single one that a linear without biases is: its kernels know weights of each row."""
    paths = tuple(
        ProductPath(
            p.i_in, 0, p.i_out, "uvw", True, p.path_weight, (p.path_shape[0], 1, p.path_shape[1]),
            Coupling.of(np.eye(d.irreps_in[p.i_in].ir_dim)[:, None]),
        )
        for p in d.paths
        if p.i_in != -1
    )  # fmt: skip
    one = (MulIr(1, 0, 1),)
    return TensorProductDescriptor(d.irreps_in, one, d.irreps_out, paths, False, False)
