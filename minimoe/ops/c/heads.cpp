/* Heads of attention: norm and rotation, from the order of the projections to that of attention's matmuls.

   A token has R heads of queries for each of K key heads, K of keys and K of values, d values each. For C rows of
   `length` tokens the results are q (C, K, length, R, d), k and v (C, K, length, d). Pairs (x_i, x_{i+d/2}) are turned
   by the token's angles; cos and sin have d values a token. */

#include "vec.h"

/* Tokens of q, k and v begin as many values apart as their strides say. */
template <class T>
void heads(const T *q, const T *k, const T *v, const f32 *gains, const f32 *cos, const f32 *sin, T *q_heads, T *k_heads,
           T *v_heads, f32 eps, long q_stride, long k_stride, long v_stride, long tokens, long length, long kv_heads,
           long group, long d, int threads) {
    const long query_heads = kv_heads * group, half = d / 2;
#pragma omp parallel for num_threads(threads)
    for (long token = 0; token < tokens; token++) {
        const long row = token / length * kv_heads * length + token % length; /* in the first of its K heads */
        const f32 *c = cos + token * d, *s = sin + token * d;
        for (long head = 0; head < query_heads + kv_heads; head++) {
            const long key = head - query_heads;
            const T *from = key < 0 ? q + token * q_stride + head * d : k + token * k_stride + key * d;
            T *to = key < 0 ? q_heads + ((row + head / group * length) * group + head % group) * d
                            : k_heads + (row + key * length) * d;
            const f32 *gain = gains + head * d, inverse = inverse_rms(from, d, eps);
            FOR_EACH_VECTOR(half, {
                const vec a = inverse * load(from + i, n) * load(gain + i, n);
                const vec b = inverse * load(from + half + i, n) * load(gain + half + i, n);
                store(to + i, a * load(c + i, n) - b * load(s + i, n), n);
                store(to + half + i, b * load(c + half + i, n) + a * load(s + half + i, n), n);
            });
        }
        for (long head = 0; head < kv_heads; head++)
            memcpy(v_heads + (row + head * length) * d, v + token * v_stride + head * d, d * sizeof *v);
    }
}
EXPORT(heads, f32)
EXPORT(heads, bf16)

/* The gradients of q, k and v are contiguous; grad_gains is (H + K, d). */
template <class T>
void heads_backward(const T *q, const T *k, const f32 *gains, const f32 *cos, const f32 *sin, const T *grad_q_heads,
                    const f32 *grad_k_heads, const f32 *grad_v_heads, T *grad_q, T *grad_k, T *grad_v, f32 *grad_gains,
                    f32 eps, long q_stride, long k_stride, long tokens, long length, long kv_heads, long group, long d,
                    int threads) {
    const long query_heads = kv_heads * group, normed = query_heads + kv_heads, half = d / 2;
    const Buffer<f32> parts(threads * normed * d);
    memset(parts, 0, threads * normed * d * sizeof(f32));
#pragma omp parallel num_threads(threads)
    {
        const Buffer<f32> turned(d);
        f32 *part = parts + omp_get_thread_num() * normed * d;
#pragma omp for
        for (long token = 0; token < tokens; token++) {
            const long row = token / length * kv_heads * length + token % length;
            const f32 *c = cos + token * d, *s = sin + token * d;
            for (long head = 0; head < normed; head++) {
                const long key = head - query_heads;
                const T *x = key < 0 ? q + token * q_stride + head * d : k + token * k_stride + key * d;
                T *to = key < 0 ? grad_q + (token * query_heads + head) * d : grad_k + (token * kv_heads + key) * d;
                const T *from_q = grad_q_heads + ((row + head / group * length) * group + head % group) * d;
                const f32 *from_k = grad_k_heads + (row + key * length) * d;
                const f32 *gain = gains + head * d, inverse = inverse_rms(x, d, eps);
                FOR_EACH_VECTOR(half, { /* turn back */
                    const vec a = key < 0 ? load(from_q + i, n) : load(from_k + i, n);
                    const vec b = key < 0 ? load(from_q + half + i, n) : load(from_k + half + i, n);
                    store(turned + i, a * load(c + i, n) + b * load(s + i, n), n);
                    store(turned + half + i, b * load(c + half + i, n) - a * load(s + half + i, n), n);
                });
                vec total = zero;
                FOR_EACH_VECTOR(d, {
                    const vec product = load(turned + i, n) * load(x + i, n) * inverse;
                    f32 *sums = part + head * d + i;
                    total += product * load(gain + i, n);
                    store(sums, load(sums, n) + product, n);
                });
                const f32 mean = sum(total) / d;
                FOR_EACH_VECTOR(d, {
                    const vec unit = load(x + i, n) * inverse;
                    store(to + i, inverse * (load(turned + i, n) * load(gain + i, n) - unit * mean), n);
                });
            }
            for (long head = 0; head < kv_heads; head++) {
                const f32 *from = grad_v_heads + (row + head * length) * d;
                T *to = grad_v + (token * kv_heads + head) * d;
                FOR_EACH_VECTOR(d, store(to + i, load(from + i, n), n););
            }
        }
    }
    sum_parts(parts, threads, normed * d, grad_gains);
}
EXPORT(heads_backward, f32)
EXPORT(heads_backward, bf16)
