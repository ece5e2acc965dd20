/* Plain loops along the rows in float64, for exp and log are most of the work. Noise is computed
 * again on the way back instead of kept. */
#include "codes/soft.h"

#include "codes/latent.h"
#include "core/random.h"
#include "core/threads.h"

enum { CHUNK = 1 << 14 /* weights per task of functions of single weights */ };

typedef struct {
    const lbq_code *code;
    const lbq_softness *how;
    const float *V, *dW, *W;
    const uint8_t *lower, *words;
    float *weight, *dV, *start;
    uint8_t *bracket;
    float levels[256];
    /* the penalty */
    ptrdiff_t count;
    double strength, beta;
    uint8_t *chosen;
} job;

static job
job_of(const lbq_grids *grids, const lbq_softness *how)
{
    job j = {.code = grids->code, .how = how};
    for (int i = 0; i < grids->code->count && i < 256; i++)
        j.levels[i] = lbq_level_of(grids->code, i);
    return j;
}

/* h of weight number i, and its derivative by V. */
static double
bit_of(const lbq_softness *how, double V, ptrdiff_t i, double *slope)
{
    if (!how->sampled)
        return lbq_soft_bit(V, slope);
    if (how->noise > 0) {
        /* The middles of 2^53 intervals, so neither 0 nor 1. */
        const double u = lbq_random_uniform(how->seed, how->stream, (uint64_t)i) + 0x1p-54;
        V += how->noise * log(u / (1 - u));
    }
    *slope = 0;
    if (how->temperature == 0)
        return V > 0;
    const double h = 1 / (1 + exp(-V / how->temperature));
    *slope = h * (1 - h) / how->temperature;
    return h;
}

static void
visit_compose(const void *context, lbq_group *g)
{
    const job *const j = context;
    for (ptrdiff_t k = g->first; k < g->first + g->count; k++) {
        double slope;
        const double base = (double)j->levels[j->lower[k]];
        const double gap = (double)j->levels[j->lower[k] + 1] - base;
        const double level = base + bit_of(j->how, (double)j->V[k], k, &slope) * gap;
        j->weight[k] = (float)((double)g->scale * level + (double)g->offset);
    }
}

static void
visit_gradient(const void *context, lbq_group *g)
{
    const job *const j = context;
    const double scale = (double)g->scale;
    for (ptrdiff_t k = g->first; k < g->first + g->count; k++) {
        double slope;
        const int lower = j->lower[k];
        const double base = (double)j->levels[lower], gap = (double)j->levels[lower + 1] - base;
        const double h = bit_of(j->how, (double)j->V[k], k, &slope), d = (double)j->dW[k];
        j->dV[k] += (float)(d * scale * gap * slope);
        g->by_scale += d * (base + h * gap);
        g->by_offset += d;
        if (g->by_level) {
            g->by_level[lower] += d * scale * (1 - h);
            g->by_level[lower + 1] += d * scale * h;
        }
    }
}

/* The lower of the levels around v, which is rounded to `word`. */
static int
lower_of(const job *j, float v, int word)
{
    const float *const level = j->levels;
    const int top = j->code->count - 1;
    if (v >= level[word]) {
        while (word < top && level[word + 1] == level[word])
            word++;
    } else {
        while (word > 0 && level[word - 1] == level[word])
            word--;
        word--;
    }
    return word < 0 ? 0 : word == top ? top - 1 : word;
}

static void
visit_bracket(const void *context, lbq_group *g)
{
    const job *const j = context;
    for (ptrdiff_t k = g->first; k < g->first + g->count; k++) {
        float ends[2];
        lbq_code_start(j->code, j->words[k], ends);
        const float v = g->scale != 0 ? (j->W[k] - g->offset) / g->scale : 0;
        const float near = v > ends[0] ? v < ends[1] ? v : ends[1] : ends[0];
        const int lower = lower_of(j, near, j->words[k]);
        const double gap = (double)j->levels[lower + 1] - (double)j->levels[lower];
        const double found = gap != 0 ? ((double)near - (double)j->levels[lower]) / gap : 0.5;
        const double place = found > 0.01 ? found < 0.99 ? found : 0.99 : 0.01;
        j->bracket[k] = (uint8_t)lower;
        j->start[k] = (float)(j->how->sampled ? log(place / (1 - place)) : lbq_soft_start(place));
    }
}

lbq_status
lbq_soft_compose(const lbq_grids *grids, const lbq_softness *how, const float *V,
                 const uint8_t *lower, float *weight)
{
    LBQ_TRY(lbq_check_words(grids, lower, "lower", grids->code->count - 2));
    job j = job_of(grids, how);
    j.V = V;
    j.lower = lower;
    j.weight = weight;
    return lbq_visit_groups(grids, visit_compose, &j, NULL);
}

lbq_status
lbq_soft_gradient(const lbq_grids *grids, const lbq_softness *how, const float *V,
                  const uint8_t *lower, const float *dW, float *dV,
                  const lbq_grid_gradients *gradients)
{
    LBQ_TRY(lbq_check_words(grids, lower, "lower", grids->code->count - 2));
    job j = job_of(grids, how);
    j.V = V;
    j.lower = lower;
    j.dW = dW;
    j.dV = dV;
    return lbq_visit_groups(grids, visit_gradient, &j, gradients);
}

lbq_status
lbq_soft_bracket(const lbq_grids *grids, const lbq_softness *how, const float *W,
                 const uint8_t *words, float *V, uint8_t *lower)
{
    LBQ_TRY(lbq_check_words(grids, words, "words", grids->code->count - 1));
    job j = job_of(grids, how);
    j.W = W;
    j.words = words;
    j.start = V;
    j.bracket = lower;
    return lbq_visit_groups(grids, visit_bracket, &j, NULL);
}

static lbq_status
words_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const job *const j = context;
    const ptrdiff_t end = lbq_smaller((index + 1) * CHUNK, j->count);
    for (ptrdiff_t k = index * CHUNK; k < end; k++)
        j->chosen[k] = (uint8_t)(j->lower[k] + (j->V[k] > 0));
    return LBQ_OK;
}

lbq_status
lbq_soft_words(ptrdiff_t count, const float *V, const uint8_t *lower, uint8_t *words)
{
    job j = {.count = count, .V = V, .lower = lower, .chosen = words};
    return lbq_parallel(lbq_pieces(count, CHUNK), words_task, &j);
}

static lbq_status
penalty_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const job *const j = context;
    const ptrdiff_t end = lbq_smaller((index + 1) * CHUNK, j->count);
    for (ptrdiff_t k = index * CHUNK; k < end; k++) {
        double slope;
        const double h = lbq_soft_bit((double)j->V[k], &slope);
        j->dV[k] += (float)(j->strength * slope * lbq_soft_penalty_slope(h, j->beta));
    }
    return LBQ_OK;
}

lbq_status
lbq_soft_penalty(ptrdiff_t count, const float *V, double strength, double beta, float *dV)
{
    double sum = 0;
    for (ptrdiff_t k = 0; k < count; k++)
        sum += (double)dV[k] * (double)dV[k];
    job j = {
        .count = count,
        .V = V,
        .dV = dV,
        .strength = strength * sqrt(sum / (double)(count > 0 ? count : 1)),
        .beta = beta,
    };
    return lbq_parallel(lbq_pieces(count, CHUNK), penalty_task, &j);
}
