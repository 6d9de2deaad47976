"""Find a module by its id, for functions that torch.compile runs while it traces.

It hands them constants, not modules (until torch 2.13). It guards on the id of a module that is alive in
the frame being traced, so the id can't have passed to another one meanwhile; nothing is kept under an
id for longer than the module lives.
"""

from __future__ import annotations

import gc
from typing import Any
from weakref import WeakValueDictionary

import torch

_known: WeakValueDictionary[int, torch.nn.Module] = WeakValueDictionary()


def living_module(identity: int) -> Any:
    """The module whose id this is.

    Raises:
        LookupError: None that the garbage collector knows (`gc.freeze` hides objects from it).
    """
    module = _known.get(identity)
    if module is None:
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.nn.Module):
                _known[id(thing)] = thing
        module = _known.get(identity)
    if module is None:
        raise LookupError(f"no living module has the id {identity}")
    return module
