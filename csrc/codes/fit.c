/* Finding a group's scale and offset: by its range, or by the least squared error.
 *
 * For a fixed choice of codes v the error is a parabola in scale and offset, and its minimum
 * follows from the sums of v, v^2 and v w (S. Lloyd, "Least squares quantization in PCM", 1982,
 * with levels tied to a grid). So a candidate range is judged by the error after that refit, which
 * one pass over the group yields; from the best one refits and small moves of the two ends
 * descend until nothing helps. */
#include "codes/code.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <string.h>

#include "core/half.h"

/* --- what can be stored ------------------------------------------------------------------- */

enum { DOWN = -1, NEAREST, UP };

/* The float16 next to x; DOWN, UP: not above, not below x. */
static double
half_of(double x, int direction)
{
    const double largest = 65504;
    if (fabs(x) >= largest)
        return copysign(largest, x);
    const uint16_t bits = lbq_half_narrow((float)x);
    const double half = lbq_half_widen(bits);
    if (direction == NEAREST || half == x || (half > x) == (direction == UP))
        return half;
    if (half == 0)
        return direction * 0x1p-24;
    const bool away = (half > 0) == (direction == UP);
    return lbq_half_widen(away ? bits + 1 : bits - 1);
}

static double
float_of(double x, int direction)
{
    const float near = (float)x;
    if (direction == NEAREST || near == x || (near > x) == (direction == UP))
        return near;
    return nextafterf(near, direction == UP ? FLT_MAX : -FLT_MAX);
}

static double
stored_scale(const lbq_code *code, double scale, int direction)
{
    if (code->scale_bits == 16)
        return fmax(half_of(scale, direction), 0x1p-24);
    if (code->scale_bits == 0 || code->gamma == 0)
        return fmax(float_of(scale, direction), FLT_MIN);
    const double exact = scale / code->gamma;
    const double whole = direction == UP     ? ceil(exact)
                         : direction == DOWN ? floor(exact)
                                             : rint(exact);
    const double most = (1 << code->scale_bits) - 1;
    return (float)(fmin(fmax(whole, 1), most) * code->gamma);
}

/* A lone float32 offset is kept as the zero of the matrix, -zero * scale. */
static double
stored_offset(const lbq_code *code, double offset, double scale, int direction)
{
    if (code->symmetric)
        return -(double)code->zero * scale;
    if (code->scale_bits == 16)
        return half_of(offset, direction);
    const float zero = (float)(-offset / scale);
    return -zero * (float)scale;
}

/* --- the group, and sums over its codes ------------------------------------------------------ */

typedef struct {
    const lbq_code *code;
    double norm;
    ptrdiff_t count;
    const double *w, *importance;
    double low, high;   /* the least and the largest weight */
    double shift;       /* w in sums is weight minus shift, lest digits cancel */
    double h, hw, hww;  /* sums of importance times 1, w, w^2 */
    double first, last; /* levels */
    double middle[LBQ_MAX_LEVELS], jump[LBQ_MAX_LEVELS]; /* between neighbouring levels */
} group;

enum { LANES = 4 }; /* independent sums, so that the compiler may use vectors */

/* Sums of importance times v, v^2, v w over the codes at one scale and offset, v being a level,
 * and of importance |w - q|^norm. */
typedef struct {
    double v[LANES], vv[LANES], vw[LANES], error[LANES];
} sums;

