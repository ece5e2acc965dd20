/* Rows in parallel; two passes over a row: its maximum, then the sum of exponentials. */
#include "transformer/cross_entropy.h"

#include <math.h>

#include "core/threads.h"
#include "kernels/kernels.h"

typedef struct {
    ptrdiff_t vocab;
    const float *logits;
    const int32_t *target;
    double *nll;
} cross_entropy;

static lbq_status
cross_entropy_task(void *context, ptrdiff_t t, int worker)
{
    (void)worker;
    const cross_entropy *const c = context;
    const float *const x = c->logits + t * c->vocab;
    const ptrdiff_t target = c->target[t];
    LBQ_REQUIRE(target >= 0 && target < c->vocab,
                LBQ_BAD_VALUE,
                "target[%td] is %td, expected 0 to %td",
                t,
                target,
                c->vocab - 1);
    const float max = lbq_kernel.max_f32(x, c->vocab);
    const double sum = lbq_kernel.exp_sum_f32(x, c->vocab, max);
    c->nll[t] = log(sum) + ((double)max - (double)x[target]);
    LBQ_REQUIRE(!isnan(c->nll[t]), LBQ_BAD_VALUE, "row %td of logits has a NaN or infinity", t);
    return LBQ_OK;
}

lbq_status
lbq_cross_entropy(ptrdiff_t tokens, ptrdiff_t vocab, const float *logits, const int32_t *target,
                  double *nll)
{
    cross_entropy c = {.vocab = vocab, .logits = logits, .target = target, .nll = nll};
    return lbq_parallel(tokens, cross_entropy_task, &c);
}

typedef struct {
    ptrdiff_t vocab;
    const float *p, *q;
    double *kl;
    uint8_t *same;
} divergence;

static ptrdiff_t
first_index_of(const float *x, ptrdiff_t count, float value)
{
    for (ptrdiff_t i = 0; i < count; i++)
        if (x[i] == value)
            return i;
    return -1;
}

/* exp_gap_f32 for differences of logits that overflow float32. */
static double
gap_wide(const float *p, const float *q, ptrdiff_t vocab, double p_max, double q_max)
{
    double sum = 0;
    for (ptrdiff_t i = 0; i < vocab; i++) {
        const double a = (double)p[i] - p_max, b = (double)q[i] - q_max;
        sum += exp(a) * (a - b);
    }
    return sum;
}

static lbq_status
divergence_task(void *context, ptrdiff_t t, int worker)
{
    (void)worker;
    const divergence *const d = context;
    const ptrdiff_t vocab = d->vocab;
    const float *const p = d->p + t * vocab, *const q = d->q + t * vocab;
    const float p_max = lbq_kernel.max_f32(p, vocab), q_max = lbq_kernel.max_f32(q, vocab);
    const double p_sum = lbq_kernel.exp_sum_f32(p, vocab, p_max);
    const double q_sum = lbq_kernel.exp_sum_f32(q, vocab, q_max);
    double gap = lbq_kernel.exp_gap_f32(p, q, vocab, p_max, q_max);
    if (!isfinite(gap))
        gap = gap_wide(p, q, vocab, (double)p_max, (double)q_max);
    d->kl[t] = gap / p_sum - log(p_sum) + log(q_sum);
    d->same[t] = first_index_of(p, vocab, p_max) == first_index_of(q, vocab, q_max);
    LBQ_REQUIRE(isfinite(d->kl[t]), LBQ_BAD_VALUE, "row %td of p or q is not finite", t);
    return LBQ_OK;
}

lbq_status
lbq_kl_divergence(ptrdiff_t tokens, ptrdiff_t vocab, const float *p, const float *q, double *kl,
                  uint8_t *same)
{
    divergence d = {.vocab = vocab, .p = p, .q = q, .kl = kl, .same = same};
    return lbq_parallel(tokens, divergence_task, &d);
}
