"""The IPython extension: `%load_ext e3nn_accel` enables, `%unload_ext e3nn_accel` disables.

Use it in a notebook whose kernel was started without `E3NN_ACCEL`: the start files are read when a
Python process starts, so that setting the variable in a cell comes too late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


def load_ipython_extension(ipython: InteractiveShell) -> None:
    """Enable, with the options of the `E3NN_ACCEL_*` variables."""
    import e3nn_accel

    e3nn_accel.enable()


def unload_ipython_extension(ipython: InteractiveShell) -> None:
    """Disable: models that were built already run on stock e3nn from the next call."""
    import e3nn_accel

    e3nn_accel.disable()
