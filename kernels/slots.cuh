// A ring of slots between warps that fill it and warps that read it, each at its own pace.
//
// A slot's turn: found empty -> filled (`full`, by arrivals and bytes) -> read (`empty`, by arrivals) -> filled again. Both sides go through
// slots in order, and know by the parity of a turn which one they wait for; the first time, slots are empty.
// A ring may have barriers for more slots (ROOM) than it goes through (COUNT).
#pragma once

#include "pipeline.cuh"

template <int ROOM>
struct Slots {
    Barrier full[ROOM], empty[ROOM];
};

template <int COUNT>
struct Turn {
    int slot = 0;
    unsigned parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == COUNT) slot = 0, parity ^= 1;
    }
};

template <int ROOM, int COUNT>
__device__ __forceinline__ void wait_until_full(Slots<ROOM>& slots, const Turn<COUNT>& turn) { wait(slots.full[turn.slot], turn.parity); }
template <int ROOM, int COUNT>
__device__ __forceinline__ void wait_until_empty(Slots<ROOM>& slots, const Turn<COUNT>& turn) { wait(slots.empty[turn.slot], turn.parity ^ 1); }

// Of warps that read, one arrival each, when all lanes have read the slot, and no read is still on its way.
constexpr int READER = EVERY_THREAD_ARRIVES ? 32 : 1;
template <int ROOM, int COUNT>
__device__ __forceinline__ void was_read(Slots<ROOM>& slots, const Turn<COUNT>& turn) {
    fence_for_engines();
    __syncwarp();
    if (EVERY_THREAD_ARRIVES || threadIdx.x % 32 == 0) arrive(slots.empty[turn.slot]);
}

// Threads that all arrive here wait for one another, the parities of their meetings taking turns.
__device__ __forceinline__ void meet(Barrier& b, unsigned parity) { arrive(b), wait(b, parity); }
