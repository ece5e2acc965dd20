/* AdaRound in Gram form: rows are independent, so all of them share one matrix product per step. */
#include "gptq/adaround.h"

#include <math.h>

#include "codes/soft.h"
#include "core/blas.h"
#include "core/interrupt.h"
#include "core/memory.h"
#include "core/threads.h"
#include "gptq/hessian.h"

enum { WARM_UP = 5, SWEEPS = 20 }; /* the first fifth of the steps has no penalty */

typedef struct {
    const lbq_code *code;
    ptrdiff_t cols, group, groups;
    const float *W, *scale, *offset;
    uint8_t *codes;            /* the lower neighbour; finally the result */
    double *H, *diagonal;      /* (cols, cols), both triangles; (cols) */
    float *narrow;             /* H in float32 */
    float *rest, *gap;         /* w - lower, upper - lower */
    float *V, *first, *second; /* Adam's; `first` becomes the best bits */
    float *error, *gradient;   /* w - q, and its product with H */
    double *rows;              /* (threads, 3 cols) */
    double *softest;           /* (rows) */
    /* of this step */
    double unit, strength, beta, rate, decay_first, decay_second;
} job;

static double
clamp(double x, double low, double high)
{
    return x < low ? low : x > high ? high : x;
}

/* Brackets each weight by two neighbouring values and starts V at its position between them. */
static lbq_status
bracket_row(void *context, ptrdiff_t row, int worker)
{
    const job *const j = context;
    (void)worker;
    for (ptrdiff_t k = 0; k < j->cols; k++) {
        const ptrdiff_t at = row * j->cols + k, g = row * j->groups + k / j->group;
        const double w = j->W[at], scale = j->scale[g], offset = j->offset[g];
        LBQ_REQUIRE(isfinite(w),
                    LBQ_BAD_VALUE,
                    "weight[%td, %td] is %g, expected finite numbers",
                    row,
                    k,
                    w);
        const int nearest = lbq_code_encode(j->code, w, scale, offset);
        const double value = lbq_code_decode(j->code, (uint8_t)nearest, scale, offset);
        const int below = nearest - ((w - value) * scale < 0), last = lbq_level_count(j->code) - 2;
        const int lower = below < 0 ? 0 : below > last ? last : below;
        const double base = lbq_code_decode(j->code, (uint8_t)lower, scale, offset);
        const double next = lbq_code_decode(j->code, (uint8_t)(lower + 1), scale, offset);
        const double place = next == base ? 0.5 : clamp((w - base) / (next - base), 0, 1);
        j->codes[at] = (uint8_t)lower;
        j->rest[at] = (float)(w - base);
        j->gap[at] = (float)(next - base);
        j->V[at] = (float)lbq_soft_start(place);
        j->first[at] = j->second[at] = 0;
        j->error[at] = (float)(w - base - place * (next - base));
    }
    return LBQ_OK;
}

/* One step of Adam (D. Kingma, J. Ba, 2015) for a row. */
static lbq_status
step_row(void *context, ptrdiff_t row, int worker)
{
    const job *const j = context;
    (void)worker;
    double softest = 0;
    for (ptrdiff_t at = row * j->cols; at < (row + 1) * j->cols; at++) {
        double slope;
        double h = lbq_soft_bit(j->V[at], &slope);
        const double penalty = j->strength > 0 ? lbq_soft_penalty_slope(h, j->beta) : 0;
        const double descent =
            slope * (-2 * j->gradient[at] * j->gap[at] / j->unit + j->strength * penalty);
        j->first[at] = (float)(0.9 * j->first[at] + 0.1 * descent);
        j->second[at] = (float)(0.99 * j->second[at] + 0.01 * descent * descent);
        const double mean = j->first[at] / j->decay_first;
        const double size_of_step = sqrt(j->second[at] / j->decay_second) + 1e-8;
        j->V[at] -= (float)(j->rate * mean / size_of_step);
        h = lbq_soft_bit(j->V[at], &slope);
        j->error[at] = (float)(j->rest[at] - h * j->gap[at]);
        softest = fmax(softest, fmin(h, 1 - h));
    }
    j->softest[row] = softest;
    return LBQ_OK;
}

