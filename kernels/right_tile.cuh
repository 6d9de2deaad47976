// W's part of a tile of a linear in shared memory: DEPTH channels of TILE columns each, as W's rows lie; TRANSPOSED, where W is read along
// its columns, TILE columns of DEPTH channels each.
#pragma once

#include "matrix_tile.cuh"

#ifndef TRANSPOSED
#define TRANSPOSED 0
#endif
// From one channel to the next, or from one column to the next: banks apart.
#if TRANSPOSED
constexpr int RIGHT_PITCH = DEPTH + 4, RIGHT_ROOM = TILE * RIGHT_PITCH;
#else
constexpr int RIGHT_PITCH = TILE + (sizeof(real) == 4 ? 8 : 4), RIGHT_ROOM = DEPTH * RIGHT_PITCH;
#endif

__device__ __forceinline__ real number_of_right(const real* right, int channel, int column) {
    return TRANSPOSED ? right[column * RIGHT_PITCH + channel] : right[channel * RIGHT_PITCH + column];
}
