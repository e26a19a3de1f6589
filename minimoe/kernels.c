/* What a CPU does much faster in one pass than in torch's calls; compiled by kernels.py when it is first needed.

   Numbers are computed in float32, 16 at a time; vectors are the compiler's own type, so any CPU will do. Rows are
   given by their address and the distance from one to the next in elements (`stride`). */

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef int16_t shorts __attribute__((vector_size(LANES * 2)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef float f32;
typedef uint16_t bf16; /* the upper half of a float32 */
typedef int8_t i8;

/* ---- n <= LANES numbers from and to memory; where n is known to be LANES, one instruction ---- */

INLINE vec load_f32(const f32 *from, long n) {
    vec x = {0};
    memcpy(&x, from, n * sizeof *from);
    return x;
}

INLINE vec load_bf16(const bf16 *from, long n) {
    halves x = {0};
    memcpy(&x, from, n * sizeof *from);
    return (vec)(__builtin_convertvector(x, words) << 16);
}

INLINE vec load_i8(const i8 *from, long n) {
    bytes x = {0};
    memcpy(&x, from, n * sizeof *from);
    /* in steps, each of which is one instruction: gcc makes the whole way number by number */
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(x, shorts), integers), vec);
}

INLINE void store_f32(f32 *to, vec x, long n) { memcpy(to, &x, n * sizeof *to); }

/* Rounded to the nearest, ties to even. */
INLINE void store_bf16(bf16 *to, vec x, long n) {
#ifdef __AVX512BF16__
    __m256bh y = _mm512_cvtneps_pbh((__m512)x);
#else /* NaN stays NaN, which the carry could turn into infinity */
    words bits = (words)x, nan = (words)(x != x);
    words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    halves y = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), halves);
#endif
    memcpy(to, &y, n * sizeof *to);
}

/* ---- sums and functions ---- */

INLINE float sum(vec x) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    eight a[2];
    four b[2];
    memcpy(a, &x, sizeof a);
    a[0] += a[1];
    memcpy(b, a, sizeof b);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

INLINE vec choose(words where, vec yes, vec no) { return (vec)(((words)yes & where) | ((words)no & ~where)); }

/* e^x = 2^n e^r, |r| <= ln(2)/2, where seven terms of the series err by less than float32 rounds. Below -87 it stays at
   e^-87, which is nothing beside 1; above 88 it is infinite. */
INLINE vec exponential(vec x) {
    const vec zero = {0};
    const float shift = 12582912; /* 1.5 * 2^23: a sum with it has no fraction, its lowest bits are n */
    const words large = (words)(x > 88);
    x = choose(large | (words)(x < -87), zero - 87, x);
    const vec shifted = x * 1.44269504f + shift, n = shifted - shift;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln(2) in two parts, the first one exact */
    vec series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1;
    series = series * r + 1;
    return choose(large, zero + __builtin_inff(), (vec)((words)series + ((words)shifted << 23)));
}

INLINE vec sigmoid(vec x) { return 1 / (1 + exponential(-x)); }

/* ---- SwiGLU: gate and up side by side in a row (n, 2I), products of both (n, I) ---- */

#define SWIGLU(T)                                                                                                      \
    INLINE void swiglu_part_##T(const T *gate, const T *up, T *out, long n) {                                          \
        const vec g = load_##T(gate, n);                                                                               \
        store_##T(out, g * sigmoid(g) * load_##T(up, n), n);                                                           \
    }                                                                                                                  \
    void swiglu_##T(const T *gate_up, T *out, long rows, long width, int threads) {                                    \
        _Pragma("omp parallel for num_threads(threads)") for (long row = 0; row < rows; row++) {                       \
            const T *gate = gate_up + row * 2 * width, *up = gate + width;                                             \
            T *to = out + row * width;                                                                                 \
            long i = 0;                                                                                                \
            for (; i + LANES <= width; i += LANES) swiglu_part_##T(gate + i, up + i, to + i, LANES);                   \
            if (i < width) swiglu_part_##T(gate + i, up + i, to + i, width - i);                                       \
        }                                                                                                              \
    }                                                                                                                  \
    INLINE void swiglu_backward_part_##T(const T *gate, const T *up, T *grad, T *grad_gate, T *grad_up, long n) {      \
        const vec g = load_##T(gate, n), u = load_##T(up, n), grad_out = load_##T(grad, n);                            \
        const vec s = sigmoid(g), silu = g * s;                                                                        \
        store_##T(grad_gate, grad_out * u * (s + silu * (1 - s)), n);                                                  \
        store_##T(grad_up, grad_out * silu, n);                                                                        \
        store_##T(grad, silu * u, n);                                                                                  \
    }                                                                                                                  \
    /* grad (n, I) is read and overwritten with the output, which backward needs too */                                \
    void swiglu_backward_##T(const T *gate_up, T *grad, T *grad_gate_up, long rows, long width, int threads) {         \
        _Pragma("omp parallel for num_threads(threads)") for (long row = 0; row < rows; row++) {                       \
            const T *gate = gate_up + row * 2 * width, *up = gate + width;                                             \
            T *out = grad + row * width, *grad_gate = grad_gate_up + row * 2 * width, *grad_up = grad_gate + width;    \
            long i = 0;                                                                                                \
            for (; i + LANES <= width; i += LANES)                                                                     \
                swiglu_backward_part_##T(gate + i, up + i, out + i, grad_gate + i, grad_up + i, LANES);                \
            if (i < width) swiglu_backward_part_##T(gate + i, up + i, out + i, grad_gate + i, grad_up + i, width - i); \
        }                                                                                                              \
    }

