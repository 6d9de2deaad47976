"""Irreps as plain tuples, hashable and free of e3nn: what descriptions, plans and kernels speak of."""

from __future__ import annotations

from typing import Any, NamedTuple


class MulIr(NamedTuple):
    """``mul`` copies of the irrep with degree ``l`` and parity ``p``."""

    mul: int
    l: int  # noqa: E741 - the field's own name for the degree
    p: int

    @property
    def ir_dim(self) -> int:
        """Components of one copy, 2l+1."""
        return 2 * self.l + 1

    @property
    def dim(self) -> int:
        """Components of all copies."""
        return self.mul * self.ir_dim

    def __str__(self) -> str:
        return f"{self.mul}x{self.l}{'e' if self.p == 1 else 'o'}"


Irreps = tuple[MulIr, ...]


def irreps_of(irreps: Any) -> Irreps:
    """An ``e3nn.o3.Irreps`` as plain tuples."""
    return tuple(MulIr(int(mul), int(ir.l), int(ir.p)) for mul, ir in irreps)


def dim_of(irreps: Irreps) -> int:
    """Components of a whole feature row."""
    return sum(block.dim for block in irreps)


def offsets_of(sizes: list[int]) -> list[int]:
    """Where each of consecutive pieces starts."""
    return [sum(sizes[:i]) for i in range(len(sizes))]


def show(irreps: Irreps) -> str:
    """The field's own notation, ``128x0e+128x1o``."""
    return "+".join(map(str, irreps)) or "(empty)"
