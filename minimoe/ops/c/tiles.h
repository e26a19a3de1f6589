/* Tiles of a matmul, whose sums stay in registers; for the experts of training and for Newton-Schulz.

   A panel has words: each is an entry of float32, or two of bfloat16, which are the rows 2k and 2k + 1 of the matrix. */

#pragma once

#include "vec.h"

constexpr long TALL = 12;        /* rows of a tile */
constexpr long WIDE = 2 * LANES; /* columns */

/* Of two entries the lower half is the first. It may begin where a bfloat16 may. */
typedef uint32_t word __attribute__((may_alias, aligned(2)));

template <class T> constexpr long PER_WORD = sizeof(word) / sizeof(T);

/* c + a . b of each word */
template <class T> INLINE vec add_words(vec c, words a, words b) {
    if constexpr (PER_WORD<T> == 1) return c + (vec)a * (vec)b;
#ifdef __AVX512BF16__
    return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    return c + (vec)(a << 16) * (vec)(b << 16) + (vec)(a & 0xffff0000) * (vec)(b & 0xffff0000);
#endif
}

/* The words of two rows of bfloat16; of float32 they are the first row. */
INLINE words pack(halves a, halves b) { return widen(a) | widen(b) << 16; }

template <class T> INLINE words pack(vec a, vec b) {
    if constexpr (PER_WORD<T> == 1) return (words)a;
    halves low, high;
    store((bf16 *)&low, a, LANES);
    store((bf16 *)&high, b, LANES);
    return pack(low, high);
}

/* sums[r][v] += the sum over k of a[r][k * stride] . b[k * b_stride + v * LANES ...], `height` rows, `width` vectors */
template <class T, int height, int width>
INLINE void add_tile(vec (*sums)[2], const word *const *a, long stride, const word *b, long b_stride, long count) {
    for (long k = 0; k < count; k++) {
        words right[2];
#pragma GCC unroll 2
        for (int v = 0; v < width; v++) memcpy(&right[v], b + k * b_stride + v * LANES, sizeof right[v]);
#pragma GCC unroll 12
        for (int r = 0; r < height; r++) {
            const words left = words{} + a[r][k * stride];
#pragma GCC unroll 2
            for (int v = 0; v < width; v++) sums[r][v] = add_words<T>(sums[r][v], left, right[v]);
        }
    }
}
