"""Batches for MACECalculator: the neighbours of one step serve the next.

A step of molecular dynamics changes little: everything of MACE's batch but positions and edges stays,
and the edges are some of the pairs that were near a while ago (Verlet's list). What isn't like the
last call gets MACE's own batch.

    calls.py     the calls of every calculator
    state.py     those of one: reused, or MACE's own batch with the reason
    frame.py     what a batch was made of besides positions, and whether that is so still
    changes.py   what has changed since the last results, which ASE asks before every property
    pairs.py     pairs somewhat beyond the cutoff, and the edges among them
    search.py    who finds the pairs: vesin on a GPU, else MACE's search
    snapshot.py  where atoms were, and how far they may have come
    results.py   from the model's results to ASE's, in one transfer
"""

from __future__ import annotations

NEIGHBOURS = "neighbours"
"""The operation under which batches of a calculator are counted."""
