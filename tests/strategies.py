"""Hypothesis strategies: random modules of every class e3nn_accel takes, and their operands.

A strategy yields a frozen `Case`: plain data that prints as a reproducer and builds the module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from comparison import Operands, Slices, draw, randomise
from hypothesis import strategies as st

MulIr = tuple[int, int, int]
Irreps = tuple[MulIr, ...]
Instruction = tuple[int, int, int, str, bool, float]
Shape = tuple[int, ...]

L_MAX = 4
ANY_MULTIPLICITY = st.integers(0, 5)
ALL_MODES = ("uvw", "uvu", "uvv", "uuw", "uuu", "uvuv", "uvu<v", "u<vw")
EQUAL = ("uuw", "uuu", "uvu<v", "u<vw")
"""Modes that need equal multiplicities of both inputs."""
ALWAYS_WEIGHTED = ("uvw", "u<vw")


@dataclass(frozen=True)
class Case:
    """A module of ``o3`` and the shapes of its operands.

    Attributes:
        cls: Name of the class in ``e3nn.o3``.
        args: Its positional arguments; irreps as strings.
        options: Its keyword arguments.
        weights: "internal", "shared" (given, one for all rows) or "per row".
        leading: Leading dimensions of x, y and per-row weights, broadcast against each other.
        seed: Of parameters and operands.
    """

    cls: str
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()
    weights: str = "internal"
    leading: tuple[Shape, ...] = ((5,), (5,), (5,))
    seed: int = field(default=0, compare=False)

    def build(self, dtype: torch.dtype = torch.float64) -> Any:
        """The module, with random parameters."""
        from e3nn import o3

        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            options = dict(self.options)
            options["internal_weights"] = self.weights == "internal"
            options["shared_weights"] = self.weights != "per row"
            args = [list(a) if isinstance(a, tuple) else a for a in self.args]
            return randomise(getattr(o3, self.cls)(*args, **options), self.seed)
        finally:
            torch.set_default_dtype(before)

    @property
    def operation(self) -> str:
        """The operation its calls are."""
        return "linear" if self.cls == "Linear" else "tensor_product"

    def operands(self, module: Any, dtype: torch.dtype = torch.float64) -> Operands:
        """Fresh leaves that want gradients, and the module's parameters."""
        is_linear = self.cls == "Linear"
        shapes = self._linear_shapes(module) if is_linear else self._product_shapes(module)
        drawn = {
            name: draw(shape, self.seed + 10 + n, dtype).requires_grad_()
            for n, (name, shape) in enumerate(shapes.items())
        }
        return drawn | dict(module.named_parameters())

    def _product_shapes(self, module: Any) -> dict[str, Shape]:
        x, y, w = self.leading
        shapes = {"x": (*x, module.irreps_in1.dim)}
        if self.cls != "TensorSquare":
            shapes["y"] = (*y, module.irreps_in2.dim)
        if self.weights != "internal" and module.weight_numel:
            shapes["weight"] = (*(w if self.weights == "per row" else ()), module.weight_numel)
        return shapes

    def _linear_shapes(self, module: Any) -> dict[str, Shape]:
        leading = self.leading[0]
        options = dict(self.options)
        f_in, f_out = options.get("f_in"), options.get("f_out")
        shapes = {"x": (*leading, *([f_in] if f_in else []), module.irreps_in.dim)}
        if self.weights != "internal" and module.weight_numel:
            rows = leading if self.weights == "per row" else ()
            shapes["weight"] = (*rows, *([f_in, f_out] if f_in else []), module.weight_numel)
        if self.weights != "internal" and module.bias_numel:
            shapes["bias"] = (*([f_out] if f_in else []), module.bias_numel)
        return shapes

    def call(self, module: Any, operands: Operands) -> torch.Tensor:
        """The module's answer; internal parameters aren't passed."""
        given = dict(operands)
        if self.weights == "internal":
            given.pop("weight", None)
            given.pop("bias", None)
        inputs = [given.pop(name) for name in ("x", "y") if name in given]
        out: torch.Tensor = module(*inputs, **given)
        return out

    def slices(self, module: Any) -> Slices:
        """The part of the flat weight that belongs to each path."""
        sizes = [prod(i.path_shape) for i in module.instructions if _has_weight(i)]
        ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        return {"weight": [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]}


def _has_weight(instruction: Any) -> bool:
    return bool(getattr(instruction, "has_weight", getattr(instruction, "i_in", 0) != -1))


def show(irreps: Irreps) -> str:
    """e3nn's own notation."""
    return "+".join(f"{mul}x{degree}{'e' if p == 1 else 'o'}" for mul, degree, p in irreps)


