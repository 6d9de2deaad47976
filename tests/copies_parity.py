"""Tensors copied in one launch, bit for bit, and nothing beside them written."""

from __future__ import annotations

import torch

from e3nn_accel.backends.cuda.tensor_copies import PIECE, SLOTS, TensorCopies
from e3nn_accel.config import Config

BESIDE = 7
"""Bytes of no tensor, before and after each."""
SIZES = [0, 1, 4, 12, 16, 30, PIECE - 1, PIECE, PIECE + 12, 3 * PIECE + 8, 100_000]
"""In bytes."""
OFFSETS = [(0, 0), (16, 32), (4, 8), (8, 24), (12, 4), (3, 3), (16, 1)]
"""Bytes from an aligned address, of where it comes from and of where it goes."""
DTYPES = [torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.bfloat16]


def check(sizes: list[int], offsets: tuple[int, int], device: str = "cpu") -> None:
    """Of bytes that begin at these offsets."""
    generator = torch.Generator().manual_seed(0)
    sources, targets, held = [], [], []
    for size in sizes:
        memory = torch.randint(256, (size + 64,), generator=generator, dtype=torch.uint8)
        source = memory.to(device)[offsets[0] : offsets[0] + size]
        target = torch.full((size + 64,), BESIDE, dtype=torch.uint8, device=device)
        sources.append(source)
        targets.append(target[offsets[1] : offsets[1] + size])
        held.append(target)
    copies = TensorCopies(Config())
    again = copies.copies_to(targets)
    for copy in (lambda given: copies.copy(targets, given), again, again):
        copy(sources)
        for source, target, whole in zip(sources, targets, held, strict=True):
            assert torch.equal(source, target)
            beside = torch.cat([whole[: offsets[1]], whole[offsets[1] + len(source) :]])
            assert (beside == BESIDE).all()
            target.fill_(BESIDE)
        sources = [source.flip(0) for source in sources]


def check_types(device: str = "cpu") -> None:
    """As many as a launch takes, of every type."""
    sources = [(10 * torch.randn(n + 1, 3)).to(device, DTYPES[n % 6]) for n in range(SLOTS)]
    targets = [torch.zeros_like(source) for source in sources]
    TensorCopies(Config()).copy(targets, sources)
    assert all(map(torch.equal, targets, sources))
