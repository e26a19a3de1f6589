/* The experts of training: SwiGLU of many tokens' rows, which are sorted by expert.

   Weights and their gradients are float32. An expert's rows are those from the end of the last one's to ends[e]; row r
   is a copy of token ids[r]. Each thread makes its share of the columns, a panel of WIDE at a time, for which it packs
   what the rows are multiplied with; an expert's steps wait for each other. */

#include "tiles.h"

/* WIDE values here, WIDE after `stride`, and so on: a panel's, as they lie among the weights */
struct Slices {
    const f32 *at;
    long stride, at_once;
};

/* Have some of them read into a cache of this core, but not into the first, which the panel in use is in. */
INLINE void fetch_some(Slices *of) {
    for (long i = 0; i < of->at_once; i++, of->at += of->stride) {
        __builtin_prefetch(of->at, 0, 2);
        __builtin_prefetch(of->at + LANES, 0, 2);
    }
}

/* The first column of a thread's share. */
INLINE long share(long columns, long thread, long team) { return columns / WIDE * thread / team * WIDE; }

/* The words of LANES columns of two rows; there may be no second one. */
template <class T> INLINE words pack_columns(const f32 *first, const f32 *second) {
    return pack<T>(load(first, LANES), second ? load(second, LANES) : zero);
}

template <class T> INLINE words pack_columns(const bf16 *first, const bf16 *second) { /* as they are */
    halves a, b = {0};
    memcpy(&a, first, sizeof a);
    if (second) memcpy(&b, second, sizeof b);
    return pack(a, b);
}

/* WIDE columns of the rows x[ids[k]], or x[k], as words of T; zeros behind the last row */
template <class T, class V>
INLINE void pack_panel(const V *x, long stride, const int64_t *ids, long rows, word *panel) {
    const long ahead = 4 * AHEAD; /* rows of which little is read are soon done */
    for (long k = 0; k < rows; k += PER_WORD<T>, panel += WIDE) {
        const V *from[2] = {nullptr, nullptr};
        for (long i = k; i < k + PER_WORD<T> && i < rows; i++) {
            from[i - k] = x + (ids ? ids[i] : i) * stride;
            if (i + ahead < rows) fetch(x + (ids ? ids[i + ahead] : i + ahead) * stride, WIDE * sizeof *x);
        }
        for (long j = 0; j < WIDE; j += LANES) {
            const words packed = pack_columns<T>(from[0] + j, from[1] ? from[1] + j : nullptr);
            memcpy(panel + j, &packed, sizeof packed);
        }
    }
}

/* WIDE rows of w (out, in), as columns */
template <class T> ONCE void pack_rows(const f32 *w, long in, word *panel) {
    for (long o = 0; o < WIDE; o++)
        for (long k = 0; k < in; k += WIDE) {
            T row[WIDE];
            for (long i = 0; i < WIDE; i += LANES) store(row + i, load(w + o * in + k + i, LANES), LANES);
            for (long i = 0; i < WIDE; i += PER_WORD<T>)
                memcpy(panel + (k + i) / PER_WORD<T> * WIDE + o, row + i, sizeof *panel);
        }
}

/* to[r] = from[r] times the panel; `next` are the rows of the tile that follows, read ahead: they may lie anywhere */
template <int height, class T>
INLINE void rows_tile(const word **from, const word **next, const word *panel, long count, T **to, Slices *ahead) {
    vec sums[TALL][2] = {};
    for (long k = 0; k < count; k += LANES) {
        fetch_some(ahead);
        const word *at[TALL];
        for (int r = 0; r < height; r++) {
            at[r] = from[r] + k;
            __builtin_prefetch(next[r] + k, 0, 2); /* not into the first cache, which the panel is in */
        }
        add_tile<T, height, 2>(sums, at, 1, panel + k * WIDE, WIDE, LANES);
    }
#pragma GCC unroll 12
    for (int r = 0; r < height; r++)
        for (int v = 0; v < 2; v++) store(to[r] + v * LANES, sums[r][v], LANES);
}

