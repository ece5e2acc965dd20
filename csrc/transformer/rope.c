/* Tables once per call, then the rotations; tokens in parallel. */
#include "transformer/rope.h"

#include <math.h>

#include "core/threads.h"
#include "kernels/kernels.h"

enum { TOKENS = 32 }; /* per task */

typedef struct {
    ptrdiff_t first, step, tokens, half;
    const double *frequency;
    double factor;
    float *cosine, *sine;
} rope_table;

static lbq_status
table_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const rope_table *const p = context;
    const ptrdiff_t half = p->half, end = lbq_smaller((index + 1) * TOKENS, p->tokens);
    for (ptrdiff_t t = index * TOKENS; t < end; t++)
        for (ptrdiff_t i = 0; i < half; i++) {
            const double angle = (double)(p->first + t * p->step) * p->frequency[i];
            p->cosine[t * half + i] = (float)(cos(angle) * p->factor);
            p->sine[t * half + i] = (float)(sin(angle) * p->factor);
        }
    return LBQ_OK;
}

lbq_status
lbq_rope_table(ptrdiff_t first, ptrdiff_t step, ptrdiff_t tokens, ptrdiff_t half,
               const double *frequency, double factor, float *cosine, float *sine)
{
    rope_table p = {first, step, tokens, half, frequency, factor, cosine, sine};
    return lbq_parallel(lbq_pieces(tokens, TOKENS), table_task, &p);
}

void
lbq_rope_columns(ptrdiff_t count, ptrdiff_t half, const double *frequency, float *table)
{
    for (ptrdiff_t i = 0; i < half; i++)
        for (ptrdiff_t t = 0; t < count; t++) {
            const double angle = (double)t * frequency[i];
            table[i * count + t] = (float)cos(angle);
            table[(half + i) * count + t] = (float)sin(angle);
        }
}

typedef struct {
    ptrdiff_t tokens, heads, half;
    const float *cosine, *sine, *gain;
    float epsilon;
    float *X;
} rope;

static void
turn(ptrdiff_t half, const float *restrict cosine, const float *restrict sine,
     float *restrict first, float *restrict second)
{
    for (ptrdiff_t i = 0; i < half; i++) {
        const float a = first[i], b = second[i];
        first[i] = a * cosine[i] - b * sine[i];
        second[i] = b * cosine[i] + a * sine[i];
    }
}

static lbq_status
rope_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const rope *const p = context;
    const ptrdiff_t end = (index + 1) * TOKENS < p->tokens ? (index + 1) * TOKENS : p->tokens;
    for (ptrdiff_t t = index * TOKENS; t < end; t++)
        for (ptrdiff_t h = 0; h < p->heads; h++) {
            float *const x = p->X + (t * p->heads + h) * 2 * p->half;
            if (p->gain)
                lbq_kernel.rmsnorm_f32(x, p->gain, 2 * p->half, p->epsilon, x);
            turn(p->half, p->cosine + t * p->half, p->sine + t * p->half, x, x + p->half);
        }
    return LBQ_OK;
}

lbq_status
lbq_rope(ptrdiff_t tokens, ptrdiff_t heads, ptrdiff_t half, const float *cosine, const float *sine,
         const float *gain, float epsilon, float *X)
{
    rope p = {
        .tokens = tokens,
        .heads = heads,
        .half = half,
        .cosine = cosine,
        .sine = sine,
        .gain = gain,
        .epsilon = epsilon,
        .X = X,
    };
    return lbq_parallel(lbq_pieces(tokens, TOKENS), rope_task, &p);
}

static lbq_status
rope_backward_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const rope *const p = context;
    const ptrdiff_t half = p->half;
    for (ptrdiff_t t = index * TOKENS; t < lbq_smaller((index + 1) * TOKENS, p->tokens); t++)
        for (ptrdiff_t h = 0; h < p->heads; h++) {
            float *const first = p->X + (t * p->heads + h) * 2 * half, *const second = first + half;
            const float *const cosine = p->cosine + t * half, *const sine = p->sine + t * half;
            for (ptrdiff_t i = 0; i < half; i++) {
                const float a = first[i], b = second[i];
                first[i] = a * cosine[i] + b * sine[i];
                second[i] = b * cosine[i] - a * sine[i];
            }
        }
    return LBQ_OK;
}

lbq_status
lbq_rope_backward(ptrdiff_t tokens, ptrdiff_t heads, ptrdiff_t half, const float *cosine,
                  const float *sine, float *G)
{
    rope p = {tokens, heads, half, cosine, sine, NULL, 0, G};
    return lbq_parallel(lbq_pieces(tokens, TOKENS), rope_backward_task, &p);
}
