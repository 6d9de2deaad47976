"""The errors and warnings that e3nn_accel itself raises.

Wrong arguments never end here: they reach stock e3nn, which raises what it always raised.
"""

from __future__ import annotations

from collections.abc import Iterable


class AccelError(RuntimeError):
    """An explicit request (strict mode, a named backend) that can't be honoured.

    Attributes:
        reasons: Every reason that was collected, in the order the backends were asked.
    """

    def __init__(self, message: str, reasons: Iterable[str] = ()) -> None:
        self.reasons: tuple[str, ...] = tuple(reasons)
        super().__init__("\n  - ".join([message, *self.reasons]))


class E3nnAccelWarning(UserWarning):
    """Something about e3nn_accel that a user should know; stock e3nn goes on."""


class FallbackWarning(E3nnAccelWarning):
    """A plan was given up at run time (self-check, kernel failure), or nothing could be accelerated."""
