// e3nn's real spherical harmonics of vectors v = (x, y, z), and their derivatives:
//
//   u = v / max(|v|, 1e-12), as torch.nn.functional.normalize has it (or u = v),   t = u.u
//   Y_l^m = N_lm Q_l^m(y, t) c_m(z, x),   Y_l^-m = N_lm Q_l^m(y, t) s_m(z, x),   c_m + i s_m = (z + i x)^m
//   Q_m^m = (2m-1)!!,   (l-m) Q_l^m = (2l-1) y Q_{l-1}^m - (l+m-1) t Q_{l-2}^m
//
// so that Y are homogeneous polynomials, and their derivatives have Q of one degree less, and no more:
//
//   d/dy Q_l^m = (l+m) Q_{l-1}^m,   d/dx Q_l^m = -x Q_{l-1}^{m+1},   d/dx s_m = d/dz c_m = m c_{m-1},   and so on.
//
// `harmonics_gradient` is the sum over components of g dY/dv. Second derivatives are these two functions in dual
// numbers, v + e h: `harmonics_along` is dY/dv h, `harmonics_gradient_along` the gradient of <g, dY/dv h> by v.
//
// Who owns what: a thread a vector. It goes through the orders m one after another and through the degrees of each,
// with two Q and c, s in registers, whatever the highest degree is. Rows of components are written and read by the
// whole block, through shared memory at an odd stride, so that global memory sees full lines; of degrees that are
// asked for several times it has one copy. Each number is moved once: R (3 + columns) forward, R (6 + columns)
// for the gradient, R 3 more for a direction.

#include "plan.cuh"  // LMAX, NORMS, STARTS, SLOTS, COLUMNS, SEGMENTS, NORMALIZE, THREADS
#include "real.cuh"
#include "dual.cuh"

#define PITCH ((SLOTS > 3 ? SLOTS : 3) | 1)
#define EPSILON ((real)1e-12)  // of torch.nn.functional.normalize

constexpr real NORM[] = {NORMS};     // of (l, m), m >= 0: at l (l+1) / 2 + m
constexpr int START_OF[] = {STARTS};  // where a degree's components are in a row of shared memory, or -1

constexpr bool wanted(int l) { return l <= LMAX && START_OF[l <= LMAX ? l : 0] >= 0; }
// As types, so that they are immediates and no tables.
template <int L, int M>
struct Component {
    static constexpr int plus = START_OF[L] + L + M, minus = START_OF[L] + L - M;
    static constexpr real norm = NORM[L * (L + 1) / 2 + M];
};

constexpr real double_factorial(int n) { return n < 2 ? 1 : n * double_factorial(n - 2); }

template <class T>
struct Vector {
    T x, y, z;
};

// A vector with unit length, if that is wanted, and what it was divided by.
template <class T>
struct Direction {
    Vector<T> u;
    T length;
    bool is_short;  // divided by a constant

    __device__ __forceinline__ explicit Direction(Vector<T> v) : u(v), length(v.x), is_short(false) {
#if NORMALIZE
        length = square_root(v.x * v.x + v.y * v.y + v.z * v.z);
        is_short = value_of(length) < EPSILON;  // a NaN isn't
        if (is_short) length = T{EPSILON};
        u = {v.x / length, v.y / length, v.z / length};
#endif
    }

    // The gradient by v, from that by u.
    __device__ __forceinline__ Vector<T> back(Vector<T> d) const {
#if NORMALIZE
        if (!is_short) {
            const T along = u.x * d.x + u.y * d.y + u.z * d.z;
            d = {d.x - along * u.x, d.y - along * u.y, d.z - along * u.z};
        }
        d = {d.x / length, d.y / length, d.z / length};
#endif
        return d;
    }
};

__device__ __forceinline__ Vector<real> vector_of(const real* v, const real*, long long row, real) {
    return {v[3 * row], v[3 * row + 1], v[3 * row + 2]};
}
__device__ __forceinline__ Vector<Dual> vector_of(const real* v, const real* h, long long row, Dual) {
    return {{v[3 * row], h[3 * row]}, {v[3 * row + 1], h[3 * row + 1]}, {v[3 * row + 2], h[3 * row + 2]}};
}