/* out[r] = x[ids[r]], or x[r], times the panel; `ahead` are the weights of the panel that follows */
template <class T>
ONCE void multiply_panel(const T *x, const int64_t *ids, long in, const word *panel, T *out, long stride, long rows,
                         Slices ahead) {
    const long count = in / PER_WORD<T>, steps = (rows + TALL - 1) / TALL * (count / LANES);
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
            rows_tile<TALL>(from, next, panel, count, to, &ahead);
        else if (rows - row > 4)
            rows_tile<8>(from, next, panel, count, to, &ahead);
        else
            rows_tile<4>(from, next, panel, count, to, &ahead);
    }
}

/* out = the columns from[k][0 to height] . those of the panel, or that more; `count` words each */
template <class T, int height>
INLINE void columns_tile(const word *from, const word *panel, long count, int add, f32 *out, long stride) {
    vec sums[TALL][2] = {};
    const word *columns[TALL];
    for (int r = 0; r < height; r++) columns[r] = from + r;
    if (add)
        for (int r = 0; r < height; r++) fetch(out + r * stride, WIDE * sizeof *out);
    add_tile<T, height, 2>(sums, columns, WIDE, panel, WIDE, count);
#pragma GCC unroll 12
    for (int r = 0; r < height; r++)
        for (int v = 0; v < 2; v++) {
            f32 *at = out + r * stride + v * LANES;
            store(at, add ? sums[r][v] + load(at, LANES) : sums[r][v], LANES);
        }
}

/* out[i][j], or what is added to it, = column i of `a` . column j of `b`, both in panels, for all i and j from `first` to
   `last`. Of `a` so much at a time that it stays in a core's cache. */
template <class T>
ONCE void multiply_columns(const word *a, long columns, const word *b, long first, long last, long count, int add,
                           f32 *out, long stride) {
    const long some = 16 * WIDE;
    for (long start = 0; start < columns; start += some)
        for (long j = first; j < last; j += WIDE)
            for (long i = start; i < columns && i < start + some; i += WIDE) {
                const word *from = a + i * count, *panel = b + j * count;
                f32 *to = out + i * stride + j;
                columns_tile<T, 12>(from, panel, count, add, to, stride);
                columns_tile<T, 12>(from + 12, panel, count, add, to + 12 * stride, stride);
                columns_tile<T, 8>(from + 24, panel, count, add, to + 24 * stride, stride);
            }
}

INLINE long largest_group(const int64_t *ends, long experts) {
    long largest = 0;
    for (long e = 0, start = 0; e < experts; start = ends[e++])
        if (ends[e] - start > largest) largest = ends[e] - start;
    return largest;
}

/* hidden (rows, 2 * width) = gate_up[e] x, out = down[e] (weight * swiglu of it) */
template <class T>
void grouped_swiglu(const T *tokens, const int64_t *ids, const f32 *weights, const f32 *gate_up, const f32 *down,
                    const int64_t *ends, T *hidden, T *out, long experts, long in, long width, int threads) {
    const Buffer<T> activated(largest_group(ends, experts) * width);
#pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
        const long first = share(width, thread, team), last = share(width, thread + 1, team);
        const Buffer<T> panel_room((in > width ? in : width) * WIDE);
        word *panel = (word *)panel_room.at;
        for (long e = 0, start = 0; e < experts; start = ends[e++]) {
            const long rows = ends[e] - start;
            T *h = hidden + start * 2 * width;
            for (long part = 0; part <= width; part += width)
                for (long j = part + first; j < part + last; j += WIDE) {
                    const f32 *w = gate_up + (e * 2 * width + j) * in;
                    pack_rows<T>(w, in, panel);
                    multiply_panel(tokens, ids + start, in, panel, h + j, 2 * width, rows, {w + WIDE * in, WIDE, 0});
                }
            for (long row = 0; row < rows; row++) {
                const T *gate = h + row * 2 * width + first;
                swiglu_row(gate, gate + width, weights[start + row], activated + row * width + first, last - first);
            }
#pragma omp barrier
            for (long j = share(in, thread, team); j < share(in, thread + 1, team); j += WIDE) {
                const f32 *w = down + (e * in + j) * width;
                pack_rows<T>(w, width, panel);
                multiply_panel(activated.at, nullptr, width, panel, out + start * in + j, in, rows,
                               {w + WIDE * width, WIDE, 0});
            }
#pragma omp barrier
        }
    }
}
EXPORT(grouped_swiglu, f32)
EXPORT(grouped_swiglu, bf16)

