// kernels/tensor_cores.cuh on the CPU: lanes show one another their fragments, each makes its four sums.
#pragma once

namespace host {

struct Fragments {
    alignas(16) double left[32][8], right[32][4];
};
static Fragments fragments[MOST_THREADS / 32];

// What a tensor core reads of a number of tf32.
inline double of_tf32(unsigned bits) { return __builtin_bit_cast(float, bits & 0xffffe000u); }

// As tensor cores round their sums of float32.
inline float towards_zero(double x) {
    const float nearest = (float)x;
    return std::fabs((double)nearest) > std::fabs(x) ? std::nextafterf(nearest, 0) : nearest;
}
inline void add(float& sum, double product) { sum = towards_zero(sum + product); }
inline void add(double& sum, double product) { sum += product; }

template <class Sum>
void multiply_shown(Sum (&sum)[4]) {
    const Thread me = self();
    const Fragments& shown = fragments[me.warp];
    wait_for_lanes(0xffffffffu);
    for (unsigned n = 0; n < 4; n++) {
        const unsigned row = me.lane / 4 + n / 2 * 8, column = me.lane % 4 * 2 + n % 2;
        double product = 0;
        for (unsigned k = 0; k < 8; k++)
            product += shown.left[row % 8 * 4 + k % 4][k / 4 * 2 + row / 8] * shown.right[column * 4 + k % 4][k / 4];
        add(sum[n], product);
    }
    wait_for_lanes(0xffffffffu);
}

// Of a row or column, a lane has k = 2 t, 2 t + 1 in one register and those beyond by 8 in another; `half` is
// number n of a register.
template <class Half>
void multiply_sixteen(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], const Half& half) {
    const Thread me = self();
    Fragments& shown = fragments[me.warp];
    for (int n = 0; n < 8; n++) shown.left[me.lane][n] = half(a[n / 2], n % 2);
    for (int n = 0; n < 4; n++) shown.right[me.lane][n] = half(b[n / 2], n % 2);
    wait_for_lanes(0xffffffffu);
    for (unsigned n = 0; n < 4; n++) {
        const unsigned row = me.lane / 4 + n / 2 * 8, column = me.lane % 4 * 2 + n % 2;
        double product = 0;
        for (unsigned k = 0; k < 16; k++) {
            const unsigned t = k % 8 / 2, above = k / 8, second = k % 2;
            product += shown.left[row % 8 * 4 + t][(2 * above + row / 8) * 2 + second] * shown.right[column * 4 + t][2 * above + second];
        }
        add(sum[n], product);
    }
    wait_for_lanes(0xffffffffu);
}

}  // namespace host

inline void multiply_tiles(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    host::Fragments& shown = host::fragments[host::self().warp];
    for (int n = 0; n < 4; n++) shown.left[host::self().lane][n] = host::of_tf32(a[n]);
    for (int n = 0; n < 2; n++) shown.right[host::self().lane][n] = host::of_tf32(b[n]);
    host::multiply_shown(sum);
}

inline void multiply_tiles(double (&sum)[4], const double (&a)[4], const double (&b)[2]) {
    host::Fragments& shown = host::fragments[host::self().warp];
    for (int n = 0; n < 4; n++) shown.left[host::self().lane][n] = a[n];
    for (int n = 0; n < 2; n++) shown.right[host::self().lane][n] = b[n];
    host::multiply_shown(sum);
}

inline void multiply_four(double (&sum)[4], const double (&a)[2], double b) { multiply_tiles(sum, {a[0], a[1], 0, 0}, {b, 0}); }

inline void multiply_two(double (&sum)[4], const double (&a)[2][4], const double (&b)[2][2]) {
    for (int step = 0; step < 2; step++) multiply_tiles(sum, a[step], b[step]);
}

// The nearest number of bf16, of two the even one.
inline unsigned nearest_bf16(float x) {
    const unsigned bits = __float_as_uint(x);
    return x == x ? bits + 0x7fffu + (bits >> 16 & 1) >> 16 : 0x7fffu;
}
inline unsigned nearest_pair(float lower, float upper) { return nearest_bf16(upper) << 16 | nearest_bf16(lower); }

