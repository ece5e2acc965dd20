/* Tokens in parallel, each rounded by the kernels that round for packed weights. On the way back
 * every token has sums of its own, which are added in the order of tokens. */
#include "linear/fake.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "core/threads.h"
#include "linear/activation.h"

enum { CLIP, SCALE, ZERO, TOKENS = 16 /* of a task: 0.1 ms for 4096 columns */ };

typedef struct {
    lbq_activation how;
    ptrdiff_t tokens, cols, step, steps;
    const float *x;
    float *y;     /* forward */
    float *g;     /* backward */
    double *sums; /* (tokens, LBQ_FAKE_VALUES) */
} job;

/* One token, rounded. */
typedef struct {
    float *x; /* centred */
    int8_t *q;
    float *scale, *total; /* of the steps */
    float zero;
} token;

static job
job_of(const lbq_fake *fake, ptrdiff_t tokens, ptrdiff_t cols, const float *x)
{
    const float *const values = fake->values;
    return (job){
        .how = {fake->bits, values[CLIP], values[SCALE], values[ZERO]},
        .tokens = tokens,
        .cols = cols,
        .step = fake->step,
        .steps = lbq_pieces(cols, fake->step),
        .x = x,
    };
}

lbq_status
lbq_fake_check(const lbq_fake *fake)
{
    if (!fake->values)
        return LBQ_OK;
    const float clip = fake->values[CLIP];
    LBQ_REQUIRE(fake->bits == 4 || fake->bits == 8,
                LBQ_BAD_VALUE,
                "inputs are rounded to %d bits, expected 8 or 4",
                fake->bits);
    const ptrdiff_t step = fake->step;
    LBQ_REQUIRE(step == 16 || step == 32 || step == 64 || step == 128,
                LBQ_BAD_VALUE,
                "step is %td, expected 16, 32, 64 or 128",
                step);
    LBQ_REQUIRE(clip > 0 && clip <= 1,
                LBQ_BAD_VALUE,
                "clip is %g, expected a number above 0, at most 1",
                (double)clip);
    const job j = job_of(fake, 0, 1, NULL);
    return lbq_activation_check(&j.how);
}

static lbq_status
open_token(const job *j, lbq_arena *arena, token *t)
{
    const size_t row = sizeof(float) * (size_t)j->cols, steps = sizeof(float) * (size_t)j->steps;
    const size_t padded = (size_t)(j->steps * j->step);
    LBQ_TRY(lbq_arena_open(arena, lbq_padded(row) + lbq_padded(padded) + 2 * lbq_padded(steps)));
    t->x = lbq_arena_take(arena, row);
    t->q = lbq_arena_take(arena, padded);
    t->scale = lbq_arena_take(arena, steps);
    t->total = lbq_arena_take(arena, steps);
    return LBQ_OK;
}

static void
round_token(const job *j, ptrdiff_t index, token *t)
{
    memcpy(t->x, j->x + index * j->cols, sizeof(float) * (size_t)j->cols);
    t->zero = j->how.zero == 0 ? 0 : lbq_activation_centre(&j->how, j->cols, t->x);
    lbq_activation_round(&j->how, j->cols, j->step, t->x, t->q, t->scale, t->total);
}

/* Rounds some tokens and visits each of them. */
static lbq_status
visit_tokens(const job *j, ptrdiff_t index, void (*visit)(const job *, ptrdiff_t, const token *))
{
    lbq_arena arena;
    token t;
    LBQ_TRY(open_token(j, &arena, &t));
    const ptrdiff_t end = lbq_smaller((index + 1) * TOKENS, j->tokens);
    for (ptrdiff_t i = index * TOKENS; i < end; i++) {
        round_token(j, i, &t);
        visit(j, i, &t);
    }
    lbq_arena_close(&arena);
    return LBQ_OK;
}

static void
token_forward(const job *j, ptrdiff_t i, const token *t)
{
    for (ptrdiff_t k = 0; k < j->cols; k++)
        j->y[i * j->cols + k] = t->scale[k / j->step] * (float)t->q[k] + t->zero;
}

static lbq_status
forward_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    return visit_tokens(context, index, token_forward);
}

bool
lbq_same_fake(const lbq_fake *a, const lbq_fake *b)
{
    if (!a->values || !b->values)
        return !a->values && !b->values;
    for (int i = 0; i < LBQ_FAKE_VALUES; i++)
        if (!lbq_same_float(a->values[i], b->values[i]))
            return false;
    return a->bits == b->bits && a->step == b->step && lbq_same_rotation(a->basis, b->basis);
}

lbq_status
lbq_fake_forward(const lbq_fake *fake, ptrdiff_t tokens, ptrdiff_t cols, const float *x, float *y)
{
    if (fake->basis) {
        memmove(y, x, sizeof(float) * (size_t)(tokens * cols));
        LBQ_TRY(lbq_rotate(fake->basis, tokens, y));
        x = y;
    }
    job j = job_of(fake, tokens, cols, x);
    j.y = y;
    LBQ_TRY(lbq_parallel(lbq_pieces(tokens, TOKENS), forward_task, &j));
    return fake->basis ? lbq_rotate_back(fake->basis, tokens, y) : LBQ_OK;
}

