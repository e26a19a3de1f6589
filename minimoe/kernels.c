/* What a CPU does much faster in one pass than in torch's calls; compiled by kernels.py when it is first needed.

   Numbers are computed in float32, 16 at a time; vectors are the compiler's own type, so any CPU will do. `threads` are
   asked for; where a limit lets fewer come, these share the work. This file includes itself once for each type of
   numbers in memory: the second half is compiled for T = f32, bf16 and i8, and NAME(products) is there products_f32,
   products_bf16 and products_i8. */

#ifndef T

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define ONCE static __attribute__((noipa)) /* not compiled anew for a call's constants, as someone waits for it */

typedef float f32;
typedef uint16_t bf16; /* the upper half of a float32 */
typedef int8_t i8;

typedef f32 vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef int16_t shorts __attribute__((vector_size(LANES * 2)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

static const vec zero = {0};

/* `...` for i = 0, LANES, 2 LANES, ... and the n numbers from there on: LANES, which the compiler knows, and at the end
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

/* ---- n <= LANES numbers from and to memory ---- */

INLINE words widen(halves x) {
#ifdef __AVX512F__ /* one instruction, for which gcc takes five */
    return (words)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, words);
#endif
}

INLINE vec load_f32(const f32 *from, long n) {
    vec x = {0};
    memcpy(&x, from, n * sizeof *from);
    return x;
}

INLINE vec load_bf16(const bf16 *from, long n) {
    halves x = {0};
    memcpy(&x, from, n * sizeof *from);
    return (vec)(widen(x) << 16);
}

INLINE vec load_i8(const i8 *from, long n) {
    bytes x = {0};
    memcpy(&x, from, n * sizeof *from);
    /* in steps, each of which is one instruction: gcc makes the whole way number by number */
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(x, shorts), integers), vec);
}

INLINE void store_f32(f32 *to, vec x, long n) { memcpy(to, &x, n * sizeof *to); }

/* Rounded to the nearest, ties to even. (The instruction makes numbers below 1e-38 zero.) */
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

#define AHEAD 6

/* Have memory read while others are worked on, which the processor does by itself only for what lies in a line. */
INLINE void fetch(const void *from, long bytes) {
    for (long at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)from + at);
}

/* ---- functions ---- */

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

/* ---- tiles of products ----

   A packed matrix has words: each is a number of float32, or two of bfloat16, which are its rows 2k and 2k + 1. */

#define TALL 12          /* rows of a tile, whose sums stay in registers */
#define WIDE (2 * LANES) /* columns */
#define PER_WORD ((long)(sizeof(word) / sizeof(T)))

typedef uint32_t word __attribute__((may_alias)); /* of two numbers the lower half is the first */

/* c + a . b of each word */
INLINE vec add_products_f32(vec c, words a, words b) { return c + (vec)a * (vec)b; }

INLINE vec add_products_bf16(vec c, words a, words b) {
#ifdef __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    return c + (vec)(a << 16) * (vec)(b << 16) + (vec)(a & 0xffff0000) * (vec)(b & 0xffff0000);
#endif
}

/* Words of two rows; there is only one in words of float32. */
INLINE words pack_f32(vec a, vec b) { return (words)a; }

INLINE words pack_bf16(vec a, vec b) {
    halves low, high;
    store_bf16((bf16 *)&low, a, LANES);
    store_bf16((bf16 *)&high, b, LANES);
    return widen(low) | widen(high) << 16;
}

/* WIDE numbers here, WIDE after `stride`, and so on: a panel's, as they lie among the weights */
typedef struct {
    const f32 *at;
    long stride, at_once;
} slices;

/* Have some of them read into a cache of this core, but not into the first, which the panel in use is in. */
INLINE void fetch_some(slices *of) {
    for (long i = 0; i < of->at_once; i++, of->at += of->stride) {
        __builtin_prefetch(of->at, 0, 2);
        __builtin_prefetch(of->at + LANES, 0, 2);
    }
}

INLINE long least(long a, long b) { return a < b ? a : b; }

/* The first column of a thread's share. */
INLINE long share(long columns, long thread, long team) { return columns / WIDE * thread / team * WIDE; }

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(function) PASTE(function, T)
#define LOAD NAME(load)
#define STORE NAME(store)

#define T f32
#include "kernels.c"
#undef T
#define T bf16
#include "kernels.c"
#undef T
#define T i8
#define ONLY_MATRICES
#include "kernels.c"

/* ---- Newton-Schulz, see newton_schulz() in train/optim.py ----

   Matrices have multiples of 4 rows and of LANES columns. Of symmetric ones only the lower triangle is made, in squares
   of WIDE. */

