// Polynomials of a contraction as loops over tables, where straight-line code would be too long: a pass is
// one path. The interface is that of the code that `contraction_code.py` writes. Included by plan.cuh, after
// TERM[n] = {c, features}, filled up with COMPONENTS where a one stands; FIRST_TERM by row; PATH.
#pragma once

template <class T>
__device__ __forceinline__ T factor(const T (&x)[COMPONENTS], int i) {
    return i < COMPONENTS ? x[i] : add(T{(real)1}, T{});
}

struct TablePass {
    enum { PATHS = 1 };
    int at;

    __device__ __forceinline__ Path path(int) const { return {PATH[at].weight, PATH[at].width, PATH[at].out, 0}; }
    __device__ __forceinline__ Row row(int r) const { return {0, PATH[at].weight, PATH[at].out + r}; }

    template <class T, class Use>
    __device__ __forceinline__ void polynomials(const T (&x)[COMPONENTS], const Use& use) const {
        for (int m = 0; m < PATH[at].width; m++) {
            T sum{};
            const int row = PATH[at].row + m;
            for (int n = FIRST_TERM[row]; n < FIRST_TERM[row + 1]; n++) {
                T v = multiply(TERM[n].c, factor(x, TERM[n].of[0]));
                for (int d = 1; d < DEGREE; d++) v = multiply(v, factor(x, TERM[n].of[d]));
                sum = add(sum, v);
            }
            use(m, sum);
        }
    }

    template <class T, class Y>
    __device__ __forceinline__ void gradient(const T (&x)[COMPONENTS], const Y& y, T (&dx)[COMPONENTS]) const {
        for (int m = 0; m < PATH[at].width; m++) {
            const int row = PATH[at].row + m;
            for (int n = FIRST_TERM[row]; n < FIRST_TERM[row + 1]; n++)
                for (int d = 0; d < DEGREE && TERM[n].of[d] < COMPONENTS; d++) {
                    T v = multiply(TERM[n].c, y(m));
                    for (int e = 0; e < DEGREE; e++)
                        if (e != d) v = multiply(v, factor(x, TERM[n].of[e]));
                    dx[TERM[n].of[d]] = add(dx[TERM[n].of[d]], v);
                }
        }
    }
};

template <class F>
__device__ __forceinline__ void each_pass(const F& f) {
    for (int n = 0; n < PATHS_OF_ALL; n++) f(TablePass{n});
}
template <class F>
__device__ __forceinline__ void only_pass(int n, const F& f) {
    f(TablePass{n});
}
