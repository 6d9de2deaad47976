"""Vectors and lengths of edges in one kernel, their gradients in another, where torch takes five and ten."""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.entries import Entries
from e3nn_accel.backends.cuda.real import REAL
from e3nn_accel.compile import KernelProgram
from e3nn_accel.config import Config
from e3nn_accel.groupings import Neighbours
from e3nn_accel.ops.edge_vectors import Pair, Some

THREADS = 128
SIGNATURES = {"edge_vectors": "PPPqiPP", "edge_vectors_gradient": "PPPPPPPPiPP"}


class EdgeVectors:
    """Kernels of every dtype that there are some for; see `EdgeVectorKernels`."""

    def __init__(self, config: Config) -> None:
        self._entries = {dtype: Entries(self.program(dtype), SIGNATURES, config) for dtype in REAL}

    def program(self, dtype: torch.dtype) -> KernelProgram:
        """Of numbers of this type."""
        return KernelProgram(
            f"edge_vectors_{REAL[dtype]}",
            "edge_vectors.cu",
            tuple(SIGNATURES),
            f"#define REAL {REAL[dtype]}\n#define THREADS {THREADS}\n",
            options=("--fmad=false",),
            description="vectors and lengths of edges",
        )

    def vectors(
        self, positions: torch.Tensor, edge_index: torch.Tensor, shifts: Some
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[edges, 3] and [edges, 1]."""
        nodes, edges = positions.shape[0], edge_index.shape[1]
        vectors, lengths = positions.new_empty((edges, 3)), positions.new_empty((edges, 1))
        if edges:
            self._entries[positions.dtype].on(positions.device)["edge_vectors"](
                (-(-edges // THREADS), 1, 1), (THREADS, 1, 1),
                positions.contiguous(), edge_index.contiguous(),
                None if shifts is None else shifts.contiguous(), edges, nodes, vectors, lengths,
            )  # fmt: skip
        return vectors, lengths

    def gradients(
        self,
        dv: Some,
        dl: Some,
        vectors: torch.Tensor,
        lengths: torch.Tensor,
        edges: Neighbours,
        of_shifts: bool,
    ) -> Pair:
        """[nodes, 3], and [edges, 3] where it is wanted."""
        dpositions = vectors.new_empty((edges.nodes, 3))
        dshifts = torch.empty_like(vectors) if of_shifts else None
        if edges.nodes:
            self._entries[vectors.dtype].on(vectors.device)["edge_vectors_gradient"](
                (-(-edges.nodes * 32 // THREADS), 1, 1), (THREADS, 1, 1),
                None if dv is None else dv.contiguous(), None if dl is None else dl.contiguous(),
                vectors, lengths, edges.by_receiver, edges.first_of_receiver,
                edges.by_sender, edges.first_of_sender, edges.nodes, dpositions, dshifts,
            )  # fmt: skip
        return dpositions, dshifts
