/* Plain loops along the rows, which the compiler vectorises for grids: 4 bytes are read and 4
 * written for each weight. */
#include "codes/latent.h"

#include "core/threads.h"

typedef struct {
    const lbq_code *code;
    float share;
    bool clipped;
    const float *x, *unit, *dW, *W;
    const uint8_t *given; /* words */
    float *weight, *dx, *start;
    uint8_t *words;
    float middle[LBQ_MAX_LEVELS]; /* between levels of a table */
    float low, high;              /* beyond these v is clipped */
} job;

/* Of the gap between two levels. Error feedback leaves many weights with another word than the
 * nearest. Moved just inside the half, they flip back in the first steps and a model of random
 * weights in int2g32 got from a divergence of 0.166 to 0.28 nats in four steps of distill; at 0.4
 * it does not, and after 100 steps a block its outputs are as near. At 0.25 few words change. */
#define INSIDE 0.4f

enum { RUN = 64, LANES = 4 }; /* weights between two additions to the sums; sums side by side */

void
lbq_code_start(const lbq_code *code, int word, float ends[2])
{
    const int top = code->count - 1;
    const float level = lbq_level_of(code, word);
    int before = word, after = word;
    while (before > 0 && lbq_level_of(code, before) == level)
        before--;
    while (after < top && lbq_level_of(code, after) == level)
        after++;
    float below = level - lbq_level_of(code, before), above = lbq_level_of(code, after) - level;
    below = below > 0 ? below : above;
    above = above > 0 ? above : below;
    ends[0] = level - below * INSIDE;
    ends[1] = level + above * INSIDE;
}

static job
job_of(const lbq_grids *grids, const lbq_latent *how)
{
    const lbq_code *const code = grids->code;
    job j = {.code = code, .share = how ? how->share : 1, .clipped = how && how->clipped};
    const int top = code->count - 1;
    for (int i = 0; i < top && code->levels; i++)
        j.middle[i] = 0.5f * (code->levels[i] + code->levels[i + 1]);
    j.low = lbq_level_of(code, 0) - 0.5f * (lbq_level_of(code, 1) - lbq_level_of(code, 0));
    j.high =
        lbq_level_of(code, top) + 0.5f * (lbq_level_of(code, top) - lbq_level_of(code, top - 1));
    return j;
}

/* Positions of up to RUN weights of a group, and the levels nearest to them. */
typedef struct {
    float v[RUN], level[RUN];
    int word[RUN];
} run;

static void
round_to_grid(int top, run *r)
{
    const float most = (float)top;
    for (int k = 0; k < RUN; k++) {
        const float v = r->v[k], clipped = v > 0 ? v < most ? v : most : 0; /* 0 for a NaN */
        r->level[k] = (clipped + 0x1.8p23f) - 0x1.8p23f; /* to nearest, ties to even */
        r->word[k] = (int)r->level[k];
    }
}

static void
round_to_table(const job *j, run *r)
{
    for (int k = 0; k < RUN; k++)
        r->word[k] = 0;
    for (int i = 0; i + 1 < j->code->count; i++)
        for (int k = 0; k < RUN; k++)
            r->word[k] += r->v[k] > j->middle[i];
    for (int k = 0; k < RUN; k++)
        r->level[k] = j->code->levels[r->word[k]];
}

/* The run of `count` weights from number `first` on. */
static void
round_run(const job *j, const lbq_group *g, ptrdiff_t first, ptrdiff_t count, run *r)
{
    const float slope = g->scale != 0 ? j->unit[g->at] / g->scale : 0;
    const float start = g->scale != 0 ? -g->offset / g->scale : 0;
    for (ptrdiff_t k = 0; k < count; k++)
        r->v[k] = j->x[first + k] * slope + start;
    for (ptrdiff_t k = count; k < RUN; k++)
        r->v[k] = 0;
    if (j->code->levels)
        round_to_table(j, r);
    else
        round_to_grid(j->code->count - 1, r);
}

static void
visit_compose(const void *context, lbq_group *g)
{
    const job *const j = context;
    const float scale = g->scale, offset = g->offset, share = j->share;
    const float rest = (1 - share) * j->unit[g->at];
    for (ptrdiff_t first = g->first, left = g->count; left > 0; first += RUN, left -= RUN) {
        run r;
        const ptrdiff_t count = lbq_smaller(RUN, left);
        round_run(j, g, first, count, &r);
        const float *const x = j->x + first;
        float *const restrict w = j->weight + first;
        for (ptrdiff_t k = 0; k < count; k++)
            w[k] = rest * x[k] + share * (scale * r.level[k] + offset);
    }
}