SWIGLU(f32)
SWIGLU(bf16)

/* ---- few rows times large matrices, as fast as memory is read ---- */

/* to[r][o] = scale * (w . from[r]) for `count` rows, whose sums stay in registers: `parts` of each, so that an addition
   need not wait for the one before. */
#define PRODUCTS(T)                                                                                                    \
    INLINE void dots_##T(const T *w, const f32 **from, f32 **to, long o, long in, f32 scale, const int count,          \
                         const int parts) {                                                                            \
        vec sums[8][4] = {0};                                                                                          \
        long i = 0;                                                                                                    \
        for (; i + parts * LANES <= in; i += parts * LANES)                                                            \
            _Pragma("GCC unroll 4") for (int part = 0; part < parts; part++) {                                         \
                const long at = i + part * LANES;                                                                      \
                const vec weights = load_##T(w + at, LANES);                                                           \
                _Pragma("GCC unroll 8") for (int r = 0; r < count; r++)                                                \
                    sums[r][part] += weights * load_f32(from[r] + at, LANES);                                          \
            }                                                                                                          \
        for (; i < in; i += LANES) {                                                                                   \
            const long n = in - i < LANES ? in - i : LANES;                                                            \
            const vec weights = load_##T(w + i, n);                                                                    \
            _Pragma("GCC unroll 8") for (int r = 0; r < count; r++) sums[r][0] += weights * load_f32(from[r] + i, n);  \
        }                                                                                                              \
        _Pragma("GCC unroll 8") for (int r = 0; r < count; r++) {                                                      \
            _Pragma("GCC unroll 4") for (int part = 1; part < parts; part++) sums[r][0] += sums[r][part];              \
            to[r][o] = scale * sum(sums[r][0]);                                                                        \
        }                                                                                                              \
    }                                                                                                                  \
    /* y[n] = matrices[ids[n]] (out, in) @ x[n / copies], for n < rows; a matrix is read once for all of its rows */   \
    void products_##T(const T *matrices, const f32 *scales, const int64_t *ids, long count, const f32 *x, f32 *y,      \
                      long rows, long copies, long in, long out, int threads) {                                        \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            const long thread = omp_get_thread_num();                                                                  \
            const long first = out * thread / threads, last = out * (thread + 1) / threads;                            \
            const f32 *from[rows];                                                                                     \
            f32 *to[rows];                                                                                             \
            for (long m = 0; m < count; m++) {                                                                         \
                long size = 0;                                                                                         \
                for (long n = 0; n < rows; n++)                                                                        \
                    if (ids[n] == m) {                                                                                 \
                        from[size] = x + n / copies * in;                                                              \
                        to[size++] = y + n * out;                                                                      \
                    }                                                                                                  \
                for (long o = first; size && o < last; o++) {                                                          \
                    const T *w = matrices + (m * out + o) * in;                                                        \
                    const f32 scale = scales ? scales[m * out + o] : 1;                                                \
                    long r = 0;                                                                                        \
                    for (; r + 8 <= size; r += 8) dots_##T(w, from + r, to + r, o, in, scale, 8, 2);                   \
                    for (; r + 4 <= size; r += 4) dots_##T(w, from + r, to + r, o, in, scale, 4, 2);                   \
                    for (; r + 2 <= size; r += 2) dots_##T(w, from + r, to + r, o, in, scale, 2, 4);                   \
                    if (r < size) dots_##T(w, from + r, to + r, o, in, scale, 1, 4);                                   \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

PRODUCTS(f32)
PRODUCTS(bf16)
PRODUCTS(i8)
