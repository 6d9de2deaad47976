#pragma once
#include "plan.cuh"
__device__ __forceinline__ REAL product(REAL a, REAL b) { return a * b; }
