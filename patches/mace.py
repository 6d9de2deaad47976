"""MACE's interaction blocks: gather, product and scatter fused through MACE's own ``conv_fusion`` contract.

A block asks ``hasattr(self, "conv_fusion")`` and, if so, calls
``conv_tp(node_feats, edge_attrs, weights, edge_index)`` in place of gather, product and scatter. A
class property gives that answer while the block's product can be fused; no forward is replaced, so
TorchScript compiles what it always did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from e3nn_accel import compat
from e3nn_accel.traced import traced_fusion

if TYPE_CHECKING:
    from e3nn_accel.dispatch import Dispatcher

NAME = "conv_fusion"
UNUSED = "__jit_unused_properties__"
MODULE = "mace.modules.blocks"
CLASS = "InteractionBlock"


def fusion_property(dispatcher: Dispatcher) -> property:
    """The property to put on ``InteractionBlock`` while enabled.

    A value that a block holds itself (a model converted to another accelerator) comes first.
    """
    fuses_while_traced = traced_fusion(dispatcher)

    def fusible(product: torch.nn.Module) -> bool:
        if torch.compiler.is_dynamo_compiling():
            return compat.COMPILER_TRACES_CALLS and fuses_while_traced(product)
        # torch.compile's guards ask, too, untraced: the answer must be the same at every call
        if compat.exporting() or compat.compiling_forwards():
            return False
        return dispatcher.fusible(product)

    def get(block: Any) -> Any:
        if NAME in block.__dict__:
            return block.__dict__[NAME]
        product = block.__dict__.get("_modules", {}).get("conv_tp")
        if product is not None and fusible(product):
            return True
        raise AttributeError(f"{type(block).__name__!r} object has no attribute {NAME!r}")

    def put(block: Any, value: Any) -> None:
        block.__dict__[NAME] = value

    def remove(block: Any) -> None:
        if NAME not in block.__dict__:
            raise AttributeError(NAME)
        del block.__dict__[NAME]

    return property(
        get, put, remove, "True where gather, product and scatter run as one operation."
    )
