/* Rows in parallel, in three sweeps over a row that stays in the second-level cache: maxima;
 * exponentials, kept because they cost most, and the sums that the divergences follow from; the
 * gradient. Reverse divergence and Jensen-Shannon put a sweep before the last one.
 *
 * With a = (teacher - max) / temperature, b = (z - max) / temperature, A = sum exp(a), B = sum
 * exp(b), the difference of log probabilities is D = log p - log q = a - b + log B - log A, and
 *
 *     KL(p || q) = sum p D               dKL/dz = (q - p) / temperature
 *     KL(q || p) = -sum q D              dKL/dz = q (h - sum q h) / temperature,  h = -D
 *     JS = -(sum p M + sum q L) / 2      the same with                            h = -L / 2
 *
 * where L = log m - log q = log((1 + exp(D)) / 2) and M = log m - log p is the same of -D. */
#include "transformer/loss.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"
#include "kernels/portable/exp_portable.h"

enum {
    LANES = 8,   /* partial sums that compilers keep in vector registers */
    BLOCK = 256, /* numbers between two loops over the same ones: three such arrays fit the L1 */
    KEPT = 3,    /* rows of scratch */
};

typedef struct {
    lbq_loss how;
    ptrdiff_t vocab;
    float *logits;
    const float *teacher;
    const int32_t *target;
    const float *weight;
    double *loss;
    float *scratch; /* (threads, KEPT, vocab) */
    bool soft;      /* a divergence has a weight */
} losses;

/* --- sums ------------------------------------------------------------------------------------- */

static double
sum_lanes(const double lane[LANES])
{
    double sum = 0;
    for (int j = 0; j < LANES; j++)
        sum += lane[j];
    return sum;
}

static double
sum_of(const float *x, ptrdiff_t count)
{
    double lane[LANES] = {0};
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += (double)x[i + j];
    for (; i < count; i++)
        lane[i % LANES] += (double)x[i];
    return sum_lanes(lane);
}

static double
dot(const float *x, const float *y, ptrdiff_t count)
{
    double lane[LANES] = {0};
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++)
            lane[j] += (double)x[i + j] * (double)y[i + j];
    for (; i < count; i++)
        lane[i % LANES] += (double)x[i] * (double)y[i];
    return sum_lanes(lane);
}

/* --- cross entropy ---------------------------------------------------------------------------- */

/* Of a row z: -log softmax(z)[target]; own = softmax(z) times what it returns in *sum. */
static double
cross_entropy(const float *restrict z, ptrdiff_t vocab, ptrdiff_t target, float max,
              float *restrict own, double *sum)
{
    *sum = 0;
    for (ptrdiff_t begin = 0; begin < vocab; begin += BLOCK) {
        const ptrdiff_t end = lbq_smaller(begin + BLOCK, vocab);
        for (ptrdiff_t i = begin; i < end; i++)
            own[i] = lbq_exp(z[i] - max);
        *sum += sum_of(own + begin, end - begin);
    }
    return log(*sum) + ((double)max - (double)z[target]);
}

/* --- divergences ------------------------------------------------------------------------------ */

/* Of a row: what is kept of it, and its sums. */
typedef struct {
    ptrdiff_t count;
    float *q, *p; /* exp(b), exp(a), both without their sums */
    float *gap;   /* a - b; then h */
    double q_sum, p_sum;
    double q_gap, p_gap; /* sums of exp(b) gap and exp(a) gap */
    double q_mean;       /* sum of q h */
} row;

/* q, which is z before, and p, gap of one block. */
static void
exponentials(float *restrict q, const float *restrict teacher, ptrdiff_t count, float q_max,
             float p_max, float factor, float *restrict p, float *restrict gap)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        const float a = (teacher[i] - p_max) * factor, b = (q[i] - q_max) * factor;
        q[i] = lbq_exp(b);
        p[i] = lbq_exp(a);
        gap[i] = a - b;
    }
}

static void
exponentiate(row *r, const float *teacher, float q_max, float p_max, double temperature)
{
    const float factor = (float)(1 / temperature);
    for (ptrdiff_t i = 0; i < r->count; i += BLOCK) {
        const ptrdiff_t count = lbq_smaller(BLOCK, r->count - i);
        float *const q = r->q + i, *const p = r->p + i, *const gap = r->gap + i;
        exponentials(q, teacher + i, count, q_max, p_max, factor, p, gap);
        r->q_sum += sum_of(q, count);
        r->p_sum += sum_of(p, count);
        r->q_gap += dot(q, gap, count);
        r->p_gap += dot(p, gap, count);
    }
}

/* log(1 + u) for 0 <= u <= 1: 2 artanh(s), s = u / (2 + u) <= 1/3, whose series ends below 2^-25.
 */
static inline float
log_one_plus(float u)
{
    const float s = u / (2.0f + u), square = s * s;
    float sum = 1.0f / 13;
    for (int k = 11; k >= 1; k -= 2)
        sum = sum * square + 1.0f / (float)k;
    return 2.0f * s * sum;
}