/* x (rows, n) packed; `lower` means that it is symmetric and only its lower triangle there. */
ONCE void pack(const bf16 *x, word *packed, long rows, long n, int lower) {
    for (long row = 0; row < rows; row += 2) {
        word *to = packed + row / 2 * n;
        const long square_end = (row / WIDE + 1) * WIDE, known = lower && square_end < n ? square_end : n;
        for (long j = 0; j < known; j += LANES) {
            const bf16 *upper = x + row * n + j;
            const words pairs = pack_bf16(load_bf16(upper, LANES), load_bf16(upper + n, LANES));
            memcpy(to + j, &pairs, sizeof pairs);
        }
        for (long j = known; j < n; j++) memcpy(to + j, x + j * n + row, sizeof *to); /* its mirror image */
    }
}

/* out[i][j] = alpha * sum over pairs k of a(i, k) . b[k][j] + beta * added[i][j], if there is any, for `height` rows
   from i and `width` vectors from j. a(i, k) is i steps and k strides from a. */
INLINE void tile(const word *a, long step, long stride, const word *b, long pairs, f32 alpha, f32 beta,
                 const bf16 *added, bf16 *out, long n, long i, long j, const int height, const int width) {
    vec sums[TALL][2] = {0};
    const word *rows[TALL];
    for (int r = 0; r < height; r++) rows[r] = a + (i + r) * step;
    add_tile_bf16(sums, rows, stride, b + j, n, pairs, height, width);
#pragma GCC unroll 12
    for (int r = 0; r < height; r++)
#pragma GCC unroll 2
        for (int v = 0; v < width; v++) {
            const long at = (i + r) * n + j + v * LANES;
            const vec more = added ? beta * load_bf16(added + at, LANES) : zero;
            store_bf16(out + at, alpha * sums[r][v] + more, LANES);
        }
}

/* out (rows, n) = alpha * a b + beta * added, as `tile`; of a symmetric one the lower triangle. */
ONCE void multiply_pairs(const word *a, long step, long stride, const word *b, long pairs, f32 alpha, f32 beta,
                         const bf16 *added, bf16 *out, long rows, long n, int lower) {
    for (long j = 0; j < n; j += WIDE) {
        long i = lower ? j : 0;
        if (j + WIDE <= n) {
            for (; i + 12 <= rows; i += 12) tile(a, step, stride, b, pairs, alpha, beta, added, out, n, i, j, 12, 2);
            for (; i < rows; i += 4) tile(a, step, stride, b, pairs, alpha, beta, added, out, n, i, j, 4, 2);
        } else
            for (; i < rows; i += 4) tile(a, step, stride, b, pairs, alpha, beta, added, out, n, i, j, 4, 1);
    }
}

/* Of each x (height, width), width <= height: x / |x|, and `steps` times x (a + b x^T x + c (x^T x)^2). */
void newton_schulz_bf16(const bf16 *matrices, bf16 *out, bf16 *scratch, long scratch_size, f32 a, f32 b, f32 c,
                        long steps, long count, long height, long width, int threads) {
    const long rows = (height + 3) / 4 * 4, columns = (width + LANES - 1) / LANES * LANES; /* the rest is zeros */
#pragma omp parallel for num_threads(threads)
    for (long matrix = 0; matrix < count; matrix++) {
        const bf16 *given = matrices + matrix * height * width;
        bf16 *result = out + matrix * height * width;
        bf16 *x = scratch + omp_get_thread_num() * scratch_size, *next = x + rows * columns;
        bf16 *gram = next + rows * columns, *poly = gram + columns * columns;
        word *packed = (word *)(poly + columns * columns);
        vec squares = zero;
        FOR_EACH_VECTOR(height * width, {
            const vec y = load_bf16(given + i, n);
            squares += y * y;
        });
        const f32 inverse = 1 / (sqrtf(sum(squares)) + 1e-7f);
        memset(x, 0, rows * columns * sizeof *x);
        for (long row = 0; row < height; row++)
            FOR_EACH_VECTOR(width, {
                const vec y = load_bf16(given + row * width + i, n);
                store_bf16(x + row * columns + i, inverse * y, n);
            });
        for (long step = 0; step < steps; step++) {
            pack(x, packed, rows, columns, 0);
            multiply_pairs(packed, 1, columns, packed, rows / 2, 1, 0, NULL, gram, columns, columns, 1);
            pack(gram, packed, columns, columns, 1);
            multiply_pairs(packed, 1, columns, packed, columns / 2, c, b, gram, poly, columns, columns, 1);
            pack(poly, packed, columns, columns, 1);
            multiply_pairs((word *)x, columns / 2, 1, packed, columns / 2, 1, a, x, next, rows, columns, 0);
            bf16 *swap = x;
            x = next;
            next = swap;
        }
        for (long row = 0; row < height; row++) memcpy(result + row * width, x + row * columns, width * sizeof *x);
    }
}

#else /* for each T */

#ifndef ONLY_MATRICES

INLINE f32 NAME(inverse_rms)(const T *x, long width, f32 eps) {
    vec total = zero;
    FOR_EACH_VECTOR(width, {
        const vec y = LOAD(x + i, n);
        total += y * y;
    });
    return 1 / sqrtf(sum(total) / width + eps);
}

