/* Finds scales and offsets by a group's range or by minimum squared error, for sixteen groups at
 * once in the lanes of vectors.
 *
 * For fixed codes v the error is quadratic in scale and offset, and its minimum follows from sums
 * of v and of the residual r = (w - offset) / scale - v (S. Lloyd, "Least squares quantization in
 * PCM", 1982, with levels tied to a grid). So a candidate range is judged by its error after that
 * refit, which takes one pass over the group; then refits and small moves of the two ends improve
 * the best candidate until nothing helps. Sums of r keep digits that sums of w would lose to
 * cancellation: float32 is enough for 8 bits. */
#include "codes/code.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "codes/importance.h"
#include "codes/range.h"
#include "codes/stored.h"
#include "core/interrupt.h"
#include "core/threads.h"
#include "kernels/kernels.h"

/* --- the groups, and sums over their codes --------------------------------------------------- */

enum { LANES = LBQ_PANEL, BLOCK = 256 /* weights per lane summed in float32 */ };

typedef float lanes[LANES];

/* Weights are normalised to (weight - shift) / unit, to avoid cancellation and overflow; the search
 * works on normalised scales and offsets. */
typedef struct {
    const lbq_code *code;
    const lbq_groups *in;
    double norm;
    const float *importance; /* NULL if all zero */
    bool dominated;          /* see importance.h; implies importance */
    lanes low, high, unit, shift;
    float h[4][LANES]; /* sums of importance times 1, w, w^2; and 1 / h[0] */
    lanes error;       /* of the grids found by the search; else 0 */
    float first, last; /* levels */
    float middle[LBQ_MAX_LEVELS], jump[LBQ_MAX_LEVELS]; /* between neighbouring levels */
} groups;

/* Sums of importance times r, r v and r^2 at one scale and offset; POWER: sum of importance |scale
 * r|^norm. */
enum { R, RV, RR, POWER, SUMS };
typedef float sums[SUMS][LANES];

/* grid_sums_f32 and table_sums_f32 for any norm. */
static void
sum_slowly(const groups *g, ptrdiff_t count, const float *w, const float *h, const float *grid,
           const float *scale, sums s)
{
    memset(s, 0, sizeof(sums));
    for (ptrdiff_t k = 0; k < count; k++) {
        lanes x, v;
        for (int l = 0; l < LANES; l++)
            x[l] = w[k * LANES + l] * grid[l] + grid[LANES + l];
        if (g->code->levels) {
            for (int l = 0; l < LANES; l++)
                v[l] = g->first;
            for (int j = 0; j < g->code->count - 1; j++)
                for (int l = 0; l < LANES; l++)
                    v[l] += x[l] > g->middle[j] ? g->jump[j] : 0;
        } else {
            for (int l = 0; l < LANES; l++) {
                v[l] = x[l] > 0 ? x[l] : 0;
                v[l] = v[l] < g->last ? v[l] : g->last;
                v[l] = (v[l] + 0x1.8p23f) - 0x1.8p23f; /* rounds to even without a call */
            }
        }
        for (int l = 0; l < LANES; l++) {
            const float r = x[l] - v[l], weight = h ? h[k * LANES + l] : 1, hr = weight * r;
            s[R][l] += hr;
            s[RV][l] += hr * v[l];
            s[RR][l] += hr * r;
            s[POWER][l] += weight * (float)pow(fabs((double)(scale[l] * r)), g->norm);
        }
    }
}

/* Adds up the lanes if they are parts of one group. */
static void
join(const groups *g, double *x)
{
    double total = 0;
    for (int l = 0; g->in->together && l < LANES; l++)
        total += x[l];
    for (int l = 0; g->in->together && l < LANES; l++)
        x[l] = total;
}

static void
sum_block(const groups *g, ptrdiff_t begin, ptrdiff_t count, const float *h, const float *grid,
          const float *scale, sums s)
{
    const float *const w = g->in->w + begin * LANES;
    const int top = g->code->count - 1;
    if (g->norm != 2)
        sum_slowly(g, count, w, h, grid, scale, s);
    else if (g->code->levels)
        lbq_kernel.table_sums_f32(w, h, count, grid, g->first, top, g->middle, g->jump, s[0]);
    else
        lbq_kernel.grid_sums_f32(w, h, count, grid, top, s[0]);
}

