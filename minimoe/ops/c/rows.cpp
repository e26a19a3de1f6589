/* Rows of tokens: gathered, summed, and SwiGLU of each. */

#include "vec.h"

/* ---- SwiGLU: gate and up side by side in a row (n, 2I), the output (n, I) ----

   Where rows have weights, the first `weighted` do; the others' output and gradients are zeros. */

template <class T>
void swiglu(const T *gate_up, const f32 *weights, T *out, long rows, long weighted, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * width;
        T *to = out + row * width;
        if (row < weighted)
            swiglu_row(gate, gate + width, weights ? weights[row] : 1, to, width);
        else
            memset(to, 0, width * sizeof *to);
    }
}
EXPORT(swiglu, f32)
EXPORT(swiglu, bf16)

template <class T>
void swiglu_backward(const T *gate_up, const f32 *weights, const T *grad, T *activated, T *grad_gate_up,
                     f32 *grad_weights, long rows, long weighted, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * width, *up = gate + width;
        T *out = activated + row * width, *to = grad_gate_up + row * 2 * width;
        if (row < weighted)
            grad_weights[row] =
                swiglu_row_backward(gate, up, weights[row], grad + row * width, out, to, to + width, width);
        else {
            memset(out, 0, width * sizeof *out);
            memset(to, 0, 2 * width * sizeof *to);
        }
    }
}
EXPORT(swiglu_backward, f32)
EXPORT(swiglu_backward, bf16)

/* ---- rows of tokens, and tokens from rows ---- */

/* out[r] = from[ids[r]] */
template <class T>
void gather_rows(const T *from, const int64_t *ids, T *out, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        if (row + AHEAD < rows) fetch(from + ids[row + AHEAD] * width, width * sizeof *from);
        memcpy(out + row * width, from + ids[row] * width, width * sizeof *out);
    }
}
EXPORT(gather_rows, f32)
EXPORT(gather_rows, bf16)

/* out[t] = the sum over s of rows[places[t][s]], rounded once */
template <class T>
void sum_slots(const T *rows, const int64_t *places, T *out, long tokens, long slots, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long token = 0; token < tokens; token++) {
        if (token + 1 < tokens)
            for (long slot = (token + 1) * slots; slot < (token + 2) * slots; slot++)
                fetch(rows + places[slot] * width, width * sizeof *rows);
        FOR_EACH_VECTOR(width, {
            vec total = zero;
            for (long slot = token * slots; slot < (token + 1) * slots; slot++)
                total += load(rows + places[slot] * width + i, n);
            store(out + token * width + i, total, n);
        });
    }
}
EXPORT(sum_slots, f32)
EXPORT(sum_slots, bf16)
