// Products that four warps ask tensor cores for together (wgmma, sm_90 alone): 64 rows of halves that are in registers, by columns
// that tensor cores read from shared memory themselves, where multiply_halves has a warp fetch them for each of its 16 rows.
// Sums are those of add_products (halves.cuh), product by product, and of float32's accuracy for the same reasons. All are asked for at
// once: a warpgroup by itself has one of 128 columns in 110 cycles, two of one multiprocessor have one each in 135.
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

// From there to low parts.
template <int ACROSS>
constexpr int TO_LOW = ACROSS * 16;

#define GROUP(HOW, J) HOW(s[J][0]), HOW(s[J][1]), HOW(s[J][2]), HOW(s[J][3])
#define GROUPS_4(HOW, J) GROUP(HOW, J), GROUP(HOW, J + 1), GROUP(HOW, J + 2), GROUP(HOW, J + 3)
#define GROUPS_8(HOW, J) GROUPS_4(HOW, J), GROUPS_4(HOW, J + 4)
#define NAMES_32                                                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                                \
    NAMES_32                                                                                                                    \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
    "%56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_32(HOW) GROUPS_8(HOW, 0)
#define SUMS_64(HOW) GROUPS_8(HOW, 0), GROUPS_8(HOW, 8)
#define ROWS_OF(A) "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3])
#define PRODUCT(NAME, HOW, ADDED, ACROSS, SIZE, SUMS, NAMES, LEFT, RIGHT)                                                        \
    __device__ __forceinline__ void NAME(float (&s)[ACROSS][4], const unsigned (&left)[4], Columns right) {                      \
        asm volatile("wgmma.mma_async.sync.aligned." SIZE ".f32.f16.f16 {" NAMES "}, {" LEFT "}, " RIGHT ", " ADDED ", 1, 1, 0;" \
                     : SUMS(HOW)                                                                                                 \
                     : ROWS_OF(left), "l"(right)                                                                                 \
                     : "memory");                                                                                                \
    }
#define PRODUCTS(ACROSS, SIZE, SUMS, NAMES, LEFT, RIGHT)                                                                              \
    PRODUCT(first_product, "=f", "0", ACROSS, SIZE, SUMS, NAMES, LEFT, RIGHT)                                                         \
    PRODUCT(product, "+f", "1", ACROSS, SIZE, SUMS, NAMES, LEFT, RIGHT)                                                               \
    __device__ __forceinline__ void wait_for_products(float (&s)[ACROSS][4]) {                                                        \
        asm volatile("wgmma.wait_group.sync.aligned 0;" : SUMS("+f") : : "memory");                                                   \
    }

// Before the first of some products.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// After the last.
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Of rows in `left` and of columns at `right`, added to what there is; the first, put in its place. Until wait_for_products the registers
// of sums and rows belong to tensor cores. The first has new registers: where two lots of sums had the same ones, and the same was done
// to both, the assembler took the first for the second (CUDA 12 and 13).
PRODUCTS(8, "m64n64k16", SUMS_32, NAMES_32, "%32, %33, %34, %35", "%36")
PRODUCTS(16, "m64n128k16", SUMS_64, NAMES_64, "%64, %65, %66, %67", "%68")

// After wait_for_products: so these registers are taken for nothing else before.
__device__ __forceinline__ void keep_rows(unsigned (&rows)[2][4]) {
#pragma unroll
    for (int n = 0; n < 8; n++) asm volatile("" : "+r"(rows[n / 4][n % 4]));
}

#endif

// Asks for the sums of a warpgroup's rows and of columns that begin at `right`, some of a step's OF groups, of two steps; made_up
// (halves.cuh) is still to come. Until wait_for_products and keep_rows, registers of all three and what lies at `right` stay as they are.
template <int OF, int ACROSS>
__device__ __forceinline__ void ask_for_products(float (&sums)[ACROSS][4], unsigned (&high)[2][4], unsigned (&low)[2][4], const unsigned* right) {
    const Columns first = columns_at<OF>(right), second = columns_at<OF>(right + WORDS_OF_A_STEP<OF>);
    begin_products();
    first_product(sums, low[0], first);
    product(sums, high[0], first + TO_LOW<OF>);
    product(sums, low[1], second);
    product(sums, high[1], second + TO_LOW<OF>);
    product(sums, high[0], first);
    product(sums, high[1], second);
    end_products();
}

// The same, when they are there.
template <int OF, int ACROSS>
__device__ __forceinline__ void products_of_warpgroup(float (&sums)[ACROSS][4], unsigned (&high)[2][4], unsigned (&low)[2][4], const unsigned* right) {
    ask_for_products<OF>(sums, high, low, right);
    wait_for_products(sums);
    keep_rows(high), keep_rows(low);
}