static void
sum_groups(const groups *g, const float *grid, const float *scale, sums s)
{
    const ptrdiff_t count = g->in->count;
    if (count <= BLOCK && !g->in->together) {
        sum_block(g, 0, count, g->importance, grid, scale, s);
        return;
    }
    double total[SUMS][LANES] = {{0}};
    for (ptrdiff_t begin = 0; begin < count + (g->in->rest > 0); begin += BLOCK) {
        lanes first_ones;
        const float *h = g->importance ? g->importance + begin * LANES : NULL;
        ptrdiff_t rows = count - begin < BLOCK ? count - begin : BLOCK;
        if (rows > 0)
            sum_block(g, begin, rows, h, grid, scale, s);
        for (int i = 0; i < SUMS && rows > 0; i++)
            for (int l = 0; l < LANES; l++)
                total[i][l] += (double)s[i][l];
        if (begin + BLOCK <= count || g->in->rest == 0)
            continue;
        for (int l = 0; l < LANES; l++)
            first_ones[l] = l < g->in->rest;
        h = g->importance ? g->importance + count * LANES : first_ones;
        sum_block(g, count, 1, h, grid, scale, s);
        for (int i = 0; i < SUMS; i++)
            for (int l = 0; l < LANES; l++)
                total[i][l] += (double)s[i][l];
    }
    for (int i = 0; i < SUMS; i++) {
        join(g, total[i]);
        for (int l = 0; l < LANES; l++)
            s[i][l] = (float)total[i][l];
    }
}

/* A grid; the kernels take inverse and start. */
typedef struct {
    lanes inverse, start, scale, offset;
} grid;

/* Derived from the sums at one grid. */
typedef struct {
    lanes error;         /* sum importance |w - q|^norm */
    lanes scale, offset; /* least squares refit for these codes; scale 0: none */
    lanes refit_error;   /* its sum of squares */
} trial;                 /* as refit_f32 fills it */

static grid
grid_of(const float *scale, const float *offset)
{
    grid at;
    for (int l = 0; l < LANES; l++) {
        at.inverse[l] = 1 / scale[l];
        at.start[l] = -offset[l] * at.inverse[l];
        at.scale[l] = scale[l];
        at.offset[l] = offset[l];
    }
    return at;
}

typedef double wide[LANES];

/* In float64, for dominated groups. */
static void
judge(const groups *g, const grid *at, trial *t)
{
    lbq_judgement found;
    wide scale, offset;
    for (int l = 0; l < LANES; l++) {
        scale[l] = (double)at->scale[l];
        offset[l] = (double)at->offset[l];
    }
    lbq_judge_grid(g->code, g->in, g->importance, g->norm, scale, offset, &found);
    for (int l = 0; l < LANES; l++) {
        t->error[l] = (float)found.error[l];
        t->scale[l] = (float)found.scale[l];
        t->offset[l] = (float)found.offset[l];
    }
}

static float
fixed_zero(const groups *g)
{
    return g->code->symmetric ? g->code->zero : 0;
}

static void
try(const groups *g, const grid *at, trial *t)
{
    if (g->dominated) {
        judge(g, at, t);
        return;
    }
    sums s;
    sum_groups(g, at->inverse, at->scale, s);
    lbq_kernel.refit_f32(g->h[0], at->inverse, s[0], g->code->symmetric, fixed_zero(g), t->error);
    if (g->norm != 2)
        memcpy(t->error, s[POWER], sizeof t->error);
}

/* --- the search ------------------------------------------------------------------------------ */

typedef struct {
    lanes error, scale, offset;    /* as improve_f32 keeps them */
    lanes next_scale, next_offset; /* norm != 2 or dominated: the refit to try next */
} best_fit;

/* Stop when a step improves the error by less than this factor. */
#define ENOUGH (1 - 1e-5f)

/* Keeps the result of a trial where it is better: its refit, or the grid itself if norm != 2. In
 * dominated groups the refit's error is measured: sums at the previous grid cannot predict it,
 * because the large shares leave no digits for the small ones. */
static bool
improves(const groups *g, const float *scale, const float *offset, best_fit *best)
{
    if (lbq_interrupted() != LBQ_OK)
        return false;
    grid at = grid_of(scale, offset);
    if (g->norm == 2 && !g->dominated) {
        sums s;
        sum_groups(g, at.inverse, at.scale, s);
        return lbq_kernel.improve_f32(
            g->h[0], at.inverse, s[0], g->code->symmetric, fixed_zero(g), ENOUGH, best->error);
    }
    trial t;
    try(g, &at, &t);
    if (g->dominated) {
        for (int l = 0; l < LANES; l++)
            t.scale[l] = t.scale[l] > 0 ? t.scale[l] : scale[l];
        at = grid_of(t.scale, t.offset);
        try(g, &at, &t);
    }
    bool improved = false;
    for (int l = 0; l < LANES; l++)
        if (t.scale[l] > 0 && t.error[l] < best->error[l] * ENOUGH) {
            improved = true;
            best->error[l] = t.error[l];
            best->scale[l] = at.scale[l];
            best->offset[l] = at.offset[l];
            best->next_scale[l] = t.scale[l];
            best->next_offset[l] = t.offset[l];
        }
    return improved;
}

