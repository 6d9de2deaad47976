// The ring of a block of a linear by halves: its slots in shared memory, and how W's halves come to them. See linear_in_halves.cu.
//
// WARPGROUPS, on Hopper: the halves of a step, which lie together, come by the copy engine in one copy of STEPS * SLICE numbers, asked for
// by a lane of the first warp, where else each thread asks for eight times 16 bytes. Tensor cores alone read them, so that no thread
// has to show them what it copied, by a fence in each step that waits for all that the thread has on its way. Each step that is on its
// way has a barrier, STAGES - 1 in all: one begins another turn when all threads have waited for the last, and a slot is filled when all
// have its products; a __syncthreads says both.
//
// Slots are addresses that change places, and barriers' are handed from lane to lane: what follows from an array's name the compiler works
// out in each step, and of an address that it doesn't know to be the same in all lanes of a warp it makes a loop over lanes.
#pragma once

#include "async_copy.cuh"
#include "linear_in_halves_tile.cuh"

#if WARPGROUPS

__shared__ Barrier halves_there[STAGES - 1];

struct RingSlots {
    SharedAddress at[STAGES];  // of this step, and of those that follow

    __device__ __forceinline__ explicit RingSlots(real* memory) {
#pragma unroll
        for (int n = 0; n < STAGES; n++) at[n] = shared_address(memory + n * SLOT);
    }
    __device__ __forceinline__ void begin() {}  // where the last sum over channels ended
    __device__ __forceinline__ real* operator[](int n) const { return at_address<real>(at[n]); }
    __device__ __forceinline__ void next() {
        const SharedAddress first = at[0];
#pragma unroll
        for (int n = 0; n < STAGES - 1; n++) at[n] = at[n + 1];
        at[STAGES - 1] = first;
    }
};

struct RightCopies {
    const real* from;
    const bool first_warp;
    SharedAddress there[STAGES - 1];   // of this step, and of those that follow, from one sum over channels to the next
    unsigned parity[STAGES - 1] = {};  // of their turns

    __device__ __forceinline__ RightCopies() : first_warp(number_of_warp() == 0) {
#pragma unroll
        for (int n = 0; n < STAGES - 1; n++) there[n] = same_in_warp(shared_address(halves_there + n));
        if (first_warp && one_of_warp()) {
            for (int n = 0; n < STAGES - 1; n++) barrier_init(halves_there[n], 1);
            fence_for_engines();
        }
        __syncthreads();
    }
    __device__ __forceinline__ void begin(const real* halves) { from = halves; }
    // With the barrier of step n from this one on, which all have waited for if it was taken before.
    __device__ __forceinline__ void ask(real* to, int n) {
        constexpr int BYTES = STEPS * SLICE * sizeof(real);
        if (first_warp && one_of_warp()) {
            Barrier& barrier = *at_address<Barrier>(there[n]);
            arrive_expecting(barrier, BYTES);
            copy_in(to, from, BYTES, barrier);
        }
        from += STEPS * SLICE;
    }
    __device__ __forceinline__ void wait_here() { wait(*at_address<Barrier>(there[0]), parity[0]); }
    __device__ __forceinline__ void next() {
        const SharedAddress first = there[0];
        const unsigned after = parity[0] ^ 1;
#pragma unroll
        for (int n = 0; n < STAGES - 2; n++) there[n] = there[n + 1], parity[n] = parity[n + 1];
        there[STAGES - 2] = first, parity[STAGES - 2] = after;
    }
};

#else

struct RingSlots {
    real* memory;
    int slot = 0, slot_ahead = (STAGES - 1) * SLOT;

    __device__ __forceinline__ explicit RingSlots(real* memory) : memory(memory) {}
    __device__ __forceinline__ void begin() { slot = 0, slot_ahead = (STAGES - 1) * SLOT; }
    __device__ __forceinline__ real* operator[](int n) const { return memory + (n == STAGES - 1 ? slot_ahead : slot + n * SLOT); }
    __device__ __forceinline__ void next() { slot_ahead = slot, slot = slot == (STAGES - 1) * SLOT ? 0 : slot + SLOT; }
};

// Of the same group as the thread's copies of x.
struct RightCopies {
    const real* from;

    __device__ __forceinline__ void begin(const real* halves) { from = halves + (int)threadIdx.x * TOGETHER; }
    __device__ __forceinline__ void ask(real* to, int) {
#pragma unroll
        for (int i = 0; i < STEPS * SLICE / TOGETHER / THREADS; i++) {
            const int e = i * THREADS * TOGETHER;
            copy_async<TOGETHER>(to + (int)threadIdx.x * TOGETHER + e, from + e, TOGETHER);
        }
        from += STEPS * SLICE;
    }
    __device__ __forceinline__ void wait_here() {}
    __device__ __forceinline__ void next() {}
};

#endif