def degrees(l_max: int = L_MAX) -> st.SearchStrategy[tuple[int, int]]:
    """(l, p), small degrees first."""
    return st.just((0, 1)) | st.tuples(st.integers(0, l_max), st.sampled_from([1, -1]))


@st.composite
def irreps(
    draw_: st.DrawFn,
    multiplicities: st.SearchStrategy[int] = ANY_MULTIPLICITY,
    l_max: int = L_MAX,
    max_size: int = 3,
) -> Irreps:
    """Unsimplified: irreps in any order, repeated, with multiplicity 0, or none at all."""
    size = draw_(st.sampled_from([1, 2, max_size, max_size, 0]))
    return tuple((draw_(multiplicities), *draw_(degrees(l_max))) for _ in range(size))


def variances(size: int) -> st.SearchStrategy[list[float] | None]:
    """in1_var and the like."""
    return st.none() | st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=size, max_size=size)


LEADING = [
    ((5,), (5,), (5,)),
    ((), (), (1,)),
    ((2, 3), (2, 3), (2, 3)),
    ((4,), (1,), (4,)),
    ((1,), (4,), (1,)),
    ((3, 1), (2,), (3, 2)),
    ((), (3,), (3,)),
    ((0,), (0,), (0,)),
]


@st.composite
def tensor_products(draw_: st.DrawFn, modes: tuple[str, ...] | None = None) -> Case:
    """``o3.TensorProduct`` with random instructions over all modes."""
    pool = draw_(st.lists(st.integers(0, 5), min_size=1, max_size=2))
    muls = st.sampled_from(pool)
    in1, in2 = draw_(irreps(muls)), draw_(irreps(muls))
    out: list[MulIr] = []
    count = draw_(st.integers(0, 5)) if in1 and in2 else 0
    instructions = [draw_(_instruction(in1, in2, out, modes)) for _ in range(count)]
    out += draw_(irreps(max_size=1))  # an output that nothing reaches
    order = draw_(st.permutations(range(len(out))))
    place = {old: new for new, old in enumerate(order)}
    moved = tuple((i, j, place[k], *rest) for i, j, k, *rest in instructions)
    out = [out[n] for n in order]
    options = {
        "in1_var": draw_(variances(len(in1))),
        "in2_var": draw_(variances(len(in2))),
        "out_var": draw_(variances(len(out))),
        "irrep_normalization": draw_(st.sampled_from(["component", "norm", "none"])),
        "path_normalization": draw_(st.sampled_from(["element", "path", "none"])),
        "_specialized_code": draw_(st.booleans()),
    }
    return Case(
        "TensorProduct",
        (show(in1), show(in2), show(tuple(out)), moved),
        tuple(options.items()),
        draw_(st.sampled_from(["internal", "shared", "per row"])),
        draw_(st.sampled_from(LEADING)),
        draw_(st.integers(0, 10**6)),
    )


@st.composite
def _instruction(
    draw_: st.DrawFn, in1: Irreps, in2: Irreps, out: list[MulIr], modes: tuple[str, ...] | None
) -> Instruction:
    """A valid instruction; its output block is one that exists already, or a new one in ``out``."""
    i, j = draw_(st.integers(0, len(in1) - 1)), draw_(st.integers(0, len(in2) - 1))
    (mul1, l1, p1), (mul2, l2, p2) = in1[i], in2[j]
    possible = [m for m in (modes or ALL_MODES) if m not in EQUAL or mul1 == mul2]
    mode = draw_(st.sampled_from(possible or ["uvw"]))
    weighted = mode in ALWAYS_WEIGHTED or draw_(st.booleans())
    highest = min(l1 + l2, max(L_MAX, abs(l1 - l2)))
    ir = (draw_(st.integers(abs(l1 - l2), highest)), p1 * p2)
    mul = _output_multiplicity(mode, weighted, mul1, mul2)
    existing = [n for n, (m, *other) in enumerate(out) if tuple(other) == ir and mul in (m, None)]
    if existing and draw_(st.booleans()):
        k = draw_(st.sampled_from(existing))
    else:
        out.append((draw_(st.integers(0, 5)) if mul is None else mul, *ir))
        k = len(out) - 1
    return i, j, k, mode, weighted, draw_(st.sampled_from([1.0, 0.3, 2.5, 0.0]))