/* A row's error e, H e, and `turn`, what flipping each bit adds to e. */
typedef struct {
    const double *H, *diagonal;
    ptrdiff_t cols;
    double *e, *He, *turn;
} row_state;

static void
flip(const row_state *s, ptrdiff_t k)
{
    for (ptrdiff_t i = 0; i < s->cols; i++)
        s->He[i] += s->turn[k] * s->H[k * s->cols + i];
    s->e[k] += s->turn[k];
    s->turn[k] = -s->turn[k];
}

/* What flipping bit k adds to e H e^T. */
static double
change(const row_state *s, ptrdiff_t k)
{
    return s->turn[k] * (2 * s->He[k] + s->turn[k] * s->diagonal[k]);
}

/* Flips single bits and pairs while that lowers the error; returns it. */
static double
descend(const row_state *s, double tolerance)
{
    bool moved = true;
    for (int sweep = 0; moved && sweep < SWEEPS; sweep++) {
        moved = false;
        for (ptrdiff_t k = 0; k < s->cols; k++) {
            if (lbq_interrupted() != LBQ_OK)
                return HUGE_VAL;
            const double alone = change(s, k);
            double least = alone;
            ptrdiff_t partner = k;
            for (ptrdiff_t i = 0; i < s->cols; i++) {
                const double joint =
                    alone + change(s, i) + 2 * s->turn[k] * s->turn[i] * s->H[k * s->cols + i];
                if (joint < least && i != k) {
                    least = joint;
                    partner = i;
                }
            }
            if (!(least < -tolerance))
                continue;
            flip(s, k);
            if (partner != k)
                flip(s, partner);
            moved = true;
        }
    }
    double error = 0;
    for (ptrdiff_t k = 0; k < s->cols; k++)
        error += s->e[k] * s->He[k];
    return error;
}

static void
start(const row_state *s)
{
    for (ptrdiff_t k = 0; k < s->cols; k++)
        s->He[k] = 0;
    for (ptrdiff_t i = 0; i < s->cols; i++)
        for (ptrdiff_t k = 0; k < s->cols; k++)
            s->He[k] += s->e[i] * s->H[i * s->cols + k];
}

/* The better of two descents, from rounding to nearest and from Adam's bits. */
static lbq_status
finish_row(void *context, ptrdiff_t row, int worker)
{
    const job *const j = context;
    double *const scratch = j->rows + worker * 3 * j->cols;
    const row_state s = {
        .H = j->H,
        .diagonal = j->diagonal,
        .cols = j->cols,
        .e = scratch,
        .He = scratch + j->cols,
        .turn = scratch + 2 * j->cols,
    };
    const ptrdiff_t begin = row * j->cols;
    double least = HUGE_VAL;
    for (int adam = 0; adam < 2; adam++) {
        for (ptrdiff_t k = 0; k < j->cols; k++) {
            const double gap = j->gap[begin + k], rest = j->rest[begin + k];
            const bool up = adam ? j->V[begin + k] > 0 : fabs(rest - gap) < fabs(rest);
            s.e[k] = rest - up * gap;
            s.turn[k] = up ? gap : -gap;
        }
        start(&s);
        const double error = descend(&s, 1e-9 * j->unit);
        LBQ_TRY(lbq_interrupted());
        for (ptrdiff_t k = 0; error < least && k < j->cols; k++)
            j->first[begin + k] = s.turn[k] * j->gap[begin + k] > 0;
        least = error < least ? error : least;
    }
    for (ptrdiff_t k = 0; k < j->cols; k++)
        j->codes[begin + k] += j->first[begin + k] > 0;
    return LBQ_OK;
}