/* y = the RMS norm of x */
INLINE void NAME(norm_row)(const f32 *x, const f32 *gains, T *y, f32 eps, long width) {
    const f32 inverse = inverse_rms_f32(x, width, eps);
    FOR_EACH_VECTOR(width, STORE(y + i, inverse * load_f32(x + i, n) * load_f32(gains + i, n), n););
}

#endif

/* ---- few rows times large matrices, as fast as memory is read ---- */

/* to[r][o] = scale * (w . from[r]), or that more, for `count` rows, whose sums stay in registers: `parts` of each, so
   that an addition need not wait for the one before. */
INLINE void NAME(dots)(const T *w, const f32 **from, f32 **to, long o, long in, f32 scale, int add, const int count,
                       const int parts) {
    vec sums[8][4] = {0};
    const long even = in / (parts * LANES) * (parts * LANES);
    for (long at = 0; at < even; at += parts * LANES)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) {
            const vec weights = LOAD(w + at + part * LANES, LANES);
#pragma GCC unroll 8
            for (int r = 0; r < count; r++)
                sums[r][part] += weights * load_f32(from[r] + at + part * LANES, LANES);
        }
    FOR_EACH_VECTOR(in - even, {
        const vec weights = LOAD(w + even + i, n);
        for (int r = 0; r < count; r++) sums[r][0] += weights * load_f32(from[r] + even + i, n);
    });
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) {
        vec total = sums[r][0];
#pragma GCC unroll 4
        for (int part = 1; part < parts; part++) total += sums[r][part];
        to[r][o] = scale * sum(total) + (add ? to[r][o] : 0);
    }
}

/* y[n][o] = matrices[ids[n]][o] . x[n / copies], or that more, for n < rows and first <= o < last. Rows of x begin
   `stride` numbers apart. A matrix is read once for all of its rows. */
ONCE void NAME(multiply)(const T *matrices, const f32 *scales, const int64_t *ids, long count, const f32 *x,
                           long stride, f32 *y, int add, long rows, long copies, long in, long out, long first,
                           long last) {
    const f32 *from[rows];
    f32 *to[rows];
    for (long m = 0; m < count; m++) {
        long size = 0;
        for (long n = 0; n < rows; n++)
            if (ids[n] == m) {
                from[size] = x + n / copies * stride;
                to[size++] = y + n * out;
            }
        for (long o = first; size && o < last; o++) {
            const T *w = matrices + (m * out + o) * in;
            const f32 scale = scales ? scales[m * out + o] : 1;
            long r = 0;
            for (; r + 8 <= size; r += 8) NAME(dots)(w, from + r, to + r, o, in, scale, add, 8, 2);
            for (; r + 4 <= size; r += 4) NAME(dots)(w, from + r, to + r, o, in, scale, add, 4, 2);
            for (; r + 2 <= size; r += 2) NAME(dots)(w, from + r, to + r, o, in, scale, add, 2, 4);
            if (r < size) NAME(dots)(w, from + r, to + r, o, in, scale, add, 1, 4);
        }
    }
}

/* y[n] = matrices[ids[n]] (out, in) @ x[n / copies], or that more. With gains it is their RMS norm that is multiplied;
   it goes to `normed`. */
void NAME(products)(const T *matrices, const f32 *scales, const int64_t *ids, long count, const f32 *x,
                    const f32 *gains, f32 eps, f32 *normed, f32 *y, long add, long rows, long copies, long in, long out,
                    int threads) {
#pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
        if (gains) {
#pragma omp for
            for (long row = 0; row < rows / copies; row++)
                norm_row_f32(x + row * in, gains, normed + row * in, eps, in);
        }
        NAME(multiply)(matrices, scales, ids, count, gains ? normed : x, in, y, add, rows, copies, in, out,
                       out * thread / team, out * (thread + 1) / team);
    }
}

/* y[t] += the sum over its slots of weights[t][s] * (down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t]))), where e is
   ids[t][s]. In `hidden` (rows, 2 * width) and `outputs` (rows, in) is what is made on the way. */
void NAME(experts)(const T *gate_up, const f32 *gate_up_scales, const T *down, const f32 *down_scales,
                   const int64_t *ids, const f32 *weights, long count, const f32 *x, f32 *hidden, f32 *outputs, f32 *y,
                   long tokens, long slots, long in, long width, int threads) {
    const long rows = tokens * slots;
#pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
        long first = width * thread / team, last = width * (thread + 1) / team;
        for (long part = 0; part <= width; part += width)
            NAME(multiply)(gate_up, gate_up_scales, ids, count, x, in, hidden, 0, rows, slots, in, 2 * width,
                           part + first, part + last);
        for (long row = 0; row < rows; row++) {
            f32 *gate = hidden + row * 2 * width + first;
            FOR_EACH_VECTOR(last - first, {
                const vec g = load_f32(gate + i, n);
                store_f32(gate + i, g * sigmoid(g) * load_f32(gate + width + i, n), n);
            });
        }
#pragma omp barrier
        first = in * thread / team, last = in * (thread + 1) / team;
        NAME(multiply)(down, down_scales, ids, count, hidden, 2 * width, outputs, 0, rows, 1, width, in, first, last);
        for (long row = 0; row < rows; row++) {
            const f32 weight = weights[row], *from = outputs + row * in + first;
            f32 *to = y + row / slots * in + first;
            FOR_EACH_VECTOR(last - first, store_f32(to + i, load_f32(to + i, n) + weight * load_f32(from + i, n), n););
        }
    }
}