/* Refits the best grid to its own codes, up to `steps` times. */
static void
descend(const groups *g, int steps, best_fit *best)
{
    const bool squares = g->norm == 2 && !g->dominated;
    for (int i = 0; i < steps; i++) {
        lanes scale, offset;
        memcpy(scale, squares ? best->scale : best->next_scale, sizeof scale);
        memcpy(offset, squares ? best->offset : best->next_offset, sizeof offset);
        if (!improves(g, scale, offset, best))
            break;
    }
}

/* Moves the ends of the grid, one at a time or, about a fixed zero, both. Steps are in units of the
 * scale. Of first steps from 0.15 to 1.4 for a single end, 0.2 was best for 4 levels, 0.5 for 8 and
 * 0.6 for 16, by 0.2 to 1 % of the error. A descent after each successful move gains nothing. */
static void
move_ends(const groups *g, best_fit *best)
{
    static const float apart[][2] = {{1, 0}, {-1, 0}, {0, 1}, {0, -1}};
    static const float both[][2] = {{-1, 1}, {1, -1}};
    const bool fixed = g->code->symmetric;
    const float (*const moves)[2] = fixed ? both : apart;
    const float width = g->last - g->first;
    float step = fixed ? 0.5f : fminf(width / 14, 0.6f);
    for (int round = 0; round < 3; round++, step /= 2)
        for (int i = 0; i < (fixed ? 2 : 4); i++) {
            lanes scale, offset;
            for (int l = 0; l < LANES; l++) {
                const float low = moves[i][0] * step, high = moves[i][1] * step;
                const float part = 1 + (high - low) / width;
                scale[l] = best->scale[l] * (part > 0 ? part : 1);
                offset[l] =
                    fixed ? -g->code->zero * scale[l] : best->offset[l] + low * best->scale[l];
            }
            improves(g, scale, offset, best);
        }
}

