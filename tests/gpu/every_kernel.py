"""Launch every kernel on small operands, once each: what compute-sanitizer watches.

    compute-sanitizer --tool racecheck --kernel-name-exclude kns=native python tests/gpu/every_kernel.py

Values, first and second derivatives by all operands, and by the first alone, which takes other kernels. Nothing is
compared: the tests do that, in so many of torch's kernels that a sanitizer takes minutes for each.
Prints how often each kernel was launched. With --every-thread-arrives staged kernels say more to racecheck,
see kernels/pipeline.cuh.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import test_contraction_gpu
import test_convolution_gpu
import test_tensor_product_gpu
import torch
from comparison import accelerated, draw
from harmonics_parity import built as harmonics
from indexed_parity import IN_HALVES as SPECIES_IN_HALVES
from indexed_parity import SHAPES
from indexed_parity import built as indexed
from linear_parity import CASES as LINEARS
from linear_parity import STAGED, WEIGHTS_IN_HALVES, WEIGHTS_STAGED
from linear_parity import built as linear
from mace_parts import node_attrs
from radial_embedding_parity import block, embedding, lengths
from radial_parity import CASES as NETS
from reshape_parity import built as reshape

from e3nn_accel import compile, groupings, launch
from e3nn_accel.backends.cuda import contraction_kernels, indexed_linear_launch
from e3nn_accel.backends.cuda.edge_vectors import EdgeVectors
from e3nn_accel.backends.cuda.group_sums import GroupSums
from e3nn_accel.backends.cuda.tensor_copies import TensorCopies
from e3nn_accel.config import Config
from e3nn_accel.ops.edge_vectors import Edges, edge_vectors
from e3nn_accel.ops.gathers import grouped, taken

Call = Callable[..., torch.Tensor]
Work = tuple[Any, Call, list[torch.Tensor]]
"""A module, a function of operands that calls it, and the operands that want a gradient."""
ROWS = 70


def convolutions(dtype: torch.dtype) -> Iterator[Work]:
    """Of few nodes, too, whose edges blocks share."""
    sizes = [(case, 17, 200) for case in test_convolution_gpu.CASES]
    sizes += [("mace layer 2", 3, 150), ("odd multiplicities", 3, 150)]
    for case, nodes, edges in sizes:
        module = test_convolution_gpu.product(case, dtype)
        x, y, w, ends = test_convolution_gpu.operands(module, nodes, edges, dtype)
        yield module, lambda *xyw, m=module, e=ends: m(*xyw, e), [x, y, w]


def sums_by_groups(dtype: torch.dtype) -> Iterator[Work]:
    """Gradients of positions by edges, and of cells."""
    groupings.adders["cuda"] = GroupSums(Config())
    ends = torch.randint(40, (2, 700), device="cuda")
    edges = groupings.find_neighbours(ends, 41)  # the last has none
    sums = grouped(edges.by_receiver, edges.first_of_receiver)
    for shape in ((3,), (3, 3)):
        rows = draw((41, *shape), 3, dtype)
        yield torch.nn.Module(), lambda x: taken(x, (ends[1],), sums) ** 3, [rows]


def vectors_of_edges(dtype: torch.dtype) -> Iterator[Work]:
    """Some atoms have no edge."""
    ends = torch.randint(40, (2, 700), device="cuda")
    neighbours = groupings.find_neighbours(ends, 41)
    of = Edges(ends, lambda: neighbours, EdgeVectors(Config()))

    def call(x: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        vectors, lengths = edge_vectors(x, shifts, of)
        return vectors * lengths

    yield torch.nn.Module(), call, [draw((41, 3), 3, dtype), draw((700, 3), 4, dtype)]


def products(dtype: torch.dtype) -> Iterator[Work]:
    for case in test_tensor_product_gpu.CASES.values():
        module = case.build()
        yield module, module, list(case.operands(module, 20, dtype).values())


def linears(dtype: torch.dtype) -> Iterator[Work]:
    for case in (*LINEARS.values(), *STAGED.values()):
        for rows in (ROWS, 2000):  # other tiles
            module = linear(*case)
            yield module, module, [draw((rows, module.irreps_in.dim), 3, dtype)]


def linears_of_many_rows(dtype: torch.dtype) -> Iterator[Work]:
    """However few there are, some of which are in a step that isn't full."""
    with mock.patch.object(indexed_linear_launch, "FEW_BLOCKS", -1):
        for case in {**WEIGHTS_IN_HALVES, **WEIGHTS_STAGED}.values():
            module = linear(*case)
            yield module, module, [draw((205, module.irreps_in.dim), 3, dtype)]