__device__ __forceinline__ real result_of(real a) { return a; }
__device__ __forceinline__ real result_of(Dual a) { return tangent_of(a); }
__device__ __forceinline__ real derivative_of_constant(real a, real) { return a; }
__device__ __forceinline__ real derivative_of_constant(real, Dual) { return 0; }

// (z + i x)^m, and the power before.
template <class T>
struct Power {
    T c, s, c_before, s_before;
};

// Degrees L and above of order M; the first Q of an order is a number, `lower` of it is zero.
template <int L, int M, class T, class Q, class Lower, class Use>
__device__ __forceinline__ void climb(T y, T t, Lower lower, Q q, const Power<T>& power, Use& use) {
    use.template visit<L, M>(q, power);
    if constexpr (L == M && L < LMAX) {
        const T next = (real)(2 * L + 1) * q * y;
        climb<L + 1, M>(y, t, q, next, power, use);
    } else if constexpr (L < LMAX) {
        constexpr real by_y = (real)(2 * L + 1) / (L + 1 - M), by_t = (real)(L + M) / (L + 1 - M);
        const T next = by_y * (y * q) - (by_t * lower) * t;
        climb<L + 1, M>(y, t, q, next, power, use);
    }
}

template <int M, class T, class Use>
__device__ __forceinline__ void orders(const Vector<T>& u, T t, const Power<T>& power, Use& use) {
    climb<M, M>(u.y, t, (real)0, double_factorial(2 * M - 1), power, use);
    if constexpr (M < LMAX) {
        if constexpr (M == 0)
            orders<1>(u, t, Power<T>{u.z, u.x, power.c, power.s}, use);
        else
            orders<M + 1>(u, t, Power<T>{u.z * power.c - u.x * power.s, u.z * power.s + u.x * power.c, power.c, power.s}, use);
    }
}

template <class T, class Use>
__device__ __forceinline__ void all_orders(const Vector<T>& u, Use& use) {
    orders<0>(u, u.x * u.x + u.y * u.y + u.z * u.z, Power<T>{T{1}, T{0}, T{0}, T{0}}, use);
}

// Components into a row of shared memory.
struct Values {
    real* row;

    template <int L, int M, class Q, class T>
    __device__ __forceinline__ void visit(Q q, const Power<T>& power) {
        if constexpr (wanted(L)) {
            constexpr int plus = Component<L, M>::plus, minus = Component<L, M>::minus;
            constexpr real norm = Component<L, M>::norm;
            if constexpr (L == 0) {
                row[plus] = derivative_of_constant(norm, T{});
            } else if constexpr (M == 0) {
                row[plus] = result_of(norm * q);
            } else {
                const auto scaled = norm * q;
                row[plus] = result_of(scaled * power.c);
                row[minus] = result_of(scaled * power.s);
            }
        }
    }
};

// Of <g, Y>, from a row of g in shared memory: the gradient by u, but for what is along (x, 0, z).
template <class T>
struct Gradient {
    const real* row;
    Vector<T> d;
    T inward;

    // g's share in c_m and in s_m, for degree l.
    template <int L, int M>
    __device__ __forceinline__ T paired(const T& c, const T& s) const {
        constexpr int plus = Component<L, M>::plus, minus = Component<L, M>::minus;
        constexpr real norm = Component<L, M>::norm;
        if constexpr (M == 0) return (norm * row[plus]) * T{1};
        else return (norm * row[plus]) * c + (norm * row[minus]) * s;
    }

    template <int L, int M, class Q>
    __device__ __forceinline__ void visit(Q q, const Power<T>& power) {
        if constexpr (wanted(L) && M > 0) {
            constexpr int plus = Component<L, M>::plus, minus = Component<L, M>::minus;
            constexpr real scale = M * Component<L, M>::norm;
            const real c = scale * row[plus], s = scale * row[minus];
            d.z = d.z + q * (c * power.c_before + s * power.s_before);
            d.x = d.x + q * (s * power.c_before - c * power.s_before);
        }
        if constexpr (wanted(L + 1)) {
            d.y = d.y + ((real)(L + 1 + M) * q) * paired<L + 1, M>(power.c, power.s);
            if constexpr (M > 0) inward = inward + q * paired<L + 1, M - 1>(power.c_before, power.s_before);
        }
    }
};