#ifndef ONLY_MATRICES

/* ---- SwiGLU: gate and up side by side in a row (n, 2I), their product (n, I) ----

   Where rows have weights, the first `weighted` do; the others' output and gradients are zeros. */

INLINE void NAME(swiglu_row)(const T *gate, const T *up, f32 weight, T *out, long width) {
    FOR_EACH_VECTOR(width, {
        const vec g = LOAD(gate + i, n);
        STORE(out + i, weight * g * sigmoid(g) * LOAD(up + i, n), n);
    });
}

/* Overwrites `grad` with the output, which backward needs too, and returns the weight's gradient. */
INLINE f32 NAME(swiglu_row_backward)(const T *gate, const T *up, f32 weight, T *grad, T *grad_gate, T *grad_up,
                                     long width) {
    vec total = zero;
    FOR_EACH_VECTOR(width, {
        const vec g = LOAD(gate + i, n), u = LOAD(up + i, n), grad_out = LOAD(grad + i, n);
        const vec s = sigmoid(g), silu = g * s, grad_product = weight * grad_out;
        total += grad_out * silu * u;
        STORE(grad_gate + i, grad_product * u * (s + silu * (1 - s)), n);
        STORE(grad_up + i, grad_product * silu, n);
        STORE(grad + i, weight * silu * u, n);
    });
    return sum(total);
}

void NAME(swiglu)(const T *gate_up, const f32 *weights, T *out, long rows, long weighted, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * width;
        T *to = out + row * width;
        if (row < weighted)
            NAME(swiglu_row)(gate, gate + width, weights ? weights[row] : 1, to, width);
        else
            memset(to, 0, width * sizeof *to);
    }
}

void NAME(swiglu_backward)(const T *gate_up, const f32 *weights, T *grad, T *grad_gate_up, f32 *grad_weights, long rows,
                           long weighted, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * width, *up = gate + width;
        T *out = grad + row * width, *to = grad_gate_up + row * 2 * width;
        if (row < weighted)
            grad_weights[row] = NAME(swiglu_row_backward)(gate, up, weights[row], out, to, to + width, width);
        else {
            memset(out, 0, width * sizeof *out);
            memset(to, 0, 2 * width * sizeof *to);
        }
    }
}

/* ---- rows of tokens, and tokens from rows ---- */

/* out[r] = from[ids[r]] */
void NAME(gather_rows)(const T *from, const int64_t *ids, T *out, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        if (row + AHEAD < rows) fetch(from + ids[row + AHEAD] * width, width * sizeof *from);
        memcpy(out + row * width, from + ids[row] * width, width * sizeof *out);
    }
}

/* out[t] = the sum over s of rows[places[t][s]], rounded once */
void NAME(sum_slots)(const T *rows, const int64_t *places, T *out, long tokens, long slots, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long token = 0; token < tokens; token++) {
        if (token + 1 < tokens)
            for (long slot = (token + 1) * slots; slot < (token + 2) * slots; slot++)
                fetch(rows + places[slot] * width, width * sizeof *rows);
        FOR_EACH_VECTOR(width, {
            vec total = zero;
            for (long slot = token * slots; slot < (token + 1) * slots; slot++)
                total += LOAD(rows + places[slot] * width + i, n);
            STORE(out + token * width + i, total, n);
        });
    }
}

/* ---- RMS norm, from float32 to T ---- */

void NAME(rms_norm)(const f32 *x, const f32 *weight, T *y, f32 eps, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) NAME(norm_row)(x + row * width, weight, y + row * width, eps, width);
}

/* grad_weights (threads, width), zeros before, are each thread's part of the weight's gradient. */
void NAME(rms_norm_backward)(const f32 *x, const f32 *weight, const T *grad, f32 *grad_x, f32 *grad_weights, f32 eps,
                             long rows, long width, int threads) {
#pragma omp parallel num_threads(threads)
    {
        f32 *grad_weight = grad_weights + omp_get_thread_num() * width;
#pragma omp for
        for (long row = 0; row < rows; row++) {
            const f32 *from = x + row * width, inverse = inverse_rms_f32(from, width, eps);
            const T *g = grad + row * width;
            f32 *to = grad_x + row * width;
            vec total = zero;
            FOR_EACH_VECTOR(width, {
                const vec product = LOAD(g + i, n) * load_f32(from + i, n) * inverse;
                total += product * load_f32(weight + i, n);
                store_f32(grad_weight + i, load_f32(grad_weight + i, n) + product, n);
            });
            const f32 mean = sum(total) / width;
            FOR_EACH_VECTOR(width, {
                const vec unit = load_f32(from + i, n) * inverse;
                store_f32(to + i, inverse * (LOAD(g + i, n) * load_f32(weight + i, n) - unit * mean), n);
            });
        }
    }
}