def skip_connections(dtype: torch.dtype) -> Iterator[Work]:
    for irreps in (*SHAPES.values(), ("128x0e+128x1o", "89x0e", "128x0e+128x1o")):
        module = indexed(irreps)
        attrs = node_attrs("one row mixed", ROWS, module.irreps_in2.dim).to("cuda", dtype)
        x = draw((ROWS, module.irreps_in1.dim), 3, dtype)
        yield module, lambda x, m=module, y=attrs: m(x, y), [x]


def skip_connections_of_many_rows(dtype: torch.dtype) -> Iterator[Work]:
    """A kind of their own: by halves however few there are, some of several species, some of none."""
    few = mock.patch.object(indexed_linear_launch, "FEW_BLOCKS", -1)
    with few, mock.patch.object(indexed_linear_launch, "least_rows", return_value=0):
        for irreps in SPECIES_IN_HALVES.values():
            module = indexed(irreps)
            attrs = node_attrs("one row mixed", 200, module.irreps_in2.dim)
            attrs[::9], attrs[5] = draw((attrs.shape[1],), 5), 0
            attrs = attrs.to("cuda", dtype)
            x = draw((200, module.irreps_in1.dim), 3, dtype)
            yield module, lambda x, m=module, y=attrs: m(x, y), [x]


def contractions(dtype: torch.dtype) -> Iterator[Work]:
    for case in test_contraction_gpu.CASES.values():
        module = case.build()
        attrs = node_attrs("one row mixed", 23, case.species).to("cuda", dtype)
        components = sum(ir.dim for _, ir in module.irreps_in)
        x = draw((23, case.channels, components), 3, dtype)
        yield module, lambda x, m=module, y=attrs: m(x, y), [x]


def contractions_by_tables(dtype: torch.dtype) -> Iterator[Work]:
    """A kind of their own: equal modules share their plans for as long as we are enabled."""
    with mock.patch.object(contraction_kernels, "MOST_LINES", 0):
        yield from contractions(dtype)


def radial_mlps(dtype: torch.dtype) -> Iterator[Work]:
    for name, net in NETS.items():
        if "too" not in name:
            module = net.build()
            yield module, module, [draw((ROWS, net.widths[0]), 3, dtype)]


def edge_features(dtype: torch.dtype) -> Iterator[Work]:
    for case in ("MACE", "up to 6", "odd order, repeated"):
        module = harmonics(case)
        yield module, module, [draw((ROWS, 3), 3, dtype)]
    module = block()
    yield module, embedding(module), [lengths(ROWS).detach()]


def reshapes(dtype: torch.dtype) -> Iterator[Work]:
    for case in ("MACE", "chunks that aren't full"):
        module = reshape(case)
        yield module, lambda x, m=module: m(x) ** 3, [draw((ROWS, module.irreps.dim), 3, dtype)]


def copies(dtype: torch.dtype) -> Iterator[Work]:
    """To and from addresses that allow words of every size."""
    copier = TensorCopies(Config())

    def call(x: torch.Tensor) -> torch.Tensor:
        source = x.detach().contiguous().view(torch.uint8)
        offsets = (0, 8, 4, 1)
        pairs = [(torch.zeros_like(source)[n:], source[n:]) for n in offsets]
        copier.copy([target for target, _ in pairs], [given for _, given in pairs])
        return x**3

    yield torch.nn.Module(), call, [draw((ROWS, 40), 3, dtype)]