/* The next power of two above |x|, at least 2^-100; 1 for 0. */
static inline float
power_above(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int32_t exponent = (bits >> 23 & 255) - 126;
    bits = (exponent > -100 ? exponent + 127 : 27) << 23;
    bits = x == 0 ? 127 << 23 : bits;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Normalises the weights, and computes the sums that do not depend on the scale. */
static void
centre(groups *g)
{
    const lbq_groups *const in = g->in;
    float change[2][LANES];
    for (int l = 0; l < LANES; l++) {
        const float size = fmaxf(fabsf(g->low[l]), fabsf(g->high[l]));
        const float range = g->code->symmetric ? size : g->high[l] - g->low[l];
        g->shift[l] = g->code->symmetric ? 0 : g->low[l] + 0.5f * (g->high[l] - g->low[l]);
        g->unit[l] = power_above(range);
        change[0][l] = g->shift[l];
        change[1][l] = 1 / g->unit[l];
        g->low[l] = (g->low[l] - g->shift[l]) * change[1][l];
        g->high[l] = (g->high[l] - g->shift[l]) * change[1][l];
    }
    bool some = false;
    for (ptrdiff_t i = 0; in->importance && !some && i < in->count * LANES + in->rest; i++)
        some = in->importance[i] > 0;
    g->importance = some ? in->importance : NULL;
    double total[3][LANES] = {{0}};
    for (ptrdiff_t begin = 0, rows; begin < in->count + (in->rest > 0); begin += rows) {
        const float *h = g->importance ? g->importance + begin * LANES : NULL;
        float first_ones[LANES], moments[3][LANES];
        rows = begin < in->count ? lbq_smaller(BLOCK, in->count - begin) : 1;
        for (int l = 0; l < LANES; l++)
            first_ones[l] = l < in->rest;
        if (begin == in->count && !h)
            h = first_ones;
        lbq_kernel.centre_f32(in->w + begin * LANES, h, rows, change[0], moments[0]);
        for (int i = 0; i < 3; i++)
            for (int l = 0; l < LANES; l++)
                total[i][l] += (double)moments[i][l];
    }
    for (int i = 0; i < 3; i++) {
        join(g, total[i]);
        for (int l = 0; l < LANES; l++)
            g->h[i][l] = (float)total[i][l];
    }
    for (int l = 0; l < LANES; l++)
        g->h[3][l] = 1 / g->h[0][l];
    g->dominated = g->importance && lbq_dominated(in, g->importance, (double)g->h[0][0]);
}

/* Tries the candidate ranges, then descends from the best one. */
static void
search(const groups *g, const lbq_search *range, best_fit *best)
{
    lanes whole_scale, whole_offset, origin;
    wide low, high, scales, offsets;
    for (int l = 0; l < LANES; l++) {
        low[l] = (double)g->low[l];
        high[l] = (double)g->high[l];
    }
    lbq_grids_over(g->code, low, high, scales, offsets);
    for (int l = 0; l < LANES; l++) {
        /* Ranges shrink towards zero, or towards their nearer end if they do not contain it. */
        const float zero = -g->shift[l] / g->unit[l];
        origin[l] = fminf(fmaxf(zero, g->low[l]), g->high[l]);
        whole_scale[l] = (float)scales[l];
        whole_offset[l] = (float)offsets[l];
        best->error[l] = HUGE_VALF;
        best->scale[l] = best->next_scale[l] = 1;
        best->offset[l] = best->next_offset[l] = 0;
    }
    for (int i = 0; i < range->candidates; i++) {
        const float factor = (float)(1 - range->shrink * i / range->candidates);
        lanes scale, offset;
        for (int l = 0; l < LANES; l++) {
            /* A single value has no range: every trial fails. */
            scale[l] = whole_scale[l] > 0 ? factor * whole_scale[l] : 1;
            offset[l] = g->code->symmetric ? factor * whole_offset[l]
                                           : origin[l] + factor * (whole_offset[l] - origin[l]);
        }
        improves(g, scale, offset, best);
    }
    descend(g, 1, best);
    move_ends(g, best);
    descend(g, 20, best);
}

/* Scales near the best one that dominated groups try, a few float16 steps apart. Each leaves a
 * different error when its offset is rounded; the smallest of 13 is a tenth of one alone. */
enum { NEARBY = 6 };
#define APART (1.0 / 512)

/* The best grid in stored form, its scale rounded down (way 1), up (2) or to one nearby, while the
 * level `pivot` keeps its value. */
static void
store_best(const groups *g, const best_fit *best, int way, const double *pivot, double *s,
           double *o)
{
    const int direction = way == 1 ? LBQ_DOWN : way == 2 ? LBQ_UP : LBQ_NEAREST;
    const double change = direction == LBQ_NEAREST ? (way - 3 - NEARBY) * APART : 0;
    wide found;
    for (int l = 0; l < LANES; l++) {
        found[l] = (double)best->scale[l] * (double)g->unit[l];
        s[l] = found[l] + change * found[l];
        o[l] = (double)g->shift[l] + (double)best->offset[l] * (double)g->unit[l];
    }
    lbq_store_scales(g->code, direction, s);
    for (int l = 0; l < LANES; l++)
        o[l] += pivot[l] * (found[l] - s[l]);
    lbq_store_offsets(g->code, s, LBQ_NEAREST, o);
}

/* The middle level; in dominated groups the level of the large shares. */
static void
find_pivot(const groups *g, const best_fit *best, double *pivot)
{
    lbq_judgement at_best;
    wide scale, offset;
    for (int l = 0; l < LANES; l++) {
        pivot[l] = 0.5 * ((double)g->first + (double)g->last);
        scale[l] = (double)best->scale[l];
        offset[l] = (double)best->offset[l];
    }
    if (!g->dominated)
        return;
    lbq_judge_grid(g->code, g->in, g->importance, g->norm, scale, offset, &at_best);
    memcpy(pivot, at_best.level, sizeof at_best.level);
}

/* Normalises grids (s, o). */
static void
narrow_grid(const groups *g, const double *s, const double *o, float *scale, float *offset)
{
    for (int l = 0; l < LANES; l++) {
        scale[l] = (float)(s[l] / (double)g->unit[l]);
        offset[l] = (float)((o[l] - (double)g->shift[l]) / (double)g->unit[l]);
    }
}

static void
fit_least_error(groups *g, const lbq_search *range, float *scale, float *offset)
{
    lbq_range_fit(g->code, 1, g->low, g->high, scale, offset);
    centre(g);
    best_fit best;
    search(g, range, &best);
    wide pivot;
    find_pivot(g, &best, pivot);
    lanes least;
    const int trials = g->dominated ? 3 + 2 * NEARBY + 1 : 3;
    for (int i = 0; i < trials; i++) {
        wide s, o;
        lanes narrow_s, narrow_o;
        for (int l = 0; l < LANES; l++) {
            s[l] = (double)scale[l];
            o[l] = (double)offset[l];
        }
        if (i > 0)
            store_best(g, &best, i, pivot, s, o);
        narrow_grid(g, s, o, narrow_s, narrow_o);
        const grid at = grid_of(narrow_s, narrow_o);
        trial t;
        try(g, &at, &t);
        for (int l = 0; l < LANES; l++)
            if (i == 0 || (t.error[l] < least[l] && best.error[l] < HUGE_VALF)) {
                least[l] = t.error[l];
                scale[l] = (float)s[l];
                offset[l] = (float)o[l];
            }
    }
    memcpy(g->error, least, sizeof least);
}

/* Marks grids that may be worse than zeros: coarse ones, and grids of groups whose important
 * weights are zero. */
static bool
find_doubtful(const groups *g, const float *scale, bool *doubtful)
{
    const float coarse = lbq_coarse_scale(g->code);
    bool any = false;
    for (int l = 0; l < LANES; l++) {
        const float shift = g->shift[l] / g->unit[l];
        const float zeros = g->h[2][l] + shift * (2 * g->h[1][l] + shift * g->h[0][l]);
        doubtful[l] = scale[l] <= coarse || (g->norm == 2 && g->error[l] > zeros);
        any |= doubtful[l];
    }
    return any;
}

/* Replaces grids that are worse than zeros by zeros. In float16 also replaces coarse grids that are
 * less than 10 % better: GPTQ would lose that gain when it feeds errors to a few weights of one
 * step. */
static void
prefer_zeros(const groups *g, float *scale, float *offset)
{
    const float coarse = lbq_coarse_scale(g->code);
    bool doubtful[LANES];
    if (!find_doubtful(g, scale, doubtful))
        return;
    wide s, o, origin, zeros, none = {0};
    lbq_judgement found;
    for (int l = 0; l < LANES; l++) {
        s[l] = (double)scale[l] / (double)g->unit[l];
        o[l] = ((double)offset[l] - (double)g->shift[l]) / (double)g->unit[l];
        origin[l] = -(double)g->shift[l] / (double)g->unit[l];
    }
    lbq_judge_grid(g->code, g->in, g->importance, g->norm, s, o, &found);
    lbq_judge_value(g->in, g->importance, g->norm, origin, zeros);
    if (g->code->scale_bits != 16 && !g->code->symmetric) /* offsets are -zero * scale */
        lbq_store_scales(g->code, LBQ_NEAREST, none);
    for (int l = 0; l < LANES; l++) {
        const double gain = g->code->scale_bits == 16 && scale[l] <= coarse ? 0.9 : 1;
        if (doubtful[l] && found.error[l] > gain * zeros[l]) {
            scale[l] = (float)none[l];
            offset[l] = g->code->symmetric ? -g->code->zero * scale[l] : 0;
        }
    }
}

static groups
groups_of(const lbq_code *code, double norm, const lbq_groups *in)
{
    const int top = code->count - 1;
    groups g = {
        .code = code,
        .in = in,
        .norm = norm,
        .first = code->levels ? code->levels[0] : 0,
        .last = code->levels ? code->levels[top] : (float)top,
    };
    for (int i = 0; code->levels && i < top; i++) {
        g.middle[i] = 0.5f * (code->levels[i] + code->levels[i + 1]);
        g.jump[i] = code->levels[i + 1] - code->levels[i];
    }
    for (int l = 0; l < LANES; l++)
        g.unit[l] = 1;
    lbq_groups_range(in, g.low, g.high);
    return g;
}

void
lbq_code_fit(const lbq_code *code, const lbq_search *range, const lbq_groups *in, float *scale,
             float *offset)
{
    assert(in->count + in->rest > 0 && (code->symmetric || !code->levels));
    groups g = groups_of(code, range->norm, in);
    lanes low, high;
    switch (range->method) {
    case LBQ_RANGE_PERCENTILE:
        lbq_groups_quantile(in, g.low, g.high, 100 - range->percentile, low);
        lbq_groups_quantile(in, g.low, g.high, range->percentile, high);
        lbq_range_fit(code, range->clip, low, high, scale, offset);
        break;
    case LBQ_RANGE_MSE:
        fit_least_error(&g, range, scale, offset);
        break;
    case LBQ_RANGE_MINMAX:
        lbq_range_fit(code, range->clip, g.low, g.high, scale, offset);
        break;
    }
    if (code->symmetric || range->method == LBQ_RANGE_MSE)
        prefer_zeros(&g, scale, offset);
}