/* ---- heads of attention: norm and rotation, from the order of the projections to that of the products ----

   A token of qkv has R heads of queries for each of K key heads, K of keys and K of values, d numbers each. For C rows
   of `length` tokens q is (C, K, length, R, d), k and v are (C, K, length, d). Pairs (x_i, x_{i+d/2}) are turned by the
   token's angles; cos and sin have d numbers a token. */

void NAME(heads)(const T *qkv, const f32 *gains, const f32 *cos, const f32 *sin, T *q, T *k, T *v, f32 eps, long tokens,
                 long length, long kv_heads, long group, long d, int threads) {
    const long query_heads = kv_heads * group, half = d / 2;
#pragma omp parallel for num_threads(threads)
    for (long token = 0; token < tokens; token++) {
        const long row = token / length * kv_heads * length + token % length; /* in the first of its K heads */
        const f32 *c = cos + token * d, *s = sin + token * d;
        for (long head = 0; head < query_heads + 2 * kv_heads; head++) {
            const T *from = qkv + (token * (query_heads + 2 * kv_heads) + head) * d;
            if (head >= query_heads + kv_heads) {
                memcpy(v + (row + (head - query_heads - kv_heads) * length) * d, from, d * sizeof *from);
                continue;
            }
            T *to = head < query_heads ? q + ((row + head / group * length) * group + head % group) * d
                                       : k + (row + (head - query_heads) * length) * d;
            const f32 *gain = gains + head * d, inverse = NAME(inverse_rms)(from, d, eps);
            FOR_EACH_VECTOR(half, {
                const vec a = inverse * LOAD(from + i, n) * load_f32(gain + i, n);
                const vec b = inverse * LOAD(from + half + i, n) * load_f32(gain + half + i, n);
                STORE(to + i, a * load_f32(c + i, n) - b * load_f32(s + i, n), n);
                STORE(to + half + i, b * load_f32(c + half + i, n) + a * load_f32(s + half + i, n), n);
            });
        }
    }
}

/* grad_gains (threads, H + K, d), zeros before, are each thread's part of the gains' gradient. */
void NAME(heads_backward)(const T *qkv, const f32 *gains, const f32 *cos, const f32 *sin, const T *grad_q,
                          const f32 *grad_k, const f32 *grad_v, T *grad_qkv, f32 *grad_gains, f32 eps, long tokens,
                          long length, long kv_heads, long group, long d, int threads) {
    const long query_heads = kv_heads * group, normed = query_heads + kv_heads, half = d / 2;
#pragma omp parallel num_threads(threads)
    {
        f32 turned[d], *grad_gain = grad_gains + omp_get_thread_num() * normed * d;
#pragma omp for
        for (long token = 0; token < tokens; token++) {
            const long row = token / length * kv_heads * length + token % length;
            const f32 *c = cos + token * d, *s = sin + token * d;
            for (long head = 0; head < normed + kv_heads; head++) {
                const T *x = qkv + (token * (normed + kv_heads) + head) * d;
                T *to = grad_qkv + (x - qkv);
                if (head >= normed) {
                    const f32 *from = grad_v + (row + (head - normed) * length) * d;
                    FOR_EACH_VECTOR(d, STORE(to + i, load_f32(from + i, n), n););
                    continue;
                }
                const T *from_q = grad_q + ((row + head / group * length) * group + head % group) * d;
                const f32 *from_k = grad_k + (row + (head - query_heads) * length) * d;
                const f32 *gain = gains + head * d, inverse = NAME(inverse_rms)(x, d, eps);
                FOR_EACH_VECTOR(half, { /* turn back */
                    const vec a = head < query_heads ? LOAD(from_q + i, n) : load_f32(from_k + i, n);
                    const vec b = head < query_heads ? LOAD(from_q + half + i, n) : load_f32(from_k + half + i, n);
                    store_f32(turned + i, a * load_f32(c + i, n) + b * load_f32(s + i, n), n);
                    store_f32(turned + half + i, b * load_f32(c + half + i, n) - a * load_f32(s + half + i, n), n);
                });
                vec total = zero;
                FOR_EACH_VECTOR(d, {
                    const vec product = load_f32(turned + i, n) * LOAD(x + i, n) * inverse;
                    f32 *sums = grad_gain + head * d + i;
                    total += product * load_f32(gain + i, n);
                    store_f32(sums, load_f32(sums, n) + product, n);
                });
                const f32 mean = sum(total) / d;
                FOR_EACH_VECTOR(d, {
                    const vec unit = LOAD(x + i, n) * inverse;
                    STORE(to + i, inverse * (load_f32(turned + i, n) * load_f32(gain + i, n) - unit * mean), n);
                });
            }
        }
    }
}