KINDS: dict[str, Callable[[torch.dtype], Iterator[Work]]] = {
    kind.__name__: kind
    for kind in (
        convolutions,
        sums_by_groups,
        vectors_of_edges,
        products,
        linears,
        linears_of_many_rows,
        skip_connections,
        skip_connections_of_many_rows,
        contractions,
        contractions_by_tables,
        radial_mlps,
        edge_features,
        reshapes,
        copies,
    )
}


def launch_all(module: Any, call: Call, operands: list[torch.Tensor], dtype: torch.dtype) -> None:
    """The value without gradients; derivatives by the first operand; by all, and parameters."""
    module.to("cuda", dtype)
    operands = [t.detach().to("cuda", dtype).requires_grad_() for t in operands]
    with torch.no_grad():
        call(*operands)
    own = list(module.parameters())
    for leaves in (operands[:1], [*operands, *own]):
        for tensor in (*operands, *own):
            tensor.requires_grad_(any(tensor is leaf for leaf in leaves))
        leaves = [leaf for leaf in leaves if leaf.numel()]
        out = call(*operands)
        direction = torch.ones_like(out).requires_grad_()
        first = torch.autograd.grad(out, leaves, direction, create_graph=True, allow_unused=True)
        squares = sum((g * g).sum() for g in first if g is not None)
        for tensor in own:  # of a training step on forces, second derivatives by parameters too
            tensor.requires_grad_()
        torch.autograd.grad(squares, [*leaves, direction], allow_unused=True)
    torch.cuda.synchronize()


def every_name() -> set[str]:
    """Each kernel as "file name"."""
    entry = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\)\s*(\w+)\(')
    files = Path(compile.__file__).with_name("kernels").glob("*.cu")
    return {f"{file.name} {name}" for file in files for name in entry.findall(file.read_text())}


def show_every_arrival() -> None:
    """Compile all programs so."""
    options = compile.KernelProgram.compiler_options
    compile.KernelProgram.compiler_options = lambda self: (  # type: ignore[method-assign]
        *options(self),
        "-DEVERY_THREAD_ARRIVES=1",
    )


def main() -> None:
    """All kinds, or those named; fails where a module would run on anything but our kernels."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--dtype", nargs="+", default=["float32", "float64"])
    parser.add_argument("--every-thread-arrives", action="store_true")
    args = parser.parse_args()
    if args.every_thread_arrives:
        show_every_arrival()
    launched: Counter[str] = Counter()
    stock_kernel = launch.LoadedProgram.kernel

    def counted(self: launch.LoadedProgram, name: str, parameters: str) -> Any:
        kernel = stock_kernel(self, name, parameters)

        def run(*arguments: Any, **how: Any) -> None:
            launched[f"{self.program.file} {name}"] += 1
            kernel(*arguments, **how)

        return run

    launch.LoadedProgram.kernel = counted  # type: ignore[method-assign,assignment]
    torch.set_default_dtype(torch.float64)  # constants of modules
    for kind, dtype in product(args.kinds or KINDS, (getattr(torch, d) for d in args.dtype)):
        for deterministic in (True, False) if kind == "convolutions" else (True,):
            with accelerated(self_check=False, backend="cuda", deterministic=deterministic):
                for module, *work in KINDS[kind](dtype):
                    try:
                        launch_all(module, *work, dtype)
                    except Exception as error:
                        raise RuntimeError(f"{kind}, {dtype}: {module}") from error
    print(*(f"{count:6d} {name}" for name, count in sorted(launched.items())), sep="\n")
    missing = set() if args.kinds else every_name() - set(launched)
    if missing:
        raise SystemExit(f"never launched: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
