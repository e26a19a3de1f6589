/* Heads of attention: norm and rotation, from the order of the projections to that of attention's matmuls.

   A token has R heads of queries for each of K key heads, K of keys and K of values, d values each. For C rows of
   `length` tokens the results are q (C, K, length, R, d), k and v (C, K, length, d). Pairs (x_i, x_{i+d/2}) are turned
   by the token's angles c = cos and s = sin, of which it has d each. Tokens of q, k and v begin as many values apart as
   their strides say. */

#include "vec.h"

template <class T>
INLINE void turn(const T *x, const f32 *gain, const f32 *c, const f32 *s, T *to, f32 eps, long d) {
    const long half = d / 2;
    const f32 inverse = inverse_rms(x, d, eps);
    FOR_EACH_VECTOR(half, {
        const vec a = inverse * load(x + i, n) * load(gain + i, n);
        const vec b = inverse * load(x + half + i, n) * load(gain + half + i, n);
        store(to + i, a * load(c + i, n) - b * load(s + i, n), n);
        store(to + half + i, b * load(c + half + i, n) + a * load(s + half + i, n), n);
    });
}

template <class T>
void heads(const T *q, const T *k, const T *v, const f32 *gains, const f32 *cos, const f32 *sin, T *q_heads, T *k_heads,
           T *v_heads, f32 eps, long q_stride, long k_stride, long v_stride, long tokens, long length, long kv_heads,
           long group, long d, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long token = 0; token < tokens; token++) {
        const long row = token / length * kv_heads * length + token % length; /* in the first of its K heads */
        const f32 *c = cos + token * d, *s = sin + token * d, *gain = gains;
        for (long head = 0; head < kv_heads * group; head++, gain += d)
            turn(q + token * q_stride + head * d, gain, c, s,
                 q_heads + ((row + head / group * length) * group + head % group) * d, eps, d);
        for (long head = 0; head < kv_heads; head++, gain += d) {
            const long to = (row + head * length) * d;
            turn(k + token * k_stride + head * d, gain, c, s, k_heads + to, eps, d);
            memcpy(v_heads + to, v + token * v_stride + head * d, d * sizeof *v);
        }
    }
}
EXPORT(heads, f32)
EXPORT(heads, bf16)

/* The gradient of x into `to` from that of the turned head, and the gain's, which is added. `back` has room for d. */
template <class T, class G>
INLINE void turn_backward(const T *x, const f32 *gain, const f32 *c, const f32 *s, const G *grad, T *to, f32 *grad_gain,
                          f32 *back, f32 eps, long d) {
    const long half = d / 2;
    const f32 inverse = inverse_rms(x, d, eps);
    FOR_EACH_VECTOR(half, {
        const vec a = load(grad + i, n), b = load(grad + half + i, n);
        store(back + i, a * load(c + i, n) + b * load(s + i, n), n);
        store(back + half + i, b * load(c + half + i, n) - a * load(s + half + i, n), n);
    });
    vec total = zero;
    FOR_EACH_VECTOR(d, {
        const vec product = load(back + i, n) * load(x + i, n) * inverse;
        total += product * load(gain + i, n);
        store(grad_gain + i, load(grad_gain + i, n) + product, n);
    });
    const f32 mean = sum(total) / d;
    FOR_EACH_VECTOR(d, {
        const vec unit = load(x + i, n) * inverse;
        store(to + i, inverse * (load(back + i, n) * load(gain + i, n) - unit * mean), n);
    });
}

/* The gradients of q, k and v are contiguous; grad_gains is (H + K, d). */
template <class T>
void heads_backward(const T *q, const T *k, const f32 *gains, const f32 *cos, const f32 *sin, const T *grad_q_heads,
                    const f32 *grad_k_heads, const f32 *grad_v_heads, T *grad_q, T *grad_k, T *grad_v, f32 *grad_gains,
                    f32 eps, long q_stride, long k_stride, long tokens, long length, long kv_heads, long group, long d,
                    int threads) {
    const long query_heads = kv_heads * group, size = (query_heads + kv_heads) * d;
    const Buffer<f32> parts(threads * size);
    memset(parts, 0, threads * size * sizeof(f32));
#pragma omp parallel num_threads(threads)
    {
        const Buffer<f32> back(d);
        f32 *part = parts + omp_get_thread_num() * size;
#pragma omp for
        for (long token = 0; token < tokens; token++) {
            const long row = token / length * kv_heads * length + token % length;
            const f32 *c = cos + token * d, *s = sin + token * d;
            for (long head = 0; head < query_heads; head++)
                turn_backward(q + token * q_stride + head * d, gains + head * d, c, s,
                              grad_q_heads + ((row + head / group * length) * group + head % group) * d,
                              grad_q + (token * query_heads + head) * d, part + head * d, back, eps, d);
            for (long head = 0; head < kv_heads; head++) {
                const long from = (row + head * length) * d, to = (token * kv_heads + head) * d;
                const long gain = (query_heads + head) * d;
                turn_backward(k + token * k_stride + head * d, gains + gain, c, s, grad_k_heads + from, grad_k + to,
                              part + gain, back, eps, d);
                FOR_EACH_VECTOR(d, store(grad_v + to + i, load(grad_v_heads + from + i, n), n););
            }
        }
    }
    sum_parts(parts, threads, size, grad_gains);
}
EXPORT(heads_backward, f32)
EXPORT(heads_backward, bf16)
