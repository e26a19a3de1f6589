/* Newton-Schulz iterations in bfloat16, for Muon.

   Matrices have multiples of 4 rows and of LANES columns. Of symmetric ones only the lower triangle is made, in squares
   of WIDE. */

#include "tiles.h"

/* x (rows, n) in words; `lower` means that it is symmetric and only its lower triangle there. */
ONCE void pack_matrix(const bf16 *x, word *packed, long rows, long n, int lower) {
    for (long row = 0; row < rows; row += 2) {
        word *to = packed + row / 2 * n;
        const long square_end = (row / WIDE + 1) * WIDE, known = lower && square_end < n ? square_end : n;
        for (long j = 0; j < known; j += LANES) {
            halves first, second;
            memcpy(&first, x + row * n + j, sizeof first);
            memcpy(&second, x + row * n + n + j, sizeof second);
            const words pairs = pack(first, second);
            memcpy(to + j, &pairs, sizeof pairs);
        }
        for (long j = known; j < n; j++) memcpy(to + j, x + j * n + row, sizeof *to); /* its mirror image */
    }
}

/* alpha * a b + beta * added, of `pairs` pairs of rows of b (n columns). a(i, k) is i steps and k strides from a. */
struct Matmul {
    const word *a;
    long step, stride;
    const word *b;
    long pairs;
    f32 alpha, beta;
    const bf16 *added;
    bf16 *out;
    long n;
};

/* `height` rows from i and `width` vectors from j of it */
template <int height, int width> INLINE void tile(const Matmul &m, long i, long j) {
    vec sums[TALL][2] = {};
    const word *rows[TALL];
    for (int r = 0; r < height; r++) rows[r] = m.a + (i + r) * m.step;
    add_tile<bf16, height, width>(sums, rows, m.stride, m.b + j, m.n, m.pairs);
#pragma GCC unroll 12
    for (int r = 0; r < height; r++)
#pragma GCC unroll 2
        for (int v = 0; v < width; v++) {
            const long at = (i + r) * m.n + j + v * LANES;
            const vec more = m.added ? m.beta * load(m.added + at, LANES) : zero;
            store(m.out + at, m.alpha * sums[r][v] + more, LANES);
        }
}

/* All of its rows; of a symmetric one the lower triangle. */
ONCE void multiply_pairs(const Matmul &given, long rows, int lower) {
    const Matmul m = given;
    for (long j = 0; j < m.n; j += WIDE) {
        long i = lower ? j : 0;
        if (j + WIDE <= m.n) {
            for (; i + 12 <= rows; i += 12) tile<12, 2>(m, i, j);
            for (; i < rows; i += 4) tile<4, 2>(m, i, j);
        } else
            for (; i < rows; i += 4) tile<4, 1>(m, i, j);
    }
}

/* Of each x (height, width), in bfloat16: x / |x|, and `steps` times x (a + b x^T x + c (x^T x)^2). */
template <class T>
void newton_schulz(const T *matrices, T *out, f32 a, f32 b, f32 c, long steps, long count, long height,
                          long width, int threads) {
    const long rows = (height + 3) / 4 * 4, columns = (width + LANES - 1) / LANES * LANES; /* the rest is zeros */
    const long size = rows * columns, square = columns * columns;
#pragma omp parallel num_threads(threads)
    {
        const Buffer<bf16> room(2 * size + 2 * square + (rows > columns ? size : square));
        bf16 *x = room, *next = x + size, *gram = next + size, *poly = gram + square;
        word *packed = (word *)(poly + square);
#pragma omp for
        for (long matrix = 0; matrix < count; matrix++) {
            const bf16 *given = matrices + matrix * height * width;
            bf16 *result = out + matrix * height * width;
            vec squares = zero;
            FOR_EACH_VECTOR(height * width, {
                const vec y = load(given + i, n);
                squares += y * y;
            });
            const f32 inverse = 1 / (__builtin_sqrtf(sum(squares)) + 1e-7f);
            memset(x, 0, size * sizeof *x);
            for (long row = 0; row < height; row++)
                FOR_EACH_VECTOR(width, {
                    const vec y = load(given + row * width + i, n);
                    store(x + row * columns + i, inverse * y, n);
                });
            for (long step = 0; step < steps; step++) {
                pack_matrix(x, packed, rows, columns, 0);
                multiply_pairs({packed, 1, columns, packed, rows / 2, 1, 0, nullptr, gram, columns}, columns, 1);
                pack_matrix(gram, packed, columns, columns, 1);
                multiply_pairs({packed, 1, columns, packed, columns / 2, c, b, gram, poly, columns}, columns, 1);
                pack_matrix(poly, packed, columns, columns, 1);
                multiply_pairs({(word *)x, columns / 2, 1, packed, columns / 2, 1, a, x, next, columns}, rows, 0);
                bf16 *swap = x;
                x = next;
                next = swap;
            }
            for (long row = 0; row < height; row++) memcpy(result + row * width, x + row * columns, width * sizeof *x);
        }
    }
}
EXPORT(newton_schulz, bf16)