/* ---- attention of one query a head, over all positions of a cache ----

   q and out are (sequences, group, d), keys and values (sequences, capacity, d) of which `length` are used; sequences
   begin `stride` numbers apart, and `kv_heads` of them share a row of bias (length), if there is any. `scores`
   (sequences, group, length) is for what is made on the way. */

void NAME(attend)(const T *q, const T *keys, const T *values, const f32 *bias, f32 scale, f32 *scores, T *out,
                  long sequences, long kv_heads, long group, long length, long stride, long d, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long sequence = 0; sequence < sequences; sequence++) {
        const T *k = keys + sequence * stride, *v = values + sequence * stride;
        for (long head = sequence * group; head < (sequence + 1) * group; head++) {
            f32 *weights = scores + head * length, largest = -__builtin_inff();
            for (long at = 0; at < length; at++) {
                vec product = zero;
                FOR_EACH_VECTOR(d, product += LOAD(q + head * d + i, n) * LOAD(k + at * d + i, n););
                weights[at] = scale * sum(product) + (bias ? bias[sequence / kv_heads * length + at] : 0);
                largest = weights[at] > largest ? weights[at] : largest;
            }
            vec totals = zero;
            FOR_EACH_VECTOR(length, {
                const vec e = exponential(load_f32(weights + i, n) - largest);
                store_f32(weights + i, e, n);
                for (long lane = 0; lane < n; lane++) totals[lane] += e[lane];
            });
            const f32 inverse = 1 / sum(totals);
            FOR_EACH_VECTOR(d, {
                vec total = zero;
                for (long at = 0; at < length; at++) total += weights[at] * LOAD(v + at * d + i, n);
                STORE(out + head * d + i, inverse * total, n);
            });
        }
    }
}

/* sums[r][v] += the sum over k of a[r][k * stride] . b[k * b_stride + v * LANES ...], `height` rows, `width` vectors */
INLINE void NAME(add_tile)(vec sums[TALL][2], const word **a, long stride, const word *b, long b_stride, long count,
                           const int height, const int width) {
    for (long k = 0; k < count; k++) {
        words right[2];
#pragma GCC unroll 2
        for (int v = 0; v < width; v++) memcpy(&right[v], b + k * b_stride + v * LANES, sizeof right[v]);
#pragma GCC unroll 12
        for (int r = 0; r < height; r++) {
            const words left = (words){0} + a[r][k * stride];
#pragma GCC unroll 2
            for (int v = 0; v < width; v++) sums[r][v] = NAME(add_products)(sums[r][v], left, right[v]);
        }
    }
}

/* ---- experts of many tokens ----

   Weights and their gradients are float32. An expert's rows are those from the end of the last one's to ends[e]; row r
   is a copy of token ids[r]. Each thread makes its share of the columns, a panel of WIDE at a time, for which it packs
   what the rows are multiplied with; an expert's steps wait for each other. */

/* WIDE columns of the rows x[ids[k]], or x[k], of float32 or T by the `size` of a number; zeros behind the last row */
INLINE void NAME(pack_panel)(const void *x, long size, long stride, const int64_t *ids, long rows, word *panel) {
    const long ahead = 4 * AHEAD; /* rows of which little is read are soon done */
    for (long k = 0; k < rows; k += PER_WORD, panel += WIDE) {
        const void *from[2] = {NULL, NULL};
        for (long i = k; i < k + PER_WORD && i < rows; i++) {
            from[i - k] = x + (ids ? ids[i] : i) * stride * size;
            if (i + ahead < rows) fetch(x + (ids ? ids[i + ahead] : i + ahead) * stride * size, WIDE * size);
        }
        for (long j = 0; j < WIDE; j += LANES) {
            words packed;
            if (size == sizeof(f32)) {
                const vec second = from[1] ? load_f32((const f32 *)from[1] + j, LANES) : zero;
                packed = NAME(pack)(load_f32((const f32 *)from[0] + j, LANES), second);
            } else { /* as they are */
                halves first, second = {0};
                memcpy(&first, (const bf16 *)from[0] + j, sizeof first);
                if (from[1]) memcpy(&second, (const bf16 *)from[1] + j, sizeof second);
                packed = widen(first) | widen(second) << 16;
            }
            memcpy(panel + j, &packed, sizeof packed);
        }
    }
}

/* WIDE rows of w (out, in), as columns */
ONCE void NAME(pack_rows)(const f32 *w, long in, word *panel) {
    for (long o = 0; o < WIDE; o++)
        for (long k = 0; k < in; k += WIDE) {
            T row[WIDE];
            for (long i = 0; i < WIDE; i += LANES) STORE(row + i, load_f32(w + o * in + k + i, LANES), LANES);
            for (long i = 0; i < WIDE; i += PER_WORD)
                memcpy(panel + (k + i) / PER_WORD * WIDE + o, row + i, sizeof *panel);
        }
}