inline void multiply_pairs(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    host::multiply_sixteen(sum, a, b, [](unsigned pair, int n) { return (double)__uint_as_float(n ? pair & 0xffff0000u : pair << 16); });
}

namespace host {

// The nearest number of half precision, of two the even one, as its 16 bits.
inline unsigned half_of(float x) {
    const unsigned sign = __builtin_bit_cast(unsigned, x) >> 16 & 0x8000u;
    if (x != x) return sign | 0x7e00u;
    const double size = std::fabs((double)x);
    int exponent;
    std::frexp(size, &exponent);
    const int last = std::max(exponent - 11, -24);  // what its last bit stands for
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(size, -last)), last);
    if (rounded >= 65536) return sign | 0x7c00u;
    if (rounded < std::ldexp(1.0, -14)) return sign | (unsigned)std::ldexp(rounded, 24);
    std::frexp(rounded, &exponent);
    return sign | (unsigned)(exponent + 14) << 10 | (unsigned)std::ldexp(rounded, 11 - exponent) & 0x3ffu;
}

inline float of_half(unsigned bits) {
    const unsigned exponent = bits >> 10 & 31, rest = bits & 0x3ffu;
    const float size = exponent == 31 ? (rest ? NAN : INFINITY)
                       : exponent     ? (float)std::ldexp(rest + 1024.0, (int)exponent - 25)
                                      : (float)std::ldexp((double)rest, -24);
    return bits & 0x8000u ? -size : size;
}

}  // namespace host

inline unsigned nearest_halves(float first, float second) { return host::half_of(second) << 16 | host::half_of(first); }
inline float2 of_halves(unsigned pair) { return {host::of_half(pair & 0xffffu), host::of_half(pair >> 16)}; }

inline void multiply_halves(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    host::multiply_sixteen(sum, a, b, [](unsigned pair, int n) { return (double)host::of_half(n ? pair >> 16 : pair & 0xffffu); });
}

// Of four warps together: each has its own rows, and reads columns as `word_of` in warpgroups.cuh has them.
struct Columns {
    const unsigned* words;
    int across;  // groups of a step
};

inline Columns operator+(Columns columns, int words) { return {columns.words + words, columns.across}; }

template <int ACROSS>
Columns columns_at(const unsigned* step) { return {step, ACROSS}; }
template <int ACROSS>
constexpr int TO_LOW = ACROSS * 64;

inline void begin_products() {}
inline void end_products() {}
inline void keep_rows(unsigned (&)[2][4]) {}

namespace host {

// Asked for, and had when waited for: until then registers and columns may not change.
struct Product {
    float (*sums)[4];
    int across;
    const unsigned (*left)[4];
    Columns right;
    bool first;
};

struct Products {
    Product asked[8];
    int count = 0;
};
static Products products[MOST_THREADS];

inline void ask(float (*sums)[4], int across, const unsigned (&left)[4], Columns right, bool first) {
    Products& mine = products[self().number];
    if (mine.count == 8) fail("more products asked for than are remembered");
    mine.asked[mine.count++] = {sums, across, &left, right, first};
}

}  // namespace host

template <int ACROSS>
void product(float (&sums)[ACROSS][4], const unsigned (&left)[4], Columns right) { host::ask(sums, ACROSS, left, right, false); }
template <int ACROSS>
void first_product(float (&sums)[ACROSS][4], const unsigned (&left)[4], Columns right) { host::ask(sums, ACROSS, left, right, true); }

template <int ACROSS>
void wait_for_products(float (&)[ACROSS][4]) {
    const int lane = threadIdx.x % 32;
    host::Products& mine = host::products[host::self().number];
    for (int n = 0; n < mine.count; n++) {
        const host::Product& of = mine.asked[n];
        if (of.first) std::memset(of.sums, 0, sizeof *of.sums * of.across);
        for (int j = 0; j < of.across; j++)
            multiply_halves(of.sums[j], *of.left, {of.right.words[j * 32 + lane], of.right.words[(of.right.across + j) * 32 + lane]});
    }
    mine.count = 0;
}