static lbq_status
run(job *j, const lbq_adaround_options *options, ptrdiff_t rows, const double *H)
{
    const ptrdiff_t cols = j->cols;
    LBQ_TRY(lbq_hessian_unfold(cols, H, 0, j->H));
    for (ptrdiff_t i = 0; i < cols * cols; i++)
        j->narrow[i] = (float)j->H[i];
    for (ptrdiff_t k = 0; k < cols; k++)
        j->diagonal[k] = j->H[k * cols + k];
    LBQ_TRY(lbq_parallel(rows, bracket_row, j));
    double sum = 0;
    for (ptrdiff_t at = 0; at < rows * cols; at++)
        sum += (double)j->gap[at] * j->gap[at] * j->diagonal[at % cols];
    /* Rounding errors are uniform over the gap, so their mean square is gap^2 / 12. */
    j->unit = sum > 0 ? sum / 12 / (double)(rows * cols) : 1;
    j->rate = options->rate;
    const int warm_up = options->steps / WARM_UP;
    for (int step = 0; step < options->steps; step++) {
        const double part = (double)(step - warm_up) / fmax(options->steps - warm_up, 1);
        j->strength = part > 0 ? options->strength : 0;
        j->beta = 2 + 18 * (1 - clamp(part / 0.7, 0, 1));
        j->decay_first = 1 - pow(0.9, step + 1);
        j->decay_second = 1 - pow(0.99, step + 1);
        LBQ_TRY(lbq_sgemm(CblasNoTrans,
                          CblasNoTrans,
                          rows,
                          cols,
                          cols,
                          1,
                          j->error,
                          cols,
                          j->narrow,
                          cols,
                          0,
                          j->gradient,
                          cols));
        LBQ_TRY(lbq_parallel(rows, step_row, j));
    }
    return lbq_parallel(rows, finish_row, j);
}

lbq_status
lbq_adaround(const lbq_code *code, const lbq_adaround_options *options, ptrdiff_t rows,
             ptrdiff_t cols, ptrdiff_t group, const float *W, const double *H, const float *scale,
             const float *offset, uint8_t *codes, double *softness)
{
    LBQ_TRY(lbq_code_check_ordered(code));
    LBQ_REQUIRE(rows > 0 && cols > 0 && group > 0 && rows <= INT32_MAX && cols <= INT32_MAX,
                LBQ_BAD_SHAPE,
                "%td rows, %td columns in groups of %td",
                rows,
                cols,
                group);
    const size_t matrix = lbq_padded((size_t)(rows * cols) * sizeof(float));
    const size_t gram = lbq_padded((size_t)(cols * cols) * sizeof(double));
    const size_t narrow = lbq_padded((size_t)(cols * cols) * sizeof(float));
    const size_t scratch = lbq_padded((size_t)(3 * cols) * (size_t)lbq_threads() * sizeof(double));
    const size_t vectors = lbq_padded((size_t)cols * sizeof(double));
    const size_t per_row = lbq_padded((size_t)rows * sizeof(double));
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, 7 * matrix + gram + narrow + scratch + vectors + per_row));
    job j = {
        .code = code,
        .cols = cols,
        .group = group,
        .groups = (cols - 1) / group + 1,
        .W = W,
        .scale = scale,
        .offset = offset,
        .codes = codes,
        .H = lbq_arena_take(&arena, gram),
        .diagonal = lbq_arena_take(&arena, vectors),
        .narrow = lbq_arena_take(&arena, narrow),
        .rest = lbq_arena_take(&arena, matrix),
        .gap = lbq_arena_take(&arena, matrix),
        .V = lbq_arena_take(&arena, matrix),
        .first = lbq_arena_take(&arena, matrix),
        .second = lbq_arena_take(&arena, matrix),
        .error = lbq_arena_take(&arena, matrix),
        .gradient = lbq_arena_take(&arena, matrix),
        .rows = lbq_arena_take(&arena, scratch),
        .softest = lbq_arena_take(&arena, per_row),
    };
    for (ptrdiff_t r = 0; r < rows; r++)
        j.softest[r] = 0;
    const lbq_status status = run(&j, options, rows, H);
    *softness = 0;
    for (ptrdiff_t r = 0; r < rows; r++)
        *softness = fmax(*softness, j.softest[r]);
    lbq_arena_close(&arena);
    return status;
}