/* to[r] = from[r] times the panel; `next` are the rows of the tile that follows, read ahead: they may lie anywhere */
INLINE void NAME(rows_tile)(const word **from, const word **next, const word *panel, long count, T **to, slices *ahead,
                            const int height) {
    vec sums[TALL][2] = {0};
    for (long k = 0; k < count; k += LANES) {
        fetch_some(ahead);
        const word *at[TALL];
        for (int r = 0; r < height; r++) {
            at[r] = from[r] + k;
            __builtin_prefetch(next[r] + k, 0, 2); /* not into the first cache, which the panel is in */
        }
        NAME(add_tile)(sums, at, 1, panel + k * WIDE, WIDE, LANES, height, 2);
    }
#pragma GCC unroll 12
    for (int r = 0; r < height; r++)
        for (int v = 0; v < 2; v++) STORE(to[r] + v * LANES, sums[r][v], LANES);
}

/* out[r] = x[ids[r]], or x[r], times the panel; `ahead` are the weights of the panel that follows */
ONCE void NAME(multiply_panel)(const T *x, const int64_t *ids, long in, const word *panel, T *out, long stride,
                               long rows, slices ahead) {
    const long steps = (rows + TALL - 1) / TALL * (in / PER_WORD / LANES);
    ahead.at_once = steps ? (in + steps - 1) / steps : 0;
    for (long row = 0; row < rows; row += TALL) {
        const word *from[TALL], *next[TALL];
        T *to[TALL];
        for (long r = 0; r < TALL; r++) { /* the last row more than once */
            const long at = least(row + r, rows - 1), after = least(row + TALL + r, rows - 1);
            from[r] = (const word *)(x + (ids ? ids[at] : at) * in);
            next[r] = (const word *)(x + (ids ? ids[after] : after) * in);
            to[r] = out + at * stride;
        }
        if (rows - row > 8)
            NAME(rows_tile)(from, next, panel, in / PER_WORD, to, &ahead, TALL);
        else if (rows - row > 4)
            NAME(rows_tile)(from, next, panel, in / PER_WORD, to, &ahead, 8);
        else
            NAME(rows_tile)(from, next, panel, in / PER_WORD, to, &ahead, 4);
    }
}

/* out = the columns from[k][0 to height] . those of the panel, or that more; `count` words each */
INLINE void NAME(columns_tile)(const word *from, const word *panel, long count, int add, f32 *out, long stride,
                               const int height) {
    vec sums[TALL][2] = {0};
    const word *columns[TALL];
    for (int r = 0; r < height; r++) columns[r] = from + r;
    if (add)
        for (int r = 0; r < height; r++) fetch(out + r * stride, WIDE * sizeof *out);
    NAME(add_tile)(sums, columns, WIDE, panel, WIDE, count, height, 2);
#pragma GCC unroll 12
    for (int r = 0; r < height; r++)
        for (int v = 0; v < 2; v++) {
            f32 *at = out + r * stride + v * LANES;
            store_f32(at, add ? sums[r][v] + load_f32(at, LANES) : sums[r][v], LANES);
        }
}

/* out[i][j], or what is added to it, = column i of `a` . column j of `b`, both packed, for all i and j from `first` to
   `last`. Of `a` so much at a time that it stays in a core's cache. */
ONCE void NAME(multiply_columns)(const word *a, long columns, const word *b, long first, long last, long count, int add,
                                 f32 *out, long stride) {
    const long some = 16 * WIDE;
    for (long start = 0; start < columns; start += some)
        for (long j = first; j < last; j += WIDE)
            for (long i = start; i < columns && i < start + some; i += WIDE) {
                const word *from = a + i * count, *panel = b + j * count;
                f32 *to = out + i * stride + j;
                NAME(columns_tile)(from, panel, count, add, to, stride, 12);
                NAME(columns_tile)(from + 12, panel, count, add, to + 12 * stride, stride, 12);
                NAME(columns_tile)(from + 24, panel, count, add, to + 24 * stride, stride, 8);
            }
}

/* hidden (rows, 2 * width) = gate_up[e] x, out = down[e] (weight * swiglu of it). `activated` has room for the largest
   expert's, `panels` for each thread's. */
