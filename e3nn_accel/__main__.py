"""`python -m e3nn_accel`: the same as the command `e3nn-accel`."""

from __future__ import annotations

import sys

from e3nn_accel.cli import main

if __name__ == "__main__":
    sys.exit(main())
