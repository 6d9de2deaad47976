// Products by four warps together (wgmma, sm_90a alone): 64 rows of halves that are in registers by columns that tensor cores read from
// shared memory themselves, where multiply_halves has a warp fetch them for each of its 16 rows. As there, sums are of float32's accuracy.
//
// Lane l of a warp has of its 16 rows, of the sums and of columns what it has in halves.cuh, and a warpgroup's first warp the first
// rows. Columns of STEPS times 16 numbers lie one step after the other: high parts, then low ones; of each the first 8 of 16, then
// the others; of these 8 columns together, 16 bytes each (core matrices, as PTX calls them). A word is so what a lane has of a Pairs,
// and 32 words are a warp's.
#pragma once

#include "halves.cuh"

// Where word `part` (0 and 1: high, 2 and 3: low) of group `group` of 8 columns lies in a step, for this lane.
template <int ACROSS>
__device__ __forceinline__ int word_of(int part, int group, int lane) { return (part * ACROSS + group) * 32 + lane; }

__device__ __forceinline__ float with_last_bit(float sum, unsigned last_bit) { return __uint_as_float(__float_as_uint(sum) | last_bit); }

#ifndef E3NN_ACCEL_HOST

// How tensor cores find columns: an address, and in 16 bytes from the first 8 of 16 numbers to the others, from 8 columns to the next.
template <int ACROSS>
__device__ __forceinline__ unsigned long long columns_at(const unsigned* step) {
    return (__cvta_generic_to_shared(step) >> 4) | (unsigned long long)(ACROSS * 8) << 16 | 8ull << 32;
}
// From a step's high parts to its low ones.
template <int ACROSS>
constexpr unsigned long long TO_LOW = ACROSS * 16;

// What was copied to shared memory is there for tensor cores, after a barrier.
__device__ __forceinline__ void show_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define OF_GROUP(S, J) "+f"(S[J][0]), "+f"(S[J][1]), "+f"(S[J][2]), "+f"(S[J][3])
#define OF_8_GROUPS(S, J) \
    OF_GROUP(S, J), OF_GROUP(S, J + 1), OF_GROUP(S, J + 2), OF_GROUP(S, J + 3), OF_GROUP(S, J + 4), OF_GROUP(S, J + 5), OF_GROUP(S, J + 6), OF_GROUP(S, J + 7)
#define FOUR(A) "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3])
#define NAMES_32                                                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                              \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
             "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PRODUCT(SIZE, SUMS, LEFT, RIGHT, ADD) \
    "wgmma.mma_async.sync.aligned." SIZE ".f32.f16.f16 {" SUMS "}, {" LEFT "}, " RIGHT ", " ADD ", 1, 1, 0;\n"
#define DONE "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"

// low0 high0 + high0 low0 + low1 high1 + high1 low1 + high0 high0, and then high1 high1 on top.
#define PRODUCTS_OF(GROUPS, SIZE, NAMES, OPERANDS, L0, H0, L1, H1, B0H, B0L, B1H, B1L, ZERO, LEFT, RIGHT, NOUGHT)                             \
    __device__ __forceinline__ void five_products(float (&s)[GROUPS][4], const unsigned (&high)[2][4], const unsigned (&low)[2][4],   \
                                                  unsigned long long b0, unsigned long long b1) {                                     \
        asm volatile("{\n.reg .pred none, all;\nsetp.ne.b32 none, " ZERO ", 0;\nsetp.eq.b32 all, " ZERO ", 0;\n"                       \
                     "wgmma.fence.sync.aligned;\n" PRODUCT(SIZE, NAMES, L0, B0H, "none") PRODUCT(SIZE, NAMES, H0, B0L, "all")         \
                         PRODUCT(SIZE, NAMES, L1, B1H, "all") PRODUCT(SIZE, NAMES, H1, B1L, "all") PRODUCT(SIZE, NAMES, H0, B0H, "all") \
                             DONE "}\n"                                                                                               \
                     : OPERANDS                                                                                                       \
                     : FOUR(low[0]), FOUR(high[0]), FOUR(low[1]), FOUR(high[1]), "l"(b0), "l"(b0 + TO_LOW<GROUPS>), "l"(b1),           \
                       "l"(b1 + TO_LOW<GROUPS>), "r"(0)                                                                               \
                     : "memory");                                                                                                     \
    }                                                                                                                                 \
    __device__ __forceinline__ void one_product(float (&s)[GROUPS][4], const unsigned (&left)[4], unsigned long long right) {         \
        asm volatile("{\n.reg .pred all;\nsetp.eq.b32 all, " NOUGHT ", 0;\nwgmma.fence.sync.aligned;\n"                               \
                     PRODUCT(SIZE, NAMES, LEFT, RIGHT, "all") DONE "}\n"                                                             \
                     : OPERANDS                                                                                                       \
                     : FOUR(left), "l"(right), "r"(0)                                                                                 \
                     : "memory");                                                                                                     \
    }
#define SUMS_OF_8 OF_8_GROUPS(s, 0)
#define SUMS_OF_16 OF_8_GROUPS(s, 0), OF_8_GROUPS(s, 8)
PRODUCTS_OF(8, "m64n64k16", NAMES_32, SUMS_OF_8, "%32, %33, %34, %35", "%36, %37, %38, %39", "%40, %41, %42, %43", "%44, %45, %46, %47",
            "%48", "%49", "%50", "%51", "%52", "%32, %33, %34, %35", "%36", "%37")
PRODUCTS_OF(16, "m64n128k16", NAMES_64, SUMS_OF_16, "%64, %65, %66, %67", "%68, %69, %70, %71", "%72, %73, %74, %75", "%76, %77, %78, %79",
            "%80", "%81", "%82", "%83", "%84", "%64, %65, %66, %67", "%68", "%69")

// The products of a warpgroup's rows and of columns that begin at `right`, of two steps, in the order of add_products; but for the bits
// that are set at the end, which with_last_bit sets.
template <int ACROSS>
__device__ __forceinline__ void products_of_warpgroup(float (&sums)[ACROSS][4], const unsigned (&high)[2][4], const unsigned (&low)[2][4],
                                                      const unsigned* right, const unsigned (&last_bit)[2]) {
    const unsigned long long first = columns_at<ACROSS>(right), second = columns_at<ACROSS>(right + 128 * ACROSS);
    five_products(sums, high, low, first, second);
#pragma unroll
    for (int j = 0; j < ACROSS; j++)
#pragma unroll
        for (int n = 1; n < 4; n += 2)  // where they are: in other registers tensor cores would wait after each product
            asm volatile("or.b32 %0, %0, %1;" : "+f"(sums[j][n]) : "r"(last_bit[n / 2]));
    one_product(sums, high[1], second);
}

#else

inline void show_tensor_cores() {}

template <int ACROSS>
void products_of_warpgroup(float (&sums)[ACROSS][4], const unsigned (&high)[2][4], const unsigned (&low)[2][4], const unsigned* right,
                           const unsigned (&last_bit)[2]) {
    const int lane = threadIdx.x % 32;
    for (int j = 0; j < ACROSS; j++) {
        Pairs b[2];
        for (int step = 0; step < 2; step++)
            for (int part = 0; part < 4; part++)
                (part < 2 ? b[step].high : b[step].low)[part % 2] = right[step * 128 * ACROSS + word_of<ACROSS>(part, j, lane)];
        for (int n = 0; n < 4; n++) sums[j][n] = 0;
        add_products(sums[j], high, low, b, last_bit);
    }
}

#endif
