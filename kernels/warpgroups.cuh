// Products that four warps ask tensor cores for together (wgmma, sm_90 alone): 64 rows of halves that are in registers, by columns
// that tensor cores read from shared memory themselves, where multiply_halves has a warp fetch them for each of its 16 rows.
// Sums are those of add_products (halves.cuh), product by product, and of float32's accuracy for the same reasons.
//
// A warpgroup's first warp has its first 16 rows, and so on; of these, of sums and of columns lane l has what it has in halves.cuh.
// Columns of 16 numbers lie one step after the other: high parts, then low ones; of each the first 8 numbers, then the others; of
// these 8 columns after 8 columns, 16 bytes each (core matrices, as PTX calls them). So a word is what a lane has of a Pairs, and 32
// words are a warp's.
#pragma once

#include "halves.cuh"

// Where word `part` (0 and 1: high, 2 and 3: low) of 8 columns, group `group`, lies in a step, for this lane.
template <int ACROSS>
__device__ __forceinline__ int word_of(int part, int group, int lane) { return (part * ACROSS + group) * 32 + lane; }
template <int ACROSS>
constexpr int WORDS_OF_A_STEP = 128 * ACROSS;

#ifndef E3NN_ACCEL_HOST  // where kernels are tested without a GPU, lanes hand one another their numbers

typedef unsigned long long Columns;  // how tensor cores are told where columns are

// An address, and in 16 bytes what takes from the first 8 of 16 numbers to the others, and from 8 columns to the next.
template <int ACROSS>
__device__ __forceinline__ Columns columns_at(const unsigned* step) {
    return (__cvta_generic_to_shared(step) >> 4) | (Columns)(ACROSS * 8) << 16 | (Columns)8 << 32;
}

// Makes what this thread copied to shared memory visible to tensor cores, after a barrier.
__device__ __forceinline__ void show_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Where the sum is: in another register, tensor cores would be waited for after each product.
__device__ __forceinline__ void set_last_bit(float& sum, unsigned bit) { asm volatile("or.b32 %0, %0, %1;" : "+f"(sum) : "r"(bit)); }

#define GROUP(J) "+f"(s[J][0]), "+f"(s[J][1]), "+f"(s[J][2]), "+f"(s[J][3])
#define GROUPS_8(J) GROUP(J), GROUP(J + 1), GROUP(J + 2), GROUP(J + 3), GROUP(J + 4), GROUP(J + 5), GROUP(J + 6), GROUP(J + 7)
#define NAMES_32                                                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                                \
    NAMES_32                                                                                                                    \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
    "%56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_32 GROUPS_8(0)
#define SUMS_64 GROUPS_8(0), GROUPS_8(8)
#define ROWS_OF(A) "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3])
#define PRODUCT(SIZE, SUMS, LEFT, RIGHT, ADDED) "wgmma.mma_async.sync.aligned." SIZE ".f32.f16.f16 {" SUMS "}, {" LEFT "}, " RIGHT ", " ADDED ", 1, 1, 0;\n"
#define BEGIN(NOUGHT) "{\n.reg .pred alone, added;\nsetp.ne.b32 alone, " NOUGHT ", 0;\nsetp.eq.b32 added, " NOUGHT ", 0;\nwgmma.fence.sync.aligned;\n"
#define END "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n}\n"

// A0 to A3 are the names of four rows' registers, B0 to B3 of columns.
#define PRODUCTS(ACROSS, SIZE, SUMS, OPERANDS, A0, A1, A2, A3, B0, B1, B2, B3, NOUGHT, LEFT, RIGHT, NO)                                   \
    /* low[0] high0 + high[0] low0 + low[1] high1 + high[1] low1 + high[0] high0 */                                                       \
    __device__ __forceinline__ void five_products(float (&s)[ACROSS][4], const unsigned (&high)[2][4], const unsigned (&low)[2][4],       \
                                                  Columns first, Columns second) {                                                        \
        constexpr Columns TO_LOW = ACROSS * 16;                                                                                           \
        asm volatile(BEGIN(NOUGHT) PRODUCT(SIZE, SUMS, A0, B0, "alone") PRODUCT(SIZE, SUMS, A1, B1, "added")                              \
                         PRODUCT(SIZE, SUMS, A2, B2, "added") PRODUCT(SIZE, SUMS, A3, B3, "added") PRODUCT(SIZE, SUMS, A1, B0, "added") END \
                     : OPERANDS                                                                                                           \
                     : ROWS_OF(low[0]), ROWS_OF(high[0]), ROWS_OF(low[1]), ROWS_OF(high[1]), "l"(first), "l"(first + TO_LOW),             \
                       "l"(second), "l"(second + TO_LOW), "r"(0)                                                                          \
                     : "memory");                                                                                                         \
    }                                                                                                                                     \
    __device__ __forceinline__ void one_product(float (&s)[ACROSS][4], const unsigned (&left)[4], Columns right) {                        \
        asm volatile(BEGIN(NO) PRODUCT(SIZE, SUMS, LEFT, RIGHT, "added") END : OPERANDS : ROWS_OF(left), "l"(right), "r"(0) : "memory");   \
    }

PRODUCTS(8, "m64n64k16", NAMES_32, SUMS_32, "%32, %33, %34, %35", "%36, %37, %38, %39", "%40, %41, %42, %43", "%44, %45, %46, %47",
         "%48", "%49", "%50", "%51", "%52", "%32, %33, %34, %35", "%36", "%37")
PRODUCTS(16, "m64n128k16", NAMES_64, SUMS_64, "%64, %65, %66, %67", "%68, %69, %70, %71", "%72, %73, %74, %75",
         "%76, %77, %78, %79", "%80", "%81", "%82", "%83", "%84", "%64, %65, %66, %67", "%68", "%69")

#endif

__device__ __forceinline__ float with_last_bit(float sum, unsigned bit) { return __uint_as_float(__float_as_uint(sum) | bit); }

// The products of a warpgroup's rows and of columns that begin at `right`, of two steps. The bits that are set at the end are not set yet:
// with_last_bit does, where sums are taken, for these registers belong to tensor cores.
template <int ACROSS>
__device__ __forceinline__ void products_of_warpgroup(float (&sums)[ACROSS][4], const unsigned (&high)[2][4], const unsigned (&low)[2][4],
                                                      const unsigned* right, const unsigned (&last_bit)[2]) {
    const Columns first = columns_at<ACROSS>(right), second = columns_at<ACROSS>(right + WORDS_OF_A_STEP<ACROSS>);
    five_products(sums, high, low, first, second);
#pragma unroll
    for (int j = 0; j < ACROSS; j++)
#pragma unroll
        for (int n = 1; n < 4; n += 2) set_last_bit(sums[j][n], last_bit[n / 2]);
    one_product(sums, high[1], second);
}