void NAME(grouped_swiglu)(const T *tokens, const int64_t *ids, const f32 *weights, const f32 *gate_up, const f32 *down,
                          const int64_t *ends, T *hidden, T *out, T *activated, word *panels, long panel_size,
                          long experts, long in, long width, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
        const long first = share(width, thread, team), last = share(width, thread + 1, team);
        word *panel = panels + thread * panel_size;
        for (long e = 0, start = 0; e < experts; start = ends[e++]) {
            const long rows = ends[e] - start;
            T *h = hidden + start * 2 * width;
            for (long part = 0; part <= width; part += width)
                for (long j = part + first; j < part + last; j += WIDE) {
                    const f32 *w = gate_up + (e * 2 * width + j) * in;
                    NAME(pack_rows)(w, in, panel);
                    NAME(multiply_panel)(tokens, ids + start, in, panel, h + j, 2 * width, rows,
                                         (slices){w + WIDE * in, WIDE});
                }
            for (long row = 0; row < rows; row++) {
                const T *gate = h + row * 2 * width + first;
                T *to = activated + row * width + first;
                NAME(swiglu_row)(gate, gate + width, weights[start + row], to, last - first);
            }
#pragma omp barrier
            for (long j = share(in, thread, team); j < share(in, thread + 1, team); j += WIDE) {
                const f32 *w = down + (e * in + j) * width;
                NAME(pack_rows)(w, width, panel);
                NAME(multiply_panel)(activated, NULL, width, panel, out + start * in + j, in, rows,
                                     (slices){w + WIDE * width, WIDE});
            }
#pragma omp barrier
        }
    }
}

/* An expert's rows come in blocks of at most `most`, an even number, whose gradients of gate_up and down are added to
   those of the blocks before. `buffers` are a block's: see the sizes below. grad_weights (threads, all rows) are each
   thread's part. */
void NAME(grouped_swiglu_backward)(const T *tokens, const int64_t *ids, const f32 *weights, const f32 *gate_up,
                                   const f32 *down, const int64_t *ends, const T *hidden, const T *grad_out,
                                   T *grad_rows, f32 *grad_weights, f32 *grad_gate_up, f32 *grad_down, T *buffers,
                                   word *panels, long panel_size, long experts, long most, long in, long width,
                                   int threads) {
    const long all = ends[experts - 1];
#pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
        const long first = share(width, thread, team), last = share(width, thread + 1, team);
        const long first_in = share(in, thread, team), last_in = share(in, thread + 1, team);
        word *panel = panels + thread * panel_size;
        for (long e = 0, start = 0; e < experts;) {
            const int add = start > (e ? ends[e - 1] : 0);
            const long rows = least(ends[e] - start, most), count = (rows + PER_WORD - 1) / PER_WORD;
            const f32 *w_gate_up = gate_up + e * 2 * width * in, *w_down = down + e * in * width;
            const T *h = hidden + start * 2 * width, *grad = grad_out + start * in;
            T *act = buffers, *grad_h = act + most * width;
            word *packed_h = (word *)(grad_h + most * 2 * width), *packed_grad = packed_h + count * 2 * width;
            word *packed_act = packed_grad + count * in, *packed_tokens = packed_act + count * width;
            for (long j = first; j < last; j += WIDE) { /* gradients of the activations, which take their place */
                NAME(pack_panel)(w_down + j, sizeof(f32), width, NULL, in, panel);
                NAME(multiply_panel)(grad, NULL, in, panel, act + j, width, rows, (slices){w_down + j + WIDE, width});
            }
            for (long row = 0; row < rows; row++) {
                const T *gate = h + row * 2 * width + first;
                T *to = grad_h + row * 2 * width + first;
                if (row + AHEAD < rows)
                    for (long part = 0; part <= width; part += width)
                        fetch(gate + AHEAD * 2 * width + part, (last - first) * sizeof *gate);
                grad_weights[thread * all + start + row] = NAME(swiglu_row_backward)(
                    gate, gate + width, weights[start + row], act + row * width + first, to, to + width, last - first);
            }
            for (long j = first; j < last; j += WIDE) {
                NAME(pack_panel)(grad_h + j, sizeof(T), 2 * width, NULL, rows, packed_h + j * count);
                NAME(pack_panel)(grad_h + width + j, sizeof(T), 2 * width, NULL, rows, packed_h + (width + j) * count);
                NAME(pack_panel)(act + j, sizeof(T), width, NULL, rows, packed_act + j * count);
            }
            for (long j = first_in; j < last_in; j += WIDE) {
                NAME(pack_panel)(grad + j, sizeof(T), in, NULL, rows, packed_grad + j * count);
                NAME(pack_panel)(tokens + j, sizeof(T), in, ids + start, rows, packed_tokens + j * count);
            }
#pragma omp barrier
            NAME(multiply_columns)(packed_grad, in, packed_act, first, last, count, add, grad_down + e * in * width,
                                   width);
            NAME(multiply_columns)(packed_h, 2 * width, packed_tokens, first_in, last_in, count, add,
                                   grad_gate_up + e * 2 * width * in, in);
            for (long j = first_in; j < last_in; j += WIDE) {
                NAME(pack_panel)(w_gate_up + j, sizeof(f32), in, NULL, 2 * width, panel);
                NAME(multiply_panel)(grad_h, NULL, 2 * width, panel, grad_rows + start * in + j, in, rows,
                                     (slices){w_gate_up + j + WIDE, in});
            }
#pragma omp barrier
            start += rows;
            if (start == ends[e]) e++;
        }
    }
}

#endif
#endif
