/* Everything that needs exp: softmax, its sums, SwiGLU. */
#include "kernels/portable/exp_portable.h"
#include "kernels/portable/portable.h"

enum { LANES = 8 }; /* partial results that compilers keep in vector registers */

float
lbq_max_f32_portable(const float *x, ptrdiff_t count)
{
    float lane[LANES], max = x[0];
    for (int j = 0; j < LANES; j++)
        lane[j] = x[0];
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (; i < count; i++)
        max = x[i] > max ? x[i] : max;
    for (int j = 0; j < LANES; j++)
        max = lane[j] > max ? lane[j] : max;
    return max;
}

/* x[i] = 2^(x[i] - shift); returns their sum, which trailing zeros would not change. */
static float
weigh(float *x, ptrdiff_t count, float shift)
{
    float lane[LANES] = {0}, total = 0;
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) {
            x[i + j] = lbq_exp2(x[i + j] - shift);
            lane[j] += x[i + j];
        }
    for (; i < count; i++)
        lane[i % LANES] += x[i] = lbq_exp2(x[i] - shift);
    for (int j = 0; j < LANES; j++)
        total += lane[j];
    return total;
}

void
lbq_softmax_f32_portable(ptrdiff_t rows, ptrdiff_t count, float *x, ptrdiff_t stride, float *max,
                         float *sum, float *factor)
{
    for (ptrdiff_t r = 0; r < rows; r++, x += stride) {
        const float found = lbq_max_f32_portable(x, count);
        const float shift = found > max[r] ? found : max[r];
        factor[r] = lbq_exp2(max[r] - shift);
        sum[r] = sum[r] * factor[r] + weigh(x, count, shift);
        max[r] = shift;
    }
}

double
lbq_exp_sum_f32_portable(const float *x, ptrdiff_t count, float shift)
{
    double sum = 0;
    for (ptrdiff_t i = 0; i < count; i++)
        sum += (double)lbq_exp(x[i] - shift);
    return sum;
}

double
lbq_exp_gap_f32_portable(const float *p, const float *q, ptrdiff_t count, float p_shift,
                         float q_shift)
{
    double sum = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        const float a = p[i] - p_shift, b = q[i] - q_shift;
        sum += (double)lbq_exp(a) * (double)(a - b);
    }
    return sum;
}

void
lbq_swiglu_f32_portable(const float *gate, const float *up, ptrdiff_t count, float *y)
{
    for (ptrdiff_t i = 0; i < count; i++)
        y[i] = gate[i] / (1.0f + lbq_exp(-gate[i])) * up[i];
}