/* Adds LANES weights; `h` or NULL. Inlined with constants it becomes one loop for each case. */
static inline void
add_block(const group *g, const double *w_in, const double *h, double scale, double offset,
          bool table, bool power, sums *s)
{
    const double inverse = 1 / scale;
    double w[LANES], x[LANES], v[LANES];
    for (int i = 0; i < LANES; i++) {
        w[i] = w_in[i] - g->shift;
        x[i] = (w[i] - offset) * inverse;
    }
    if (table) {
        for (int i = 0; i < LANES; i++)
            v[i] = g->first;
        for (int j = 0; j < g->code->count - 1; j++)
            for (int i = 0; i < LANES; i++)
                v[i] += x[i] > g->middle[j] ? g->jump[j] : 0;
    } else {
        for (int i = 0; i < LANES; i++) {
            double y = x[i] > 0 ? x[i] : 0;
            y = y < g->last ? y : g->last;
            v[i] = (y + 0x1.8p52) - 0x1.8p52; /* rounds to even without a call */
        }
    }
    for (int i = 0; i < LANES; i++) {
        const double hv = h ? h[i] * v[i] : v[i];
        s->v[i] += hv;
        s->vv[i] += hv * v[i];
        s->vw[i] += hv * w[i];
    }
    for (int i = 0; power && i < LANES; i++) {
        const double error = pow(fabs(w[i] - (scale * v[i] + offset)), g->norm);
        s->error[i] += h ? h[i] * error : error;
    }
}

static inline sums
sums_over(const group *g, double scale, double offset, bool weighted, bool table, bool power)
{
    sums s = {{0}, {0}, {0}, {0}};
    ptrdiff_t k = 0;
    for (; k + LANES <= g->count; k += LANES)
        add_block(
            g, g->w + k, weighted ? g->importance + k : NULL, scale, offset, table, power, &s);
    if (k < g->count) {
        double w[LANES] = {0}, h[LANES] = {0};
        for (int i = 0; k < g->count; i++, k++) {
            w[i] = g->w[k];
            h[i] = weighted ? g->importance[k] : 1;
        }
        add_block(g, w, h, scale, offset, table, power, &s);
    }
    return s;
}

