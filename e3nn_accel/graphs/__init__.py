"""Whole energy and force calls of MACE models, captured once as a CUDA graph and replayed.

A small model's call is a thousand short kernels, and the host takes longer to launch them than the
device to run them. A replay launches them all at once, on inputs that were copied to where the graph
reads them, padded to a size that later calls fit in, too.

    calls.py        the calls of every model
    model_state.py  the calls of one: replayed, captured, or run eagerly with the reason
    eager.py        a call that isn't replayed
    eligibility.py  which calls may be captured, and why not
    batches.py      what there is to copy of a batch, known at a glance if one like it came before
    padding.py      sizes, and the dummy graph that fills them up
    buffers.py      the inputs of a captured graph
    outputs.py      its results, without the padding
    training.py     training calls, whose gradients are a replay, too
    check.py        one of them against an eager call, when it was captured
    recompute.py    gradients of results that were replayed
    record.py       a call, captured for its size
    derivative.py   the gradients of one, captured
    capture.py      warm-up and capture
    store.py        the captured sizes of one model
    fingerprint.py  whether a model is still the one that was captured
"""

from __future__ import annotations

MODEL_CALL = "model"
"""The operation under which whole calls of a model are counted."""
GATHERS = "gathers"
"""The operation under which calls are counted whose gathers have gradients of ours, or torch's and why."""
