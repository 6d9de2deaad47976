// to[i][..] = from[i][..] of up to SLOTS tensors of any types, each in one piece, in one launch.
//
// What a captured call reads is copied to where it lies, and what it made is copied out, at every call: a dozen tensors of
// some 10 KB in a small system, of megabytes in a large one. torch takes a launch for each type, and one more for each large
// tensor. A block owns PIECE bytes of one tensor, which it finds by counting pieces. Addresses and lengths are parameters
// of the launch: nothing is in memory that the host would have to keep until the device has read it. A thread copies the
// largest words that both ends are aligned to; rows of 12 bytes that end within a word have their last bytes one by one.
// Bytes: each is read once and written once.

#include "plan.cuh"

template <typename WORD>
__device__ __forceinline__ void copy_words(const char* from, char* to, int bytes) {
    const int words = bytes / (int)sizeof(WORD);
    for (int n = threadIdx.x; n < words; n += THREADS) ((WORD*)to)[n] = ((const WORD*)from)[n];
    for (int n = words * (int)sizeof(WORD) + threadIdx.x; n < bytes; n += THREADS) to[n] = from[n];
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_tensors(PARAMETERS) {
    const long long froms[SLOTS] = {FROM}, tos[SLOTS] = {TO}, sizes[SLOTS] = {BYTES};
    long long piece = blockIdx.x, from = 0, to = 0, bytes = 0;
#pragma unroll
    for (int slot = 0; slot < SLOTS; slot++) {
        const long long pieces = (sizes[slot] + PIECE - 1) / PIECE;
        if (piece >= 0 && piece < pieces) {
            from = froms[slot] + piece * PIECE;
            to = tos[slot] + piece * PIECE;
            bytes = sizes[slot] - piece * PIECE;
        }
        piece -= pieces;
    }
    const int here = (int)(bytes < PIECE ? bytes : PIECE);
    const char* source = (const char*)from;
    char* target = (char*)to;
    const int odd = (int)((from | to) % 16);
    if (odd == 0) copy_words<int4>(source, target, here);
    else if (odd == 8) copy_words<int2>(source, target, here);
    else if (odd % 4 == 0) copy_words<int>(source, target, here);
    else copy_words<char>(source, target, here);
}
