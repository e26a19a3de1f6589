/* Vectors of float32 for all kernels: 16 at a time, in the compiler's own vector type, so that any CPU will do.

   Kernels are templates on the type of the values in memory: f32, bf16, or i8 for weights. They compute in float32.
   `threads` is how many are asked for; where OpenMP lets fewer come, these share the work. */

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#if __has_attribute(noipa)
#define ONCE static __attribute__((noipa)) /* not compiled again for each caller's constants, which takes time */
#else
#define ONCE static __attribute__((noinline))
#endif

constexpr long LANES = 16;

typedef float f32;
typedef uint16_t bf16; /* the upper half of a float32 */
typedef int8_t i8;

typedef f32 vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef int16_t shorts __attribute__((vector_size(LANES * 2)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

constexpr vec zero = {0};

/* `...` for i = 0, LANES, 2 LANES, ... and the n entries from there on: LANES, which the compiler knows, and at the end
   what is left of `total`. */
#define FOR_EACH_VECTOR(total, ...)                                                                                    \
    do {                                                                                                               \
        long i = 0;                                                                                                    \
        for (; i + LANES <= (total); i += LANES) {                                                                     \
            const long n = LANES;                                                                                      \
            __VA_ARGS__                                                                                                \
        }                                                                                                              \
        if (i < (total)) {                                                                                             \
            const long n = (total) - i;                                                                                \
            __VA_ARGS__                                                                                                \
        }                                                                                                              \
    } while (0)

/* ---- entry points ----

   EXPORT(rms_norm, f32) publishes the instance rms_norm<f32> as the C name rms_norm_f32: its address, and a letter for
   each of its parameters, which the compiler reads off its definition. Python needs no list of signatures. */

template <class A> constexpr char kind = 0; /* of another type: what follows would be cut off */
template <class A> constexpr char kind<A *> = 'p';
template <> constexpr char kind<long> = 'l';
template <> constexpr char kind<f32> = 'f';
template <> constexpr char kind<int> = 'i';
template <class... A> constexpr char kinds[] = {kind<A>..., 0};

struct Entry {
    void *address;
    const char *kinds;
};

template <class... A> static Entry entry(void (*function)(A...)) {
    static_assert(((kind<A> != 0) && ...), "Python passes addresses, long, f32 and int");
    return {(void *)function, kinds<A...>};
}

#define EXPORT(function, T)                                                                                            \
    extern "C" {                                                                                                       \
    __attribute__((visibility("default"))) Entry function##_##T = entry(&function<T>);                                 \
    }

/* ---- memory ---- */

/* Room for what is made on the way, from the start of a line of the cache; freed at the end of the block. */
template <class V> struct Buffer {
    V *const at;
    explicit Buffer(long size) : at((V *)aligned_alloc(64, (size * sizeof(V) / 64 + 1) * 64)) {
        if (!at) abort();
    }
    Buffer(const Buffer &) = delete;
    ~Buffer() { free(at); }
    operator V *() const { return at; }
};

INLINE words widen(halves x) {
#ifdef __AVX512F__ /* one instruction, for which gcc takes five */
    return (words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x); /* unmasked, gcc 12 warns of its own header */
#else
    return __builtin_convertvector(x, words);
#endif
}

/* n <= LANES values, and zeros behind them */
INLINE vec load(const f32 *from, long n) {
    vec x = {0};
    memcpy(&x, from, n * sizeof *from);
    return x;
}

INLINE vec load(const bf16 *from, long n) {
    halves x = {0};
    memcpy(&x, from, n * sizeof *from);
    return (vec)(widen(x) << 16);
}

INLINE vec load(const i8 *from, long n) {
    bytes x = {0};
    memcpy(&x, from, n * sizeof *from);
    /* in steps, each of which is one instruction: gcc makes the whole way value by value */
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(x, shorts), integers), vec);
}

/* The n <= LANES first values of x. */
INLINE void store(f32 *to, vec x, long n) { memcpy(to, &x, n * sizeof *to); }

/* Rounded to the nearest, ties to even. (The instruction makes values below 1e-38 zero.) */
INLINE void store(bf16 *to, vec x, long n) {
#ifdef __AVX512BF16__
    const __m256bh y = _mm512_cvtneps_pbh((__m512)x);
#else /* NaN stays NaN, which the carry could turn into infinity */
    const words bits = (words)x, nan = (words)(x != x);
    const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const halves y = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), halves);
#endif
    memcpy(to, &y, n * sizeof *to);
}

constexpr long AHEAD = 6; /* rows */

/* Have memory read while other rows are worked on; by itself the processor does so only along a line. */
INLINE void fetch(const void *from, long size) {
    for (long at = 0; at < size; at += 64) __builtin_prefetch((const char *)from + at);
}

/* ---- functions ---- */

INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE f32 sum(vec x) {
    typedef f32 eight __attribute__((vector_size(32)));
    typedef f32 four __attribute__((vector_size(16)));
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
    const f32 shift = 12582912; /* 1.5 * 2^23: a sum with it has no fraction, its lowest bits are n */
    const words large = (words)(x > 88.0f);
    x = choose(large | (words)(x < -87.0f), zero - 87.0f, x);
    const vec shifted = x * 1.44269504f + shift, n = shifted - shift;
    const vec r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln(2) in two parts, the first one exact */
    vec series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    return choose(large, zero + __builtin_inff(), (vec)((words)series + ((words)shifted << 23)));
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

template <class T> INLINE f32 inverse_rms(const T *x, long width, f32 eps) {
    vec total = zero;
    FOR_EACH_VECTOR(width, {
        const vec y = load(x + i, n);
        total += y * y;
    });
    return 1 / __builtin_sqrtf(sum(total) / width + eps);
}

/* y = the RMS norm of x, times the weight */
template <class T> INLINE void norm_row(const f32 *x, const f32 *weight, T *y, f32 eps, long width) {
    const f32 inverse = inverse_rms(x, width, eps);
    FOR_EACH_VECTOR(width, store(y + i, inverse * load(x + i, n) * load(weight + i, n), n););
}

/* out = the sum of the threads' parts (threads, width) */
INLINE void sum_parts(const f32 *parts, long threads, long width, f32 *out) {
    FOR_EACH_VECTOR(width, {
        vec total = zero;
        for (long thread = 0; thread < threads; thread++) total += load(parts + thread * width + i, n);
        store(out + i, total, n);
    });
}

/* ---- SwiGLU of a row: silu(gate) * up * weight ---- */

template <class T> INLINE void swiglu_row(const T *gate, const T *up, f32 weight, T *out, long width) {
    FOR_EACH_VECTOR(width, {
        const vec g = load(gate + i, n);
        store(out + i, weight * g * sigmoid(g) * load(up + i, n), n);
    });
}

/* `out` becomes the output, which backward needs too, and may be where `grad` is. Returns the weight's gradient. */
template <class T>
INLINE f32 swiglu_row_backward(const T *gate, const T *up, f32 weight, const T *grad, T *out, T *grad_gate, T *grad_up,
                               long width) {
    vec total = zero;
    FOR_EACH_VECTOR(width, {
        const vec g = load(gate + i, n), u = load(up + i, n), grad_out = load(grad + i, n);
        const vec s = sigmoid(g), silu = g * s, grad_product = weight * grad_out;
        total += grad_out * silu * u;
        store(grad_gate + i, grad_product * u * (s + silu * (1.0f - s)), n);
        store(grad_up + i, grad_product * silu, n);
        store(out + i, weight * silu * u, n);
    });
    return sum(total);
}