static void
visit_words(const void *context, lbq_group *g)
{
    const job *const j = context;
    for (ptrdiff_t first = g->first, left = g->count; left > 0; first += RUN, left -= RUN) {
        run r;
        const ptrdiff_t count = lbq_smaller(RUN, left);
        round_run(j, g, first, count, &r);
        for (ptrdiff_t k = 0; k < count; k++)
            j->words[first + k] = (uint8_t)r.word[k];
    }
}

/* Sums in float64, LANES side by side, for the compiler to vectorise. */
typedef struct {
    double by_scale[LANES], by_offset[LANES];
} run_sums;

/* Adds a run to dx and to the sums. */
static void
pull_run(const job *j, const lbq_group *g, ptrdiff_t first, ptrdiff_t count, const run *r,
         run_sums *sums)
{
    const float unit = j->unit[g->at], low = j->low, high = j->high;
    const float inner = (1 - j->share) * unit + j->share * unit;
    const float outer = j->clipped ? (1 - j->share) * unit : inner, more = inner - outer;
    const float *const dW = j->dW + first;
    float *const restrict dx = j->dx + first;
    float d[RUN] = {0}, by_scale[RUN], by_offset[RUN];
    for (int k = 0; k < RUN; k++) {
        const float inside = (float)((r->v[k] >= low) & (r->v[k] <= high));
        by_scale[k] = r->level[k] - inside * r->v[k];
        by_offset[k] = 1 - inside;
    }
    for (ptrdiff_t k = 0; k < count; k++) {
        dx[k] += dW[k] * (inner - more * by_offset[k]);
        d[k] = dW[k];
    }
    for (int k = 0; k < RUN; k += LANES)
        for (int l = 0; l < LANES; l++) {
            sums->by_scale[l] += (double)d[k + l] * (double)by_scale[k + l];
            sums->by_offset[l] += (double)d[k + l] * (double)by_offset[k + l];
        }
}

static void
visit_gradient(const void *context, lbq_group *g)
{
    const job *const j = context;
    const double share = (double)j->share;
    run_sums sums = {0};
    for (ptrdiff_t first = g->first, left = g->count; left > 0; first += RUN, left -= RUN) {
        run r;
        const ptrdiff_t count = lbq_smaller(RUN, left);
        round_run(j, g, first, count, &r);
        pull_run(j, g, first, count, &r, &sums);
        for (ptrdiff_t k = 0; k < count && g->by_level; k++)
            g->by_level[r.word[k]] += share * (double)g->scale * (double)j->dW[first + k];
    }
    for (int l = 0; l < LANES; l++) {
        g->by_scale += share * sums.by_scale[l];
        g->by_offset += share * sums.by_offset[l];
    }
}

static void
visit_start(const void *context, lbq_group *g)
{
    const job *const j = context;
    const float unit = j->unit[g->at];
    for (ptrdiff_t k = g->first; k < g->first + g->count; k++) {
        float ends[2];
        lbq_code_start(j->code, j->given[k], ends);
        const float v = g->scale != 0 ? (j->W[k] - g->offset) / g->scale : 0;
        const float near = v > ends[0] ? v < ends[1] ? v : ends[1] : ends[0];
        j->start[k] = unit != 0 ? (near * g->scale + g->offset) / unit : 0;
    }
}

lbq_status
lbq_latent_compose(const lbq_grids *grids, const lbq_latent *how, const float *x, const float *unit,
                   float *weight)
{
    job j = job_of(grids, how);
    j.x = x;
    j.unit = unit;
    j.weight = weight;
    return lbq_visit_groups(grids, visit_compose, &j, NULL);
}

lbq_status
lbq_latent_words(const lbq_grids *grids, const float *x, const float *unit, uint8_t *words)
{
    job j = job_of(grids, NULL);
    j.x = x;
    j.unit = unit;
    j.words = words;
    return lbq_visit_groups(grids, visit_words, &j, NULL);
}

lbq_status
lbq_latent_gradient(const lbq_grids *grids, const lbq_latent *how, const float *x,
                    const float *unit, const float *dW, float *dx,
                    const lbq_grid_gradients *gradients)
{
    job j = job_of(grids, how);
    j.x = x;
    j.unit = unit;
    j.dW = dW;
    j.dx = dx;
    return lbq_visit_groups(grids, visit_gradient, &j, gradients);
}

lbq_status
lbq_latent_start(const lbq_grids *grids, const float *W, const uint8_t *words, const float *unit,
                 float *x)
{
    LBQ_TRY(lbq_check_words(grids, words, "words", grids->code->count - 1));
    job j = job_of(grids, NULL);
    j.W = W;
    j.given = words;
    j.unit = unit;
    j.start = x;
    return lbq_visit_groups(grids, visit_start, &j, NULL);
}