/* L and M of one block, from gap + shift = D. */
static void
middle(const float *restrict gap, ptrdiff_t count, float shift, float *restrict L,
       float *restrict M)
{
    const float log2 = 0.693147181f;
    for (ptrdiff_t i = 0; i < count; i++) {
        const float D = gap[i] + shift, size = D > 0 ? D : -D;
        const float least = log_one_plus(lbq_exp(-size)) - log2;
        L[i] = (D > 0 ? D : 0) + least;
        M[i] = (D < 0 ? -D : 0) + least;
    }
}

/* gap becomes h = -reverse D - jensen_shannon L / 2. Returns the Jensen-Shannon divergence, 0 if it
 * has no weight. */
static double
slopes(row *r, const lbq_loss *how, double shift)
{
    const float reverse = (float)how->reverse, half = (float)(how->jensen_shannon / 2);
    double q_L = 0, p_M = 0;
    for (ptrdiff_t begin = 0; begin < r->count; begin += BLOCK) {
        float L[BLOCK] = {0}, M[BLOCK];
        const ptrdiff_t count = lbq_smaller(BLOCK, r->count - begin);
        float *const gap = r->gap + begin;
        if (half > 0) {
            middle(gap, count, (float)shift, L, M);
            q_L += dot(r->q + begin, L, count) / r->q_sum;
            p_M += dot(r->p + begin, M, count) / r->p_sum;
        }
        for (ptrdiff_t i = 0; i < count; i++)
            gap[i] = -reverse * (gap[i] + (float)shift) - half * L[i];
    }
    r->q_mean = -how->reverse * (r->q_gap / r->q_sum + shift) - how->jensen_shannon / 2 * q_L;
    return -(q_L + p_M) / 2;
}

/* q becomes size (forward (q - p) + q (h - sum q h)), the last term only if `slopes`. */
static void
gradient(const row *r, const lbq_loss *how, double size, bool has_slopes)
{
    float *restrict const q = r->q;
    const float *restrict const p = r->p, *restrict const h = r->gap;
    const float p_factor = (float)(size * how->forward / r->p_sum);
    const float q_factor = (float)(size * (how->forward - r->q_mean) / r->q_sum);
    const float h_factor = (float)(size / r->q_sum);
    if (has_slopes)
        for (ptrdiff_t i = 0; i < r->count; i++)
            q[i] = q[i] * (q_factor + h_factor * h[i]) - p[i] * p_factor;
    else
        for (ptrdiff_t i = 0; i < r->count; i++)
            q[i] = q[i] * q_factor - p[i] * p_factor;
}

/* The weighted divergences of a row z, which becomes `weight` times their gradient. */
static double
divergences(const lbq_loss *how, ptrdiff_t vocab, float *z, float max, const float *teacher,
            double weight, float *scratch)
{
    row r = {.count = vocab, .q = z, .p = scratch, .gap = scratch + vocab};
    const double T = how->temperature;
    const bool has_slopes = how->reverse > 0 || how->jensen_shannon > 0;
    exponentiate(&r, teacher, max, lbq_kernel.max_f32(teacher, vocab), T);
    const double shift = log(r.q_sum) - log(r.p_sum);
    double loss = 0;
    if (how->forward > 0)
        loss += how->forward * (r.p_gap / r.p_sum + shift);
    if (how->reverse > 0)
        loss -= how->reverse * (r.q_gap / r.q_sum + shift);
    if (has_slopes)
        loss += how->jensen_shannon * slopes(&r, how, shift);
    gradient(&r, how, T * weight, has_slopes);
    return T * T * loss;
}

/* --- rows ------------------------------------------------------------------------------------- */

/* z += weight (own / sum - [v = target]). */
static void
add_cross_entropy(const float *restrict own, double sum, ptrdiff_t vocab, ptrdiff_t target,
                  double weight, float *restrict z)
{
    const float factor = (float)(weight / sum);
    for (ptrdiff_t i = 0; i < vocab; i++)
        z[i] += factor * own[i];
    z[target] -= (float)weight;
}

static lbq_status
loss_task(void *context, ptrdiff_t t, int worker)
{
    const losses *const l = context;
    const lbq_loss *const how = &l->how;
    const ptrdiff_t vocab = l->vocab, target = l->target ? l->target[t] : -1;
    const double weight = l->weight ? (double)l->weight[t] : 1;
    LBQ_REQUIRE(
        isfinite(weight), LBQ_BAD_VALUE, "weight[%td] is %g, expected a finite number", t, weight);
    LBQ_REQUIRE(target >= -1 && target < vocab,
                LBQ_BAD_VALUE,
                "target[%td] is %td, expected -1 to %td",
                t,
                target,
                vocab - 1);
    float *const z = l->logits + t * vocab, *const scratch = l->scratch + worker * KEPT * vocab;
    float *const own = scratch + 2 * vocab;
    const float max = lbq_kernel.max_f32(z, vocab);
    const bool hard = how->cross_entropy > 0 && target >= 0;
    double sum = 0, loss = 0;
    if (hard)
        loss += how->cross_entropy * cross_entropy(z, vocab, target, max, own, &sum);
    if (l->soft)
        loss += divergences(how, vocab, z, max, l->teacher + t * vocab, weight, scratch);
    else
        memset(z, 0, (size_t)vocab * sizeof *z);
    if (hard)
        add_cross_entropy(own, sum, vocab, target, weight * how->cross_entropy, z);
    LBQ_REQUIRE(isfinite(loss),
                LBQ_BAD_VALUE,
                "row %td of logits%s has a NaN or infinity, or differences beyond float32",
                t,
                l->soft ? " or teacher" : "");
    l->loss[t] = loss;
    return LBQ_OK;
}

