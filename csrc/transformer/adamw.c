/* Chunks of the arrays in parallel; loops that compilers vectorise. */
#include "transformer/adamw.h"

#include <math.h>

#include "core/threads.h"

enum {
    CHUNK = 1 << 14, /* numbers of a task: some 10 us */
    PIECES = 64,     /* of a sum */
    LANES = 8,       /* partial sums that compilers keep in vector registers */
};

/* The factors of a step, of float32 as the arrays are. Those near one, 1 - rate decay and beta, are
 * not among them: their roundings would add up over the steps. */
typedef struct {
    float decay;               /* rate decay */
    float to_first, to_second; /* 1 - beta1, 1 - beta2 */
    float root;                /* sqrt(1 - beta2^step) */
    float epsilon;
    float size; /* rate / (1 - beta1^step) */
    ptrdiff_t n;
    float *param;
    const float *gradient;
    float *first, *second;
} adamw;

static void
update(const adamw *a, ptrdiff_t count, float *restrict param, const float *restrict gradient,
       float *restrict first, float *restrict second)
{
    const adamw f = *a;
    for (ptrdiff_t i = 0; i < count; i++) {
        const float g = gradient[i];
        const float m = first[i] + f.to_first * (g - first[i]);
        const float v = second[i] + f.to_second * (g * g - second[i]);
        param[i] -= f.decay * param[i] + f.size * (m / (sqrtf(v) / f.root + f.epsilon));
        first[i] = m;
        second[i] = v;
    }
}

static lbq_status
adamw_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const adamw *const a = context;
    const ptrdiff_t begin = index * CHUNK, count = lbq_smaller(CHUNK, a->n - begin);
    update(a, count, a->param + begin, a->gradient + begin, a->first + begin, a->second + begin);
    return LBQ_OK;
}

static lbq_status
check(const lbq_adamw *how, ptrdiff_t step)
{
    LBQ_REQUIRE(how->beta1 >= 0 && how->beta1 < 1 && how->beta2 >= 0 && how->beta2 < 1,
                LBQ_BAD_VALUE,
                "beta1 is %g and beta2 is %g, expected 0 <= beta < 1",
                how->beta1,
                how->beta2);
    LBQ_REQUIRE(how->rate >= 0 && how->decay >= 0 && isfinite(how->rate * how->decay),
                LBQ_BAD_VALUE,
                "lr is %g and decay is %g, expected finite numbers >= 0",
                how->rate,
                how->decay);
    LBQ_REQUIRE((float)how->epsilon > 0 && isfinite(how->epsilon),
                LBQ_BAD_VALUE,
                "epsilon is %g, expected a number above 0 in float32",
                how->epsilon);
    LBQ_REQUIRE(step >= 1, LBQ_BAD_VALUE, "step is %td, expected at least 1", step);
    return LBQ_OK;
}

lbq_status
lbq_adamw_step(const lbq_adamw *how, ptrdiff_t step, ptrdiff_t n, float *param,
               const float *gradient, float *first, float *second)
{
    LBQ_TRY(check(how, step));
    adamw a = {
        .decay = (float)(how->rate * how->decay),
        .to_first = (float)(1 - how->beta1),
        .to_second = (float)(1 - how->beta2),
        .root = (float)sqrt(1 - pow(how->beta2, (double)step)),
        .epsilon = (float)how->epsilon,
        .size = (float)(how->rate / (1 - pow(how->beta1, (double)step))),
        .n = n,
        .param = param,
        .gradient = gradient,
        .first = first,
        .second = second,
    };
    return lbq_parallel(lbq_pieces(n, CHUNK), adamw_task, &a);
}

typedef struct {
    ptrdiff_t n, piece;
    const float *x;
    double sum[PIECES];
} squares;

static lbq_status
square_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    squares *const s = context;
    const ptrdiff_t begin = index * s->piece, count = lbq_smaller(s->piece, s->n - begin);
    const float *const x = s->x + begin;
    double lane[LANES] = {0};
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += (double)x[i + j] * (double)x[i + j];
    for (; i < count; i++)
        lane[i % LANES] += (double)x[i] * (double)x[i];
    for (int j = 0; j < LANES; j++)
        s->sum[index] += lane[j];
    return LBQ_OK;
}

lbq_status
lbq_square_sum(ptrdiff_t n, const float *x, double *sum)
{
    squares s = {.n = n, .piece = lbq_pieces(n, PIECES), .x = x};
    if (s.piece < CHUNK)
        s.piece = CHUNK;
    LBQ_TRY(lbq_parallel(lbq_pieces(n, s.piece), square_task, &s));
    *sum = 0;
    for (int i = 0; i < PIECES; i++)
        *sum += s.sum[i];
    return LBQ_OK;
}
