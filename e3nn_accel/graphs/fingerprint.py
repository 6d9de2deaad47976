"""Whether a model is still the one that was captured.

A captured graph reads parameters and buffers where they were: what is written there in place (by an
optimiser, an average, load_state_dict) shows in the next replay by itself. Anything else that forward
depends on is part of the graph, and has to be what it was: where each tensor lies, which modules there
are, their plain attributes (MACE divides by a float, avg_num_neighbors), and the forward of their classes.
All of it is looked at in every call, by loops that run in C, for MACE-MP-0 in 60 us on a slow core, while the
device is at work already (`ModelState._was_right`). So the memory that a graph reads is held until then, also where
a model was moved, or given other tensors, since.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch

_BASE = frozenset(vars(torch.nn.Module()))
_CONTENTS = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_address = torch.Tensor.data_ptr
_requires_grad = attrgetter("requires_grad")
_forward = attrgetter("forward")
_training = itemgetter("training")


class Fingerprint:
    """Of one model, taken when it is first seen; never holds the model itself.

    TorchScript modules within it, as e3nn compiles them, can't be looked into this way: of them the
    places of parameters and buffers are looked at.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        fields = [vars(module) for module in plain]
        self._fields = fields
        self._hooks = [f[name] for f in fields for name in _HOOKS if name in f]
        self._parameters = list(model.parameters())
        self._tensors = [*self._parameters, *model.buffers()]
        self._memory = [tensor.detach() for tensor in self._tensors]
        self._addresses = list(map(_address, self._tensors))
        tables = [f[name] for f in fields for name in _CONTENTS]
        own = [(f, name) for f in fields for name in f if name not in _BASE]
        own += [(table, name) for table in tables for name in table]
        self._tables = [*fields, *tables]
        self._lengths = list(map(len, self._tables))
        self._owners = [owner for owner, _ in own]
        self._names = [name for _, name in own]
        self._values = [owner[name] for owner, name in own]
        self._classes = list({type(module) for module in plain})
        self._forwards = list(map(_forward, self._classes))

    def in_place(self) -> bool:
        """Whether parameters and buffers lie where they did: a replay reads what it should, or nothing freed."""
        return list(map(_address, self._tensors)) == self._addresses

    def holds(self) -> bool:
        """Whether all else is as it was."""
        found: Callable[..., Any] = dict.get
        return (
            list(map(len, self._tables)) == self._lengths
            and all(map(is_, map(found, self._owners, self._names), self._values))
            and all(map(is_, map(_forward, self._classes), self._forwards))
        )

    def hooked(self) -> bool:
        """Whether a module within has hooks, which a replay wouldn't run."""
        return any(self._hooks)

    def frozen(self) -> bool:
        """Whether no parameter requires a gradient."""
        return not any(map(_requires_grad, self._parameters))

    def trained(self) -> bytes:
        """Which parameters require a gradient."""
        return bytes(map(_requires_grad, self._parameters))

    def modes(self) -> bytes:
        """Which modules are in training mode."""
        return bytes(map(_training, self._fields))


def is_replica(model: torch.nn.Module) -> bool:
    """Whether torch.nn.DataParallel made it for one call."""
    return "_is_replica" in vars(model)