static lbq_status
check(const lbq_loss *how, bool soft, const float *teacher, const int32_t *target)
{
    const double all[] = {how->forward, how->reverse, how->jensen_shannon, how->cross_entropy};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        LBQ_REQUIRE(all[i] >= 0 && isfinite(all[i]),
                    LBQ_BAD_VALUE,
                    "a loss has weight %g, expected a finite number >= 0",
                    all[i]);
    LBQ_REQUIRE(how->temperature > 0 && isfinite(how->temperature),
                LBQ_BAD_VALUE,
                "temperature is %g, expected a finite number above 0",
                how->temperature);
    LBQ_REQUIRE(teacher || !soft, LBQ_BAD_VALUE, "a divergence has a weight, but teacher is None");
    LBQ_REQUIRE(target || !(how->cross_entropy > 0),
                LBQ_BAD_VALUE,
                "cross_entropy is %g, but target is None",
                how->cross_entropy);
    return LBQ_OK;
}

lbq_status
lbq_loss_gradient(const lbq_loss *how, ptrdiff_t tokens, ptrdiff_t vocab, float *logits,
                  const float *teacher, const int32_t *target, const float *weight, double *loss)
{
    losses l = {
        .how = *how,
        .soft = how->forward > 0 || how->reverse > 0 || how->jensen_shannon > 0,
        .vocab = vocab,
        .logits = logits,
        .teacher = teacher,
        .target = target,
        .weight = weight,
        .loss = loss,
    };
    LBQ_TRY(check(how, l.soft, teacher, target));
    const size_t rows = (size_t)lbq_threads() * KEPT;
    LBQ_TRY(lbq_allocate(rows * (size_t)vocab * sizeof *l.scratch, &l.scratch));
    const lbq_status status = lbq_parallel(tokens, loss_task, &l);
    lbq_free(l.scratch);
    return status;
}

/* --- drawing ---------------------------------------------------------------------------------- */

typedef struct {
    ptrdiff_t vocab;
    const float *logits;
    const double *uniform;
    int32_t *target;
} draws;

/* The first v of x with sum_{i <= v} exp(x[i] - max) > level; the last with a probability if
 * rounding leaves none. */
static ptrdiff_t
invert(const float *x, ptrdiff_t vocab, float max, double level)
{
    double sum = 0, before = 0; /* `before` the block from first to last, which has a probability */
    ptrdiff_t first = 0, last = 0;
    for (ptrdiff_t begin = 0; begin < vocab && sum <= level; begin += BLOCK) {
        const ptrdiff_t end = lbq_smaller(begin + BLOCK, vocab);
        const double block = lbq_kernel.exp_sum_f32(x + begin, end - begin, max);
        if (block > 0) {
            first = begin;
            last = end;
            before = sum;
        }
        sum += block;
    }
    ptrdiff_t found = first;
    for (ptrdiff_t v = first; v < last && before <= level; v++) {
        const double one = exp((double)x[v] - (double)max);
        found = one > 0 ? v : found;
        before += one;
    }
    return found;
}

static lbq_status
draw_task(void *context, ptrdiff_t t, int worker)
{
    (void)worker;
    const draws *const d = context;
    const float *const x = d->logits + t * d->vocab;
    const double uniform = d->uniform[t];
    LBQ_REQUIRE(uniform >= 0 && uniform < 1,
                LBQ_BAD_VALUE,
                "uniform[%td] is %g, expected 0 <= uniform < 1",
                t,
                uniform);
    const float max = lbq_kernel.max_f32(x, d->vocab);
    const double sum = lbq_kernel.exp_sum_f32(x, d->vocab, max);
    LBQ_REQUIRE(sum > 0 && isfinite(sum) && isfinite(max),
                LBQ_BAD_VALUE,
                "row %td of logits has a NaN or infinity",
                t);
    d->target[t] = (int32_t)invert(x, d->vocab, max, uniform * sum);
    return LBQ_OK;
}

lbq_status
lbq_draw(ptrdiff_t tokens, ptrdiff_t vocab, const float *logits, const double *uniform,
         int32_t *target)
{
    draws d = {.vocab = vocab, .logits = logits, .uniform = uniform, .target = target};
    return lbq_parallel(tokens, draw_task, &d);
}