static ptrdiff_t
largest(const float *x, ptrdiff_t begin, ptrdiff_t end)
{
    ptrdiff_t at = begin;
    for (ptrdiff_t k = begin + 1; k < end; k++)
        at = fabsf(x[k]) > fabsf(x[at]) ? k : at;
    return at;
}

/* Backward pass over the columns of a step: g becomes dL/dx, without the parts that flow through
 * the scale and the zero. Adds dL/dzero; returns dL/dscale. */
static double
through_step(const token *t, ptrdiff_t begin, ptrdiff_t end, float scale, float limit, float *g,
             double *zero)
{
    const float edge = limit * (1 - 0x1p-20f); /* v is known to some rounding errors */
    double sum = 0;
    for (ptrdiff_t k = begin; k < end; k++) {
        const float v = t->x[k] / scale, q = (float)t->q[k];
        if (fabsf(v) < edge) {
            sum += (double)g[k] * (double)(q - v);
            continue;
        }
        sum += (double)g[k] * (double)q;
        *zero += (double)g[k];
        g[k] = 0;
    }
    return sum;
}

/* Adds dL/dzero to the gradients of the token's minimum and maximum: the zero is their mean. */
static void
to_ends(const token *t, ptrdiff_t cols, double zero, float *g)
{
    ptrdiff_t low = 0, high = 0;
    for (ptrdiff_t k = 1; k < cols; k++) {
        low = t->x[k] < t->x[low] ? k : low;
        high = t->x[k] > t->x[high] ? k : high;
    }
    g[low] += (float)(zero / 2);
    g[high] += (float)(zero / 2);
}

static void
token_backward(const job *j, ptrdiff_t i, const token *t)
{
    float *const g = j->g + i * j->cols;
    double *const sums = j->sums + i * LBQ_FAKE_VALUES;
    const double limit = (1 << (j->how.bits - 1)) - 1;
    double zero = 0;
    for (ptrdiff_t s = 0; s < j->steps; s++) {
        const ptrdiff_t begin = s * j->step, end = lbq_smaller(begin + j->step, j->cols);
        if (!(t->scale[s] > 0)) /* zeros stay zeros */
            continue;
        const double scale = through_step(t, begin, end, t->scale[s], (float)limit, g, &zero);
        if (j->how.scale != 0) {
            sums[SCALE] += scale;
            continue;
        }
        const ptrdiff_t top = largest(t->x, begin, end);
        const double sign = t->x[top] < 0 ? -1 : 1, by_top = scale * (double)j->how.clip / limit;
        sums[CLIP] += scale * fabs((double)t->x[top]) / limit;
        g[top] += (float)(sign * by_top);
        zero -= sign * by_top;
    }
    if (isnan(j->how.zero))
        to_ends(t, j->cols, zero, g);
    else
        sums[ZERO] += zero;
}

static lbq_status
backward_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    return visit_tokens(context, index, token_backward);
}

/* Without the basis. */
static lbq_status
backward(const lbq_fake *fake, ptrdiff_t tokens, ptrdiff_t cols, const float *x, float *g,
         float *gradient)
{
    job j = job_of(fake, tokens, cols, x);
    j.g = g;
    const size_t bytes = sizeof(double) * (size_t)(tokens * LBQ_FAKE_VALUES);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    j.sums = memset(lbq_arena_take(&arena, bytes), 0, bytes);
    const lbq_status status = lbq_parallel(lbq_pieces(tokens, TOKENS), backward_task, &j);
    for (int i = 0; i < LBQ_FAKE_VALUES && gradient && status == LBQ_OK; i++) {
        double sum = 0;
        for (ptrdiff_t t = 0; t < tokens; t++)
            sum += j.sums[t * LBQ_FAKE_VALUES + i];
        gradient[i] += (float)sum;
    }
    lbq_arena_close(&arena);
    return status;
}

lbq_status
lbq_fake_backward(const lbq_fake *fake, ptrdiff_t tokens, ptrdiff_t cols, const float *x, float *g,
                  float *gradient)
{
    if (!fake->basis)
        return backward(fake, tokens, cols, x, g, gradient);
    const size_t bytes = sizeof(float) * (size_t)(tokens * cols);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    float *const turned = memcpy(lbq_arena_take(&arena, bytes), x, bytes);
    lbq_status status = lbq_rotate(fake->basis, tokens, turned);
    if (status == LBQ_OK)
        status = lbq_rotate(fake->basis, tokens, g);
    if (status == LBQ_OK)
        status = backward(fake, tokens, cols, turned, g, gradient);
    if (status == LBQ_OK)
        status = lbq_rotate_back(fake->basis, tokens, g);
    lbq_arena_close(&arena);
    return status;
}
