/* RMS norm over the rows of x, from float32 to T. */

#include "vec.h"

template <class T>
void rms_norm(const f32 *x, const f32 *weight, T *y, f32 eps, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) norm_row(x + row * width, weight, y + row * width, eps, width);
}
EXPORT(rms_norm, f32)
EXPORT(rms_norm, bf16)

template <class T>
void rms_norm_backward(const f32 *x, const f32 *weight, const T *grad, f32 *grad_x, f32 *grad_weight, f32 eps,
                       long rows, long width, int threads) {
    const Buffer<f32> parts(threads * width);
    memset(parts, 0, threads * width * sizeof(f32));
#pragma omp parallel num_threads(threads)
    {
        f32 *part = parts + omp_get_thread_num() * width;
#pragma omp for
        for (long row = 0; row < rows; row++) {
            const f32 *from = x + row * width, inverse = inverse_rms(from, width, eps);
            const T *g = grad + row * width;
            f32 *to = grad_x + row * width;
            vec total = zero;
            FOR_EACH_VECTOR(width, {
                const vec product = load(g + i, n) * load(from + i, n) * inverse;
                total += product * load(weight + i, n);
                store(part + i, load(part + i, n) + product, n);
            });
            const f32 mean = sum(total) / width;
            FOR_EACH_VECTOR(width, {
                const vec unit = load(from + i, n) * inverse;
                store(to + i, inverse * (load(g + i, n) * load(weight + i, n) - unit * mean), n);
            });
        }
    }
    sum_parts(parts, threads, width, grad_weight);
}
EXPORT(rms_norm_backward, f32)
EXPORT(rms_norm_backward, bf16)
