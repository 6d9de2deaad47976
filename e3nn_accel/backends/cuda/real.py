"""What kernels call the numbers of a dtype: REAL of plan.cuh, `real` of real.cuh."""

from __future__ import annotations

import torch

REAL = {torch.float32: "float", torch.float64: "double"}