static double
total(const double *lanes)
{
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

/* Sums over one group at one scale and offset, and what follows from them. */
typedef struct {
    double error;         /* sum importance |w - q|^norm */
    double scale, offset; /* the least squares refit for these codes; scale 0: there is none */
    double refit_error;   /* its sum of squares */
} trial;

static trial
try(const group *g, double scale, double unshifted)
{
    const double offset = unshifted - g->shift;
    const bool power = g->norm != 2;
    const bool table = g->code->levels != NULL;
    const sums lanes = power   ? g->importance ? sums_over(g, scale, offset, true, table, true)
                                               : sums_over(g, scale, offset, false, table, true)
                       : table ? g->importance ? sums_over(g, scale, offset, true, true, false)
                                               : sums_over(g, scale, offset, false, true, false)
                       : g->importance ? sums_over(g, scale, offset, true, false, false)
                                       : sums_over(g, scale, offset, false, false, false);
    const double v = total(lanes.v), vv = total(lanes.vv), vw = total(lanes.vw);
    const double squares = g->hww - 2 * (scale * vw + offset * g->hw) + scale * scale * vv +
                           2 * scale * offset * v + offset * offset * g->h;
    trial result = {.error = power ? total(lanes.error) : fmax(squares, 0)};
    const double z = g->code->zero;
    const double mean = g->code->symmetric ? z : v / g->h;
    const double shared = g->code->symmetric ? vw - z * g->hw : vw - v * g->hw / g->h;
    const double spread = g->code->symmetric ? vv - 2 * z * v + z * z * g->h : vv - v * v / g->h;
    if (spread > 0 && shared > 0) {
        result.scale = shared / spread;
        result.offset = g->shift + (g->code->symmetric ? 0 : g->hw / g->h) - result.scale * mean;
        const double explained = g->code->symmetric ? 0 : g->hw * g->hw / g->h;
        result.refit_error = fmax(g->hww - explained - shared * result.scale, 0);
    }
    return result;
}

/* --- ranges ---------------------------------------------------------------------------------- */

/* An integer with the same order as the double. */
static int64_t
order_of(double x)
{
    int64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits < 0 ? INT64_MIN - bits : bits;
}

static double
of_order(int64_t bits)
{
    double x;
    bits = bits < 0 ? INT64_MIN - bits : bits;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The quantile between order statistics as NumPy's "linear" has it. The lower one is found by
 * bisection over the bits of a double, which takes neither scratch nor a sort. */
static double
quantile(const group *g, double percent)
{
    const double position = percent / 100 * (double)(g->count - 1);
    const ptrdiff_t rank = (ptrdiff_t)position;
    int64_t low = order_of(g->low), high = order_of(g->high);
    while (low < high) {
        const int64_t half = low + (int64_t)(((uint64_t)high - (uint64_t)low) / 2);
        const double pivot = of_order(half);
        ptrdiff_t below = 0;
        for (ptrdiff_t k = 0; k < g->count; k++)
            below += g->w[k] <= pivot;
        if (below > rank)
            high = half;
        else
            low = half + 1;
    }
    const double here = of_order(low);
    ptrdiff_t below = 0;
    double next = g->high;
    for (ptrdiff_t k = 0; k < g->count; k++) {
        below += g->w[k] <= here;
        next = g->w[k] > here && g->w[k] < next ? g->w[k] : next;
    }
    next = below > rank + 1 ? here : next;
    return here + (next - here) * (position - (double)rank);
}

/* The finest grid over [low, high]. */
static void
grid_over(const group *g, double low, double high, double *scale, double *offset)
{
    if (g->code->symmetric) {
        const double z = g->code->zero;
        const double above = high > 0 && g->last > z ? high / (g->last - z) : 0;
        const double below = low < 0 && z > g->first ? low / (g->first - z) : 0;
        *scale = fmax(above, below);
        *offset = -z * *scale;
    } else {
        *scale = (high - low) / g->last;
        *offset = low;
    }
}

/* The same as it is stored, rounded so that it still covers the range. An offset that is kept as
 * zero * scale cannot reach a lone value by itself, so the grid then starts from 0. */
static void
stored_grid_over(const group *g, double low, double high, double *scale, double *offset)
{
    if (low == high && g->code->scale_bits == 0) {
        low = fmin(low, 0);
        high = fmax(high, 0);
    }
    grid_over(g, low, high, scale, offset);
    *scale = stored_scale(g->code, *scale, UP);
    *offset = stored_offset(g->code, *offset, *scale, DOWN);
    if (!g->code->symmetric && *offset + g->last * *scale < high) {
        *scale = stored_scale(g->code, (high - *offset) / g->last, UP);
        *offset = stored_offset(g->code, *offset, *scale, DOWN);
    }
}

/* --- the search ------------------------------------------------------------------------------ */

typedef struct {
    double error, scale, offset, next_scale, next_offset;
} best_fit;

/* Keeps what a trial yields if that is better: its refit, or under another norm than 2 the grid
 * itself, with the refit as what to try next. */
static bool
improves(const group *g, double scale, double offset, best_fit *best)
{
    const trial t = try(g, scale, offset);
    const bool squares = g->norm == 2;
    if (!(t.scale > 0 && (squares ? t.refit_error : t.error) < best->error * (1 - 1e-9)))
        return false;
    *best = (best_fit){
        .error = squares ? t.refit_error : t.error,
        .scale = squares ? t.scale : scale,
        .offset = squares ? t.offset : offset,
        .next_scale = t.scale,
        .next_offset = t.offset,
    };
    return true;
}

static void
descend(const group *g, best_fit *best)
{
    enum { REFITS = 20 }; /* usually 3 to 6 */
    for (int i = 0; i < REFITS; i++)
        if (!improves(g, best->next_scale, best->next_offset, best))
            break;
}

/* Moves the ends of the grid, by itself each or, about a fixed zero, both. */
static void
move_ends(const group *g, best_fit *best)
{
    static const double apart[][2] = {{1, 0}, {-1, 0}, {0, 1}, {0, -1}};
    static const double both[][2] = {{-1, 1}, {1, -1}};
    const bool fixed = g->code->symmetric;
    const double (*const moves)[2] = fixed ? both : apart;
    for (double step = 0.5; step > 0.1; step /= 2)
        for (int i = 0; i < (fixed ? 2 : 4); i++) {
            const double low = moves[i][0] * step * best->scale;
            const double high = moves[i][1] * step * best->scale;
            const double scale = best->scale + (high - low) / (g->last - g->first);
            const double offset = fixed ? -(double)g->code->zero * scale : best->offset + low;
            if (scale > 0 && improves(g, scale, offset, best))
                descend(g, best);
        }
}

static void
fit_least_error(const group *g, const lbq_range *range, double *scale, double *offset)
{
    best_fit best = {.error = HUGE_VAL};
    for (int i = 0; i < range->candidates; i++) {
        const double factor = 1 - range->shrink * i / range->candidates;
        double s, o;
        grid_over(g, factor * g->low, factor * g->high, &s, &o);
        if (s > 0)
            improves(g, s, o, &best);
    }
    stored_grid_over(g, g->low, g->high, scale, offset);
    if (best.error == HUGE_VAL)
        return; /* one value, or zeros */
    descend(g, &best);
    move_ends(g, &best);
    double least = try(g, *scale, *offset).error;
    const double middle = (g->first + g->last) / 2;
    for (int direction = DOWN; direction <= UP; direction += UP - DOWN) {
        const double s = stored_scale(g->code, best.scale, direction);
        const double o =
            stored_offset(g->code, best.offset + middle * (best.scale - s), s, NEAREST);
        const double error = try(g, s, o).error;
        if (error < least) {
            least = error;
            *scale = s;
            *offset = o;
        }
    }
}

static group
group_of(const lbq_code *code, double norm, ptrdiff_t count, const double *w,
         const double *importance)
{
    const int top = code->count - 1;
    group g = {
        .code = code,
        .norm = norm,
        .count = count,
        .w = w,
        .low = w[0],
        .high = w[0],
        .first = code->levels ? code->levels[0] : 0,
        .last = code->levels ? code->levels[top] : top,
    };
    for (int i = 0; code->levels && i < top; i++) {
        g.middle[i] = 0.5 * ((double)code->levels[i] + code->levels[i + 1]);
        g.jump[i] = (double)code->levels[i + 1] - code->levels[i];
    }
    double h = 0;
    for (ptrdiff_t k = 0; k < count; k++) {
        g.low = w[k] < g.low ? w[k] : g.low;
        g.high = w[k] > g.high ? w[k] : g.high;
        h += importance ? importance[k] : 0;
    }
    g.importance = h > 0 ? importance : NULL;
    g.shift = code->symmetric ? 0 : 0.5 * (g.low + g.high);
    for (ptrdiff_t k = 0; k < count; k++) {
        const double weight = g.importance ? importance[k] : 1;
        const double shifted = w[k] - g.shift;
        g.h += weight;
        g.hw += weight * shifted;
        g.hww += weight * shifted * shifted;
    }
    return g;
}

void
lbq_code_fit(const lbq_code *code, const lbq_range *range, ptrdiff_t count, const double *w,
             const double *importance, double *scale, double *offset)
{
    assert(count > 0 && (code->symmetric || !code->levels));
    const group g = group_of(code, range->norm, count, w, importance);
    switch (range->method) {
    case LBQ_RANGE_MINMAX:
        stored_grid_over(&g, range->clip * g.low, range->clip * g.high, scale, offset);
        break;
    case LBQ_RANGE_PERCENTILE: {
        const double low = quantile(&g, 100 - range->percentile);
        const double high = quantile(&g, range->percentile);
        stored_grid_over(&g, range->clip * low, range->clip * high, scale, offset);
        break;
    }
    case LBQ_RANGE_MSE:
        fit_least_error(&g, range, scale, offset);
        break;
    }
}
