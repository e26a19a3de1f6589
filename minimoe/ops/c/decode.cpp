/* Few rows times large matrices, as fast as memory is read; and attention of one query a head. For decoding. */

#include "vec.h"

/* A row to be multiplied, where its result goes, and what is added to that, if anything. */
struct Row {
    const f32 *from, *added;
    f32 *to;
};

/* to[o] = scale * (w . from) + added[o] for `count` rows, whose sums stay in registers: `parts` of each, so that an
   addition need not wait for the one before. */
template <int count, int parts, class T>
INLINE void dots(const T *w, const Row *rows, long o, long in, f32 scale) {
    vec sums[8][4] = {};
    const long even = in / (parts * LANES) * (parts * LANES);
    for (long at = 0; at < even; at += parts * LANES)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) {
            const vec weights = load(w + at + part * LANES, LANES);
#pragma GCC unroll 8
            for (int r = 0; r < count; r++) sums[r][part] += weights * load(rows[r].from + at + part * LANES, LANES);
        }
    FOR_EACH_VECTOR(in - even, {
        const vec weights = load(w + even + i, n);
        for (int r = 0; r < count; r++) sums[r][0] += weights * load(rows[r].from + even + i, n);
    });
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) {
        vec total = sums[r][0];
#pragma GCC unroll 4
        for (int part = 1; part < parts; part++) total += sums[r][part];
        rows[r].to[o] = scale * sum(total) + (rows[r].added ? rows[r].added[o] : 0);
    }
}

/* The outputs first <= o < last of all rows. The matrix (out, in) is read once. */
template <class T>
ONCE void multiply(const T *matrix, const f32 *scales, const Row *rows, long count, long in, long first, long last) {
    for (long o = first; count && o < last; o++) {
        const T *w = matrix + o * in;
        const f32 scale = scales ? scales[o] : 1;
        long r = 0;
        for (; r + 8 <= count; r += 8) dots<8, 2>(w, rows + r, o, in, scale);
        for (; r + 4 <= count; r += 4) dots<4, 2>(w, rows + r, o, in, scale);
        for (; r + 2 <= count; r += 2) dots<2, 4>(w, rows + r, o, in, scale);
        if (r < count) dots<1, 4>(w, rows + r, o, in, scale);
    }
}

/* y (rows, out) = matrix (out, in) @ x (rows, in), plus `add`, if there is any. With norm_weight it is the RMS norm of x
   that is multiplied. */
template <class T>
void linear_few(const T *matrix, const f32 *scales, const f32 *x, const f32 *norm_weight, const f32 *add, f32 *y,
                f32 eps, long rows, long in, long out, int threads) {
    const Buffer<f32> normed(norm_weight ? rows * in : 0);
    const Buffer<Row> list(rows);
    for (long row = 0; row < rows; row++)
        list[row] = {(norm_weight ? normed : x) + row * in, add ? add + row * out : nullptr, y + row * out};
#pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
        if (norm_weight) {
#pragma omp for
            for (long row = 0; row < rows; row++) norm_row(x + row * in, norm_weight, normed + row * in, eps, in);
        }
        multiply(matrix, scales, list, rows, in, out * thread / team, out * (thread + 1) / team);
    }
}
EXPORT(linear_few, f32)
EXPORT(linear_few, bf16)
EXPORT(linear_few, i8)

/* y[n] = matrices[ids[n]] (out, in) @ x[n / copies], its outputs from `first` to `last`. Rows of x begin `stride` values
   apart. Each matrix is read once for all of its rows, which are listed in `list`. */
template <class T>
INLINE void multiply_chosen(const T *matrices, const f32 *scales, const int64_t *ids, long count, const f32 *x,
                            long stride, long copies, f32 *y, long rows, long in, long out, long first, long last,
                            Row *list) {
    for (long m = 0; m < count; m++) {
        long size = 0;
        for (long n = 0; n < rows; n++)
            if (ids[n] == m) list[size++] = {x + n / copies * stride, nullptr, y + n * out};
        multiply(matrices + m * out * in, scales ? scales + m * out : nullptr, list, size, in, first, last);
    }
}

/* y[t] = the sum over its slots of weights[t][s] * (down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t]))), where e is
   ids[t][s]. */
template <class T>
void experts_few(const T *gate_up, const f32 *gate_up_scales, const T *down, const f32 *down_scales, const f32 *x,
                 const int64_t *ids, const f32 *weights, f32 *y, long experts, long tokens, long slots, long in,
                 long width, int threads) {
    const long rows = tokens * slots;
    const Buffer<f32> hidden(rows * 2 * width), outputs(rows * in);
#pragma omp parallel num_threads(threads)
    {
        const Buffer<Row> list(rows);
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
        long first = width * thread / team, last = width * (thread + 1) / team;
        for (long part = 0; part <= width; part += width)
            multiply_chosen(gate_up, gate_up_scales, ids, experts, x, in, slots, hidden, rows, in, 2 * width,
                            part + first, part + last, list);
        for (long row = 0; row < rows; row++) {
            f32 *gate = hidden + row * 2 * width + first;
            swiglu_row(gate, gate + width, 1, gate, last - first);
        }
#pragma omp barrier
        first = in * thread / team, last = in * (thread + 1) / team;
        multiply_chosen(down, down_scales, ids, experts, hidden, 2 * width, 1, outputs, rows, width, in, first, last,
                        list);
        for (long token = 0; token < tokens; token++)
            FOR_EACH_VECTOR(last - first, {
                vec total = zero;
                for (long row = token * slots; row < (token + 1) * slots; row++)
                    total += weights[row] * load(outputs + row * in + first + i, n);
                store(y + token * in + first + i, total, n);
            });
    }
}
EXPORT(experts_few, f32)
EXPORT(experts_few, bf16)
EXPORT(experts_few, i8)

/* ---- attention of one query a head, over all positions of a cache ----

   q and out are (sequences, group, d), keys and values (sequences, capacity, d) of which `length` are used; sequences
   begin `stride` values apart, and `kv_heads` of them share a row of bias (length), if there is any. */
template <class T>
void attend(const T *q, const T *keys, const T *values, const f32 *bias, T *out, f32 scale, long sequences,
            long kv_heads, long group, long length, long stride, long d, int threads) {
    const Buffer<f32> scores(sequences * group * length);
#pragma omp parallel for num_threads(threads)
    for (long sequence = 0; sequence < sequences; sequence++) {
        const T *k = keys + sequence * stride, *v = values + sequence * stride;
        for (long head = sequence * group; head < (sequence + 1) * group; head++) {
            f32 *weights = scores + head * length, largest = -__builtin_inff();
            for (long at = 0; at < length; at++) {
                vec product = zero;
                FOR_EACH_VECTOR(d, product += load(q + head * d + i, n) * load(k + at * d + i, n););
                weights[at] = scale * sum(product) + (bias ? bias[sequence / kv_heads * length + at] : 0);
                largest = weights[at] > largest ? weights[at] : largest;
            }
            vec totals = zero;
            FOR_EACH_VECTOR(length, {
                const vec e = exponential(load(weights + i, n) - largest);
                store(weights + i, e, n);
                for (long lane = 0; lane < n; lane++) totals[lane] += e[lane];
            });
            const f32 inverse = 1 / sum(totals);
            FOR_EACH_VECTOR(d, {
                vec total = zero;
                for (long at = 0; at < length; at++) total += weights[at] * load(v + at * d + i, n);
                store(out + head * d + i, inverse * total, n);
            });
        }
    }
}
EXPORT(attend, f32)
EXPORT(attend, bf16)
