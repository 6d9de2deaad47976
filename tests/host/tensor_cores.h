// kernels/tensor_cores.cuh on the CPU: lanes show one another their fragments, each makes its four sums.
#pragma once

namespace host {

struct Fragments {
    alignas(16) double left[32][4], right[32][2];
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