// One after another, WIDTH columns of the block's rows and the slots that have the same components; a degree that
// comes again is met by the same thread, which adds.
template <int COLUMN, int SLOT, int WIDTH>
__device__ __forceinline__ void write_segment(real* out, const real* rows, int count) {
    for (int n = threadIdx.x; n < count * WIDTH; n += THREADS)
        out[(long long)(n / WIDTH) * COLUMNS + COLUMN + n % WIDTH] = rows[n / WIDTH * PITCH + SLOT + n % WIDTH];
}
template <int COLUMN, int SLOT, int WIDTH, bool AGAIN>
__device__ __forceinline__ void read_segment(const real* g, real* rows, int count) {
    for (int n = threadIdx.x; n < count * WIDTH; n += THREADS) {
        const real value = g[(long long)(n / WIDTH) * COLUMNS + COLUMN + n % WIDTH];
        real& sum = rows[n / WIDTH * PITCH + SLOT + n % WIDTH];
        sum = AGAIN ? sum + value : value;
    }
}

template <class T>
__device__ __forceinline__ void values(const real* v, const real* h, long long rows, real* shared, real* out) {
    const long long first = (long long)blockIdx.x * THREADS, row = first + threadIdx.x;
    const int count = (int)min((long long)THREADS, rows - first);
    if (row < rows) {
        Values use{shared + threadIdx.x * PITCH};
        all_orders(Direction<T>(vector_of(v, h, row, T{})).u, use);
    }
    __syncthreads();
#define SEGMENT(column, slot, width, again) write_segment<column, slot, width>(out + first * COLUMNS, shared, count);
    SEGMENTS
#undef SEGMENT
}

template <class T>
__device__ __forceinline__ void gradients(const real* g, const real* v, const real* h, long long rows, real* shared, real* out) {
    const long long first = (long long)blockIdx.x * THREADS, row = first + threadIdx.x;
    const int count = (int)min((long long)THREADS, rows - first);
#define SEGMENT(column, slot, width, again) read_segment<column, slot, width, again>(g + first * COLUMNS, shared, count);
    SEGMENTS
#undef SEGMENT
    __syncthreads();
    Vector<T> d{};
    if (row < rows) {
        const Direction<T> direction(vector_of(v, h, row, T{}));
        const Vector<T>& u = direction.u;
        Gradient<T> use{shared + threadIdx.x * PITCH, {}, {}};
        all_orders(u, use);
        d = direction.back({use.d.x - use.inward * u.x, use.d.y, use.d.z - use.inward * u.z});
    }
    __syncthreads();
    shared[3 * threadIdx.x] = result_of(d.x);
    shared[3 * threadIdx.x + 1] = result_of(d.y);
    shared[3 * threadIdx.x + 2] = result_of(d.z);
    __syncthreads();
    for (int n = threadIdx.x; n < 3 * count; n += THREADS) out[3 * first + n] = shared[n];
}

extern "C" __global__ void __launch_bounds__(THREADS)
harmonics(const real* __restrict__ v, long long rows, real* __restrict__ out) {
    __shared__ real shared[THREADS * PITCH];
    values<real>(v, nullptr, rows, shared, out);
}

extern "C" __global__ void __launch_bounds__(THREADS)
harmonics_along(const real* __restrict__ v, const real* __restrict__ h, long long rows, real* __restrict__ out) {
    __shared__ real shared[THREADS * PITCH];
    values<Dual>(v, h, rows, shared, out);
}

extern "C" __global__ void __launch_bounds__(THREADS)
harmonics_gradient(const real* __restrict__ g, const real* __restrict__ v, long long rows, real* __restrict__ out) {
    __shared__ real shared[THREADS * PITCH];
    gradients<real>(g, v, nullptr, rows, shared, out);
}

extern "C" __global__ void __launch_bounds__(THREADS)
harmonics_gradient_along(const real* __restrict__ g, const real* __restrict__ v, const real* __restrict__ h,
                         long long rows, real* __restrict__ out) {
    __shared__ real shared[THREADS * PITCH];
    gradients<Dual>(g, v, h, rows, shared, out);
}