constexpr long BLOCK = 1024; /* rows of an expert at a time, so that a cache holds what backward makes of them */

/* The gradients of gate_up and down of an expert's blocks are added up, block by block. */
template <class T>
void grouped_swiglu_backward(const T *tokens, const int64_t *ids, const f32 *weights, const f32 *gate_up,
                             const f32 *down, const int64_t *ends, const T *hidden, const T *grad_out, T *grad_rows,
                             f32 *grad_weights, f32 *grad_gate_up, f32 *grad_down, long experts, long in, long width,
                             int threads) {
    const long all = experts ? ends[experts - 1] : 0;
    const long most = least((largest_group(ends, experts) + 1) / 2 * 2, BLOCK);
    const Buffer<T> room(most * (6 * width + 2 * in));
    const Buffer<f32> parts(threads * all); /* of grad_weights, each thread's */
    memset(parts, 0, threads * all * sizeof(f32));
#pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), team = omp_get_num_threads();
        const long first = share(width, thread, team), last = share(width, thread + 1, team);
        const long first_in = share(in, thread, team), last_in = share(in, thread + 1, team);
        const Buffer<T> panel_room((in > 2 * width ? in : 2 * width) * WIDE);
        word *panel = (word *)panel_room.at;
        for (long e = 0, start = 0; e < experts;) {
            const int add = start > (e ? ends[e - 1] : 0);
            const long rows = least(ends[e] - start, BLOCK), count = (rows + PER_WORD<T> - 1) / PER_WORD<T>;
            const f32 *w_gate_up = gate_up + e * 2 * width * in, *w_down = down + e * in * width;
            const T *h = hidden + start * 2 * width, *grad = grad_out + start * in;
            T *act = room, *grad_h = act + most * width;
            word *packed_h = (word *)(grad_h + most * 2 * width), *packed_grad = packed_h + count * 2 * width;
            word *packed_act = packed_grad + count * in, *packed_tokens = packed_act + count * width;
            for (long j = first; j < last; j += WIDE) { /* gradients of the activations, which take their place */
                pack_panel<T>(w_down + j, width, nullptr, in, panel);
                multiply_panel(grad, nullptr, in, panel, act + j, width, rows, {w_down + j + WIDE, width, 0});
            }
            for (long row = 0; row < rows; row++) {
                const T *gate = h + row * 2 * width + first;
                T *to = grad_h + row * 2 * width + first, *from = act + row * width + first;
                if (row + AHEAD < rows)
                    for (long part = 0; part <= width; part += width)
                        fetch(gate + AHEAD * 2 * width + part, (last - first) * sizeof *gate);
                parts[thread * all + start + row] = swiglu_row_backward(
                    gate, gate + width, weights[start + row], from, from, to, to + width, last - first);
            }
            for (long j = first; j < last; j += WIDE) {
                pack_panel<T>(grad_h + j, 2 * width, nullptr, rows, packed_h + j * count);
                pack_panel<T>(grad_h + width + j, 2 * width, nullptr, rows, packed_h + (width + j) * count);
                pack_panel<T>(act + j, width, nullptr, rows, packed_act + j * count);
            }
            for (long j = first_in; j < last_in; j += WIDE) {
                pack_panel<T>(grad + j, in, nullptr, rows, packed_grad + j * count);
                pack_panel<T>(tokens + j, in, ids + start, rows, packed_tokens + j * count);
            }
#pragma omp barrier
            multiply_columns<T>(packed_grad, in, packed_act, first, last, count, add, grad_down + e * in * width,
                                width);
            multiply_columns<T>(packed_h, 2 * width, packed_tokens, first_in, last_in, count, add,
                                grad_gate_up + e * 2 * width * in, in);
            for (long j = first_in; j < last_in; j += WIDE) {
                pack_panel<T>(w_gate_up + j, in, nullptr, 2 * width, panel);
                multiply_panel(grad_h, nullptr, 2 * width, panel, grad_rows + start * in + j, in, rows,
                               {w_gate_up + j + WIDE, in, 0});
            }
#pragma omp barrier
            start += rows;
            if (start == ends[e]) e++;
        }
    }
    sum_parts(parts, threads, all, grad_weights);
}
EXPORT(grouped_swiglu_backward, f32)
EXPORT(grouped_swiglu_backward, bf16)