def _output_multiplicity(mode: str, weighted: bool, mul1: int, mul2: int) -> int | None:
    """What a mode asks of the output, or None where it takes any."""
    if mode == "uuw" and not weighted:
        return 1
    return {
        "uvu": mul1,
        "uvv": mul2,
        "uuu": mul1,
        "uvuv": mul1 * mul2,
        "uvu<v": mul1 * (mul1 - 1) // 2,
    }.get(mode)


@st.composite
def subclasses(draw_: st.DrawFn) -> Case:
    """FullyConnected-, Elementwise- and FullTensorProduct, and TensorSquare."""
    cls = draw_(
        st.sampled_from(
            [
                "FullyConnectedTensorProduct",
                "ElementwiseTensorProduct",
                "FullTensorProduct",
                "TensorSquare",
            ]
        )
    )
    in1 = draw_(irreps(st.integers(1, 3), l_max=3))
    in2 = draw_(irreps(st.integers(1, 3), l_max=3))
    weights, options, args = "internal", {}, (show(in1), show(in2))
    if cls == "FullyConnectedTensorProduct":
        args = (*args, show(draw_(irreps(st.integers(0, 4), l_max=3))))
        weights = draw_(st.sampled_from(["internal", "shared", "per row"]))
        options["path_normalization"] = draw_(st.sampled_from(["element", "path"]))
    elif cls == "ElementwiseTensorProduct":
        args = (args[0], show(tuple((mul, *draw_(degrees(3))) for mul, _, _ in in1)))
    elif cls == "TensorSquare":
        args = args[:1]
        if in1 and draw_(st.booleans()):
            options["irreps_out"] = show(draw_(irreps(st.integers(1, 3), l_max=3)))
            weights = draw_(st.sampled_from(["internal", "shared"]))
    if cls in ("ElementwiseTensorProduct", "FullTensorProduct") and draw_(st.booleans()):
        options["filter_ir_out"] = ("0e", "1o", "1e", "2e")
    options["irrep_normalization"] = draw_(st.sampled_from(["component", "norm"]))
    leading = draw_(st.sampled_from(LEADING))
    return Case(cls, args, tuple(options.items()), weights, leading, draw_(st.integers(0, 10**6)))


@st.composite
def linears(draw_: st.DrawFn) -> Case:
    """``o3.Linear`` with every option it has."""
    kinds = draw_(st.lists(degrees(), min_size=1, max_size=3, unique=True))
    block = st.tuples(st.integers(0, 5), st.sampled_from(kinds)).map(lambda b: (b[0], *b[1]))
    blocks = st.lists(block, min_size=0, max_size=4)
    irreps_in, irreps_out = draw_(blocks), draw_(blocks)
    pairs = [
        (i, o) for i, a in enumerate(irreps_in) for o, b in enumerate(irreps_out) if a[1:] == b[1:]
    ]
    columns = draw_(st.sampled_from([None, None, (1, 2), (3, 1), (2, 3)]))
    weights = draw_(st.sampled_from(["internal", "shared", "per row"]))
    options: dict[str, Any] = {"path_normalization": draw_(st.sampled_from(["element", "path"]))}
    if columns:
        options |= {"f_in": columns[0], "f_out": columns[1]}
    if pairs and draw_(st.booleans()):
        options["instructions"] = pairs = draw_(st.lists(st.sampled_from(pairs), max_size=4))
    reached = {o for i, o in pairs if irreps_in[i][0] and irreps_out[o][0]}
    options["biases"] = weights != "per row" and draw_(_biases(irreps_out, reached))
    return Case(
        "Linear",
        (show(tuple(irreps_in)), show(tuple(irreps_out))),
        tuple(options.items()),
        weights,
        (draw_(st.sampled_from([(5,), (), (2, 3), (1,), (0,)])),),
        draw_(st.integers(0, 10**6)),
    )


def _biases(irreps_out: list[MulIr], reached: set[int]) -> st.SearchStrategy[bool | list[bool]]:
    """A flag for all scalars, or one for each block.

    e3nn builds biases with shared weights only, and only for outputs that weights reach too.
    """
    scalars = {o for o, (mul, *ir) in enumerate(irreps_out) if ir == [0, 1] and mul}
    may = [o in scalars & reached for o in range(len(irreps_out))]
    lists = st.tuples(*(st.booleans() if yes else st.just(False) for yes in may)).map(list)
    return st.booleans() | lists if scalars <= reached else lists


@st.composite
def convolutions(draw_: st.DrawFn) -> Case:
    """uvu products for the fused convolution: mixed multiplicities, weighted or not."""
    case: Case = draw_(tensor_products(modes=("uvu",)))
    return Case(case.cls, case.args, case.options, case.weights, seed=case.seed)
