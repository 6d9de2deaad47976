"""Tensor products for the cuda backend, one for every kind of pairs, against float64 stock e3nn, path by path."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import prod

import torch
from comparison import (
    Derivatives,
    Operands,
    Slices,
    accelerated,
    assert_close,
    derivatives,
    draw,
    poisoned_memory,
    usage,
)
from e3nn import o3

TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.float64: (1e-12, 1e-12)}
"""Relative and norm-wise, of values and of gradients."""
EQUAL = ("uuw", "uuu", "uvu<v", "u<vw")
ALWAYS_WEIGHTED = ("uvw", "u<vw")


@dataclass(frozen=True)
class Product:
    """A product by its paths: (first input, second input, irrep, mode, has weight, channels of a mixed output).

    Attributes:
        weights: "row", "shared" or "internal".
    """

    irreps1: str
    irreps2: str
    paths: tuple[tuple[int, int, str, str, bool, int], ...]
    weights: str = "row"

    def build(self) -> o3.TensorProduct:
        """In float64, its constants too; every second path shares an equal output of an earlier one."""
        in1, in2 = o3.Irreps(self.irreps1), o3.Irreps(self.irreps2)
        outputs: list[tuple[int, o3.Irrep]] = []
        instructions = []
        for n, (i, j, ir, mode, weighted, width) in enumerate(self.paths):
            mul1, mul2 = in1[i].mul, in2[j].mul
            triangle = mul1 * (mul1 - 1) // 2
            fixed = {"uvu": mul1, "uvv": mul2, "uuu": mul1, "uvuv": mul1 * mul2, "uvu<v": triangle}
            mul = 1 if mode == "uuw" and not weighted else fixed.get(mode, width)
            block = (mul, o3.Irrep(ir))
            if n % 2 == 0 or block not in outputs:
                outputs.append(block)
            at = len(outputs) - 1 if n % 2 == 0 else outputs.index(block)
            instructions.append((i, j, at, mode, weighted, 1.0 + 0.5 * n))
        outputs.append((2, o3.Irrep("1o")))  # which nothing reaches
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return o3.TensorProduct(
                in1,
                in2,
                o3.Irreps(outputs),
                instructions,
                shared_weights=self.weights != "row",
                internal_weights=self.weights == "internal",
            )
        finally:
            torch.set_default_dtype(before)

    def operands(
        self, module: o3.TensorProduct, rows: int, dtype: torch.dtype, wanted: str = "xyw"
    ) -> Operands:
        """Rows of x, y and weights; those whose initial is wanted want gradients."""
        shapes = {"x": (rows, module.irreps_in1.dim), "y": (rows, module.irreps_in2.dim)}
        if module.weight_numel and self.weights != "internal":
            own = (rows,) if self.weights == "row" else ()
            shapes["weight"] = (*own, module.weight_numel)
        drawn = {
            name: draw(shape, seed + 1, dtype).requires_grad_(name[0] in wanted)
            for seed, (name, shape) in enumerate(shapes.items())
        }
        return drawn | dict(module.named_parameters())

    def call(self, module: o3.TensorProduct, operands: Operands) -> torch.Tensor:
        """Parameters of the module aren't passed."""
        given = (
            {"weight": operands["weight"]}
            if self.weights != "internal" and "weight" in operands
            else {}
        )
        out: torch.Tensor = module(operands["x"], operands["y"], **given)
        return out


def every_mode(
    mul: int, weights: str, mixing: bool | None = None, weighted: bool | None = None
) -> Product:
    """Two vectors and two even vectors of ``mul`` channels in every mode, with weights and without."""
    modes = ("uvw", "uvu", "uvv", "uuw", "uuu", "uvuv", "uvu<v", "u<vw")
    paths = []
    for mode in modes:
        for has in (True, False):
            mixes = mode in ("uvw", "u<vw") or (mode == "uuw" and has)
            if mixing not in (None, mixes) or weighted not in (None, has):
                continue
            if not has and mode in ALWAYS_WEIGHTED:
                continue
            if mul == 1 and mode in ("uvu<v", "u<vw"):
                continue
            paths += [
                (0, 0, "1e", mode, has, 5),
                (1, 1, "2e", mode, has, 3),
                (0, 1, "1o", mode, has, 5),
            ]
            paths += [(1, 0, "0o", mode, has, 4), (0, 0, "1e", mode, has, 5)]
    return Product(f"{mul}x1o+{mul}x1e", f"{mul}x1o+{mul}x1e", tuple(paths), weights)


def slices_of(module: o3.TensorProduct) -> Slices:
    """Each path's weights, each block of the other operands and of the result."""
    paths, start = [], 0
    for instruction in module.instructions:
        size = prod(instruction.path_shape) if instruction.has_weight else 0
        paths.append(slice(start, start + size))
        start += size
    blocks = {"x": module.irreps_in1, "y": module.irreps_in2, "value": module.irreps_out}
    found = {name: list(irreps.slices()) for name, irreps in blocks.items()}
    return found | {"direction": found["value"], "weight": paths}


def check(
    product: Product, rows: int, dtype: torch.dtype, wanted: str = "xyw", device: str = "cpu"
) -> None:
    """The cuda backend within rounding of float64 stock e3nn on the same operands, all derivatives."""
    module = product.build()
    check_operands(product, module, product.operands(module, rows, dtype, wanted), dtype, device)


def check_operands(
    product: Product,
    module: o3.TensorProduct,
    operands: Operands,
    dtype: torch.dtype,
    device: str = "cpu",
) -> None:
    """``module`` was built in float64; e3nn's constants would be rounded otherwise."""
    module = module.to(device)
    ours = copy.deepcopy(module).to(dtype)
    here = {
        k: t.detach().to(device, dtype).requires_grad_(t.requires_grad) for k, t in operands.items()
    }
    here |= dict(ours.named_parameters())
    exact = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in here.items()}
    exact |= dict(module.named_parameters())
    if dtype == torch.float32 and product.weights == "internal":
        with torch.no_grad():  # the same numbers, rounded once
            for a, b in zip(module.parameters(), ours.parameters(), strict=True):
                a.copy_(b)
    with accelerated(self_check=False), poisoned_memory():
        found = derivatives(lambda o: product.call(ours, o), here)
        assert {backend for _, backend in usage(ours)} == {"cuda"}, usage(ours)
    assert {t.dtype for t in found.tensors.values()} == {dtype}
    expected = derivatives(lambda o: product.call(module, o), exact)
    found = Derivatives({name: t.double() for name, t in found.tensors.items()})
    forward, gradient = TOLERANCE[dtype]
    slices = slices_of(module)
    assert_close(_value(found), _value(expected), forward, slices)
    assert_close(found, expected, gradient, slices)


def _value(d: Derivatives) -> Derivatives:
    return Derivatives({"value": d.tensors["value"]})
