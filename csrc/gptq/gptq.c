/* GPTQ in LDL form: one Cholesky factorisation of the reversed matrix, then tiles of rows, each
 * from the first column to the last without waiting for the others. */
#include "gptq/gptq.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "codes/importance.h"
#include "core/blas.h"
#include "core/interrupt.h"
#include "core/memory.h"
#include "core/threads.h"
#include "gptq/cholesky.h"
#include "kernels/kernels.h"

enum {
    LANES = LBQ_PANEL,
    /* Rows of a task: products pack R anew for each. */
    MAX_TILE = 1024,
    FEW = 8,   /* columns whose sums stay in registers */
    SIDE = 64, /* of the tiles in which H is put in order */
};

/* Of float32's pivots, relative to the diagonal of H. Those above were right to 0.06 %, and the
 * entries of R as well, on Hessians of 512 and 1536 columns whose spectra fall as powers up to 3,
 * damped by 1e-1 to 1e-5. */
#define LEAST_PIVOT 0x1p-14

/* --- order ------------------------------------------------------------------------------------ */

/* A checked copy of `order`; the identity for NULL. */
static lbq_status
copy_order(ptrdiff_t cols, const int64_t *order, int64_t *copy)
{
    for (ptrdiff_t j = 0; j < cols; j++)
        copy[j] = order ? -1 : j;
    for (ptrdiff_t j = 0; order && j < cols; j++) {
        LBQ_REQUIRE(order[j] >= 0 && order[j] < cols && copy[order[j]] < 0,
                    LBQ_BAD_VALUE,
                    "order[%td] is %lld, expected a permutation of 0 to %td",
                    j,
                    (long long)order[j],
                    cols - 1);
        copy[order[j]] = j;
    }
    if (order)
        memcpy(copy, order, (size_t)cols * sizeof *copy);
    return LBQ_OK;
}

/* --- factorisation ---------------------------------------------------------------------------- */

static int
compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Mean or median of the positive diagonal entries times `unit`; `sorted` (cols) is scratch. */
static double
typical_diagonal(ptrdiff_t cols, const double *H, double unit, bool median, double *sorted)
{
    ptrdiff_t live = 0;
    double sum = 0;
    for (ptrdiff_t j = 0; j < cols; j++)
        if (H[j * cols + j] > 0)
            sum += sorted[live++] = unit * H[j * cols + j];
    if (live == 0)
        return 1;
    if (!median)
        return sum / (double)live;
    qsort(sorted, (size_t)live, sizeof *sorted, compare);
    return (sorted[(live - 1) / 2] + sorted[live / 2]) / 2;
}

static lbq_status
check_hessian(ptrdiff_t cols, const double *H)
{
    for (ptrdiff_t i = 0; i < cols; i++) {
        LBQ_TRY(lbq_interrupted());
        for (ptrdiff_t j = i; j < cols; j++)
            LBQ_REQUIRE(isfinite(H[i * cols + j]) && (i != j || H[i * cols + j] >= 0),
                        LBQ_BAD_VALUE,
                        "hessian H[%td, %td] is %g, expected finite numbers, on the diagonal >= 0",
                        i,
                        j,
                        H[i * cols + j]);
    }
    return LBQ_OK;
}

/* A power of four that brings the largest diagonal entry to between 1/4 and 1: whatever the scale
 * of H, float32 holds it. The roots of pivots change by a power of two, and R does not change at
 * all. */
static double
unit_of(ptrdiff_t cols, const double *H)
{
    double most = 0;
    for (ptrdiff_t j = 0; j < cols; j++)
        most = fmax(most, H[j * cols + j]);
    int exponent;
    frexp(most, &exponent);
    exponent += exponent & 1;
    return ldexp(1, exponent > -1022 ? -exponent : 1022);
}

typedef struct {
    ptrdiff_t cols;
    const double *H;
    const int64_t *order;
    double unit;    /* of what is factored: */
    double damping; /* unit H + damping I */
    void *R;        /* (cols, cols), of floats or doubles */
    bool failed;
} factoring;

static double
damped(const factoring *job, ptrdiff_t column)
{
    const double diagonal = job->H[column * job->cols + column];
    return (diagonal > 0 ? job->unit * diagonal : 1) + job->damping;
}

/* The damped matrix in reversed order, up to its diagonal; by tiles, since an order that keeps
 * groups together finds those of a tile near each other. */
#define REVERSE(name, real)                                                                        \
    static void name(const factoring *job, real *R)                                                \
    {                                                                                              \
        const ptrdiff_t n = job->cols;                                                             \
        const double *const H = job->H;                                                            \
        const int64_t *const from = job->order + n - 1;                                            \
        for (ptrdiff_t top = 0; top < n && lbq_interrupted() == LBQ_OK; top += SIDE)               \
            for (ptrdiff_t left = 0; left <= top; left += SIDE)                                    \
                for (ptrdiff_t i = top; i < lbq_smaller(top + SIDE, n); i++)                       \
                    for (ptrdiff_t j = left; j < lbq_smaller(left + SIDE, i + 1); j++) {           \
                        const ptrdiff_t row = from[-i], col = from[-j];                            \
                        const double entry = row < col ? H[row * n + col] : H[col * n + row];      \
                        R[i * n + j] = (real)(job->unit * entry);                                  \
                    }                                                                              \
        for (ptrdiff_t i = 0; i < n; i++)                                                          \
            R[i * n + i] = (real)damped(job, from[-i]);                                            \
    }
REVERSE(reverse_f32, float)
REVERSE(reverse_f64, double)
#undef REVERSE

/* The lower factor C of the matrix in reversed order: then R[i, j] = C[n-1-i, n-1-j] / C[n-1-j,
 * n-1-j], since reversing rows and columns turns lower triangles into upper ones. */
static lbq_status
factor_f64(factoring *job)
{
    bool positive;
    reverse_f64(job, job->R);
    LBQ_TRY(lbq_cholesky_f64(job->cols, job->R, &positive));
    job->failed = !positive;
    return LBQ_OK;
}

/* The same in float32, which fails as well where a pivot has lost its digits. What rounding does
 * amounts to changing each entry of H by some 2^-24 times the diagonals of its row and its column
 * (N. Higham, "Accuracy and Stability of Numerical Algorithms", 2002, theorem 10.5). Next to a
 * damping of 1 % that is nothing, but a pivot far below the diagonal would be noise. */
static lbq_status
factor_f32(factoring *job)
{
    const ptrdiff_t n = job->cols;
    float *const R = job->R;
    bool positive;
    reverse_f32(job, R);
    LBQ_TRY(lbq_cholesky_f32(n, R, &positive));
    job->failed = !positive;
    for (ptrdiff_t j = 0; j < n && !job->failed; j++) {
        const double pivot = (double)R[j * n + j];
        job->failed = pivot * pivot < LEAST_PIVOT * damped(job, job->order[n - 1 - j]);
    }
    return LBQ_OK;
}

/* C, lower, to R, upper: entry (i, j) moves to (n-1-i, n-1-j), in place since the two triangles
 * meet only in the diagonal. `diagonal` (n) is scratch. */
#define TURN_OVER(name, real)                                                                      \
    static void name(ptrdiff_t n, real *R, real *diagonal)                                         \
    {                                                                                              \
        for (ptrdiff_t i = 0; i < n; i++)                                                          \
            diagonal[i] = R[i * n + i];                                                            \
        for (ptrdiff_t i = 0; i < n; i++) {                                                        \
            real *const to = R + (n - 1 - i) * n;                                                  \
            for (ptrdiff_t j = 0; j < i; j++)                                                      \
                to[n - 1 - j] = R[i * n + j] / diagonal[j];                                        \
            to[n - 1 - i] = 1;                                                                     \
        }                                                                                          \
    }
TURN_OVER(turn_over_f32, float)
TURN_OVER(turn_over_f64, double)
#undef TURN_OVER

/* In float64; the result, in float32, in R. */
static lbq_status
factor_narrowed(factoring *job)
{
    const size_t entries = (size_t)job->cols * (size_t)job->cols;
    float *const R = job->R;
    double *wide;
    LBQ_TRY(lbq_allocate(entries * sizeof *wide, &wide));
    job->R = wide;
    const lbq_status status = factor_f64(job);
    job->R = R;
    for (ptrdiff_t i = 0; i < job->cols; i++)
        for (ptrdiff_t j = 0; j <= i; j++)
            R[i * job->cols + j] = (float)wide[i * job->cols + j];
    lbq_free(wide);
    return status;
}

static lbq_status
try_to_factor(factoring *job, bool float64, lbq_gptq_report *report)
{
    report->float64 = float64;
    if (float64)
        return factor_f64(job);
    LBQ_TRY(factor_f32(job));
    if (!job->failed)
        return LBQ_OK;
    report->float64 = true;
    return factor_narrowed(job);
}

lbq_status
lbq_gptq_factor(ptrdiff_t cols, const double *H, const int64_t *order, double damping, bool median,
                bool float64, void *R, lbq_gptq_report *report)
{
    LBQ_REQUIRE(cols > 0, LBQ_BAD_SHAPE, "H has no columns");
    LBQ_REQUIRE(damping >= 0 && isfinite(damping),
                LBQ_BAD_VALUE,
                "damping is %g, expected a finite number >= 0",
                damping);
    LBQ_TRY(check_hessian(cols, H));
    const size_t order_bytes = (size_t)cols * sizeof(int64_t);
    const size_t scratch_bytes = (size_t)cols * sizeof(double);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded(order_bytes) + lbq_padded(scratch_bytes)));
    int64_t *const permutation = lbq_arena_take(&arena, order_bytes);
    lbq_status status = copy_order(cols, order, permutation);
    double *const scratch = lbq_arena_take(&arena, scratch_bytes);
    const double unit = unit_of(cols, H);
    const double mean = typical_diagonal(cols, H, unit, false, scratch);
    const double typical = median ? typical_diagonal(cols, H, unit, true, scratch) : mean;
    factoring job = {
        .cols = cols,
        .H = H,
        .order = permutation,
        .unit = unit,
        .damping = damping * typical,
        .R = R,
    };
    *report = (lbq_gptq_report){0};
    for (ptrdiff_t j = 0; j < cols; j++)
        report->dead += H[j * cols + j] == 0;
    while (status == LBQ_OK) {
        report->damping = job.damping / unit;
        status = try_to_factor(&job, float64, report);
        if (status != LBQ_OK || !job.failed)
            break;
        report->retries++;
        job.damping = job.damping > 0 ? 10 * job.damping : 1e-8 * typical;
        if (job.damping > 10 * mean)
            status = lbq_fail(LBQ_NOT_POSITIVE_DEFINITE,
                              "hessian H is not positive definite, not even with %g added to its "
                              "diagonal",
                              report->damping);
    }
    if (status == LBQ_OK && float64)
        turn_over_f64(cols, R, scratch);
    else if (status == LBQ_OK)
        turn_over_f32(cols, R, (float *)scratch);
    lbq_arena_close(&arena);
    return status;
}

/* --- rounding --------------------------------------------------------------------------------- */

typedef struct {
    const lbq_gptq_problem *problem;
    ptrdiff_t groups;
    ptrdiff_t tile, pitch; /* rows of a task; an odd number of cache lines that holds them */
    ptrdiff_t blocks;
    const ptrdiff_t *block_begin; /* (blocks + 1) */
    ptrdiff_t width;              /* columns of the widest block */
    bool refit;
    const int64_t *order, *group_of; /* (cols): which column is at a place, and its group */
    const int64_t *ascending;        /* (cols): the columns of each block, ascending, */
    const int64_t *place;            /* (cols): and the places of these in the block */
    const float *importance;         /* (cols, LANES) in order: shares; or NULL */
    const uint8_t *still;            /* (rows, groups): whether it absorbs nothing; NULL: none */
    const float *W;
    uint8_t *codes;
    float *scale, *offset;
    char *scratch; /* of all threads */
    size_t scratch_bytes;
} run_state;

/* A few rows of one block: which ones, and the place of its first column in the order. */
typedef struct {
    ptrdiff_t row, rows, column;
} lanes;

/* lbq_kernels.feedback_f32, solve_f32 and round_f32 in float64. */
static void
feedback_f64(ptrdiff_t count, ptrdiff_t width, const double *R, ptrdiff_t stride, const double *e,
             ptrdiff_t pitch, double *sum)
{
    for (ptrdiff_t j = 0; j < width; j++)
        for (ptrdiff_t i = 0; i < count; i++)
            for (int l = 0; l < LANES; l++)
                sum[j * pitch + l] += R[i * stride + j] * e[i * pitch + l];
}

static void
solve_f64(ptrdiff_t count, const double *R, ptrdiff_t stride, double *x)
{
    for (ptrdiff_t j = 0; j < count; j++)
        for (ptrdiff_t i = 0; i < j; i++)
            for (int l = 0; l < LANES; l++)
                x[j * LANES + l] -= R[i * stride + j] * x[i * LANES + l];
}

static void
round_f64(const double *grid, int top, const double *w, const double *shift, uint8_t *codes,
          double *e)
{
    for (int l = 0; l < LANES; l++) {
        const double x = (w[l] + shift[l] - grid[LANES + l]) * grid[2 * LANES + l];
        codes[l] = (uint8_t)(x > 0 ? x < top ? rint(x) : top : 0);
        e[l] = w[l] - (grid[l] * codes[l] + grid[LANES + l]);
    }
}

/* That a group's grids, fitted to what feedback has made of its weights, reach them. */
static lbq_status
check_fit(const run_state *state, const lanes *at, ptrdiff_t group, const lbq_groups *groups,
          const float *scale, const float *offset)
{
    const lbq_gptq_problem *const p = state->problem;
    const ptrdiff_t begin = group * p->group;
    const float most_stored = p->code->scale_bits == 16 ? 65504 : 1e30f;
    for (ptrdiff_t l = 0; l < at->rows; l++) {
        const float most = fmaxf(-groups->low[l], groups->high[l]);
        const float stored = fmaxf(scale[l], p->code->symmetric ? 0 : fabsf(offset[l]));
        LBQ_REQUIRE(most <= 1e30f && stored < most_stored,
                    LBQ_BAD_VALUE,
                    "weight[%td, %td:%td] reaches %g with the errors fed back to it: its scale "
                    "would not fit",
                    at->row + l,
                    begin,
                    lbq_smaller(begin + p->group, p->cols),
                    (double)most);
    }
    return LBQ_OK;
}

#define REAL float
#define NAME(name) name##_f32
#define GEMM lbq_sgemm
#define FEEDBACK lbq_kernel.feedback_f32
#define SOLVE lbq_kernel.solve_f32
#define ROUND lbq_kernel.round_f32
#include "gptq/gptq_rows.h"
#undef REAL
#undef NAME
#undef GEMM
#undef FEEDBACK
#undef SOLVE
#undef ROUND

#define REAL double
#define NAME(name) name##_f64
#define GEMM lbq_dgemm
#define FEEDBACK feedback_f64
#define SOLVE solve_f64
#define ROUND round_f64
#include "gptq/gptq_rows.h"
#undef REAL
#undef NAME
#undef GEMM
#undef FEEDBACK
#undef SOLVE
#undef ROUND

/* Cuts the order into blocks of about p->block columns, of whole groups if groups are to be
 * fitted; returns their number, or 0 if the order scatters a group. */
static ptrdiff_t
cut_blocks(const lbq_gptq_problem *p, bool refit, const int64_t *group_of, ptrdiff_t *block_begin,
           uint8_t *seen)
{
    ptrdiff_t blocks = 0;
    for (ptrdiff_t begin = 0, end; begin < p->cols; begin = end) {
        end = lbq_smaller(begin + p->block, p->cols);
        for (ptrdiff_t run = begin, next; refit && run < p->cols; run = next) {
            for (next = run; next < p->cols && group_of[next] == group_of[run];)
                next++;
            if (run > begin && next - begin > p->block) {
                end = run;
                break;
            }
            if (seen[group_of[run]]++)
                return 0;
            end = next;
        }
        block_begin[++blocks] = end;
    }
    return blocks;
}

static int
compare_columns(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* `ascending` and `place` of run_state; `at` (cols) is scratch. */
static void
sort_blocks(ptrdiff_t blocks, const ptrdiff_t *block_begin, const int64_t *order,
            int64_t *ascending, int64_t *place, int64_t *at)
{
    memcpy(ascending, order, (size_t)block_begin[blocks] * sizeof *order);
    for (ptrdiff_t b = 0; b < blocks; b++) {
        const ptrdiff_t begin = block_begin[b], end = block_begin[b + 1];
        for (ptrdiff_t j = begin; j < end; j++)
            at[order[j]] = j - begin;
        qsort(ascending + begin, (size_t)(end - begin), sizeof *ascending, compare_columns);
        for (ptrdiff_t j = begin; j < end; j++)
            place[j] = at[ascending[j]];
    }
}

/* Finds the groups that absorb no errors: those of zeros, which stay so, and those of no more than
 * two of the smallest scales, which could not follow what is fed to them. Rows that share their
 * scale with others can, unless all are that small. */
static bool
find_still(const run_state *state, uint8_t *still)
{
    const lbq_gptq_problem *const p = state->problem;
    const float most = p->code->scale_bits == 16 ? 0x1p-23f : 2 * FLT_MIN;
    if (p->code->scale_bits == 0 && !(p->fixed && state->scale[0] <= FLT_MIN))
        return false;
    bool any = false;
    for (ptrdiff_t i = 0; i < p->rows * state->groups; i++) {
        const ptrdiff_t begin = i % state->groups * p->group;
        const ptrdiff_t end = lbq_smaller(begin + p->group, p->cols);
        const float *const row = state->W + i / state->groups * p->cols;
        ptrdiff_t k = begin;
        while (k < end && fabsf(row[k]) <= most)
            k++;
        still[i] = k == end;
        any |= still[i];
    }
    return any;
}

/* One group per row: scale and offset of the weights as they are. */
static lbq_status
fit_rows(void *context, ptrdiff_t index, int worker)
{
    const run_state *const state = context;
    const lbq_gptq_problem *const p = state->problem;
    float *const w = (float *)(state->scratch + (size_t)worker * state->scratch_bytes);
    const ptrdiff_t first = index * LANES, rows = lbq_smaller(LANES, p->rows - first);
    const float *const W = state->W + first * p->cols;
    for (ptrdiff_t l = 0; l < LANES; l++)
        for (ptrdiff_t j = 0; j < p->cols; j++)
            w[j * LANES + l] = l < rows ? W[l * p->cols + state->order[j]] : 0;
    const lbq_groups groups = {.w = w, .importance = state->importance, .count = p->cols};
    float scale[LANES], offset[LANES];
    lbq_code_fit(p->code, p->range, &groups, scale, offset);
    memcpy(state->scale + first, scale, (size_t)rows * sizeof *scale);
    memcpy(state->offset + first, offset, (size_t)rows * sizeof *offset);
    return LBQ_OK;
}

/* The shares of columns in order, copied to all lanes; `by_column` (cols) is scratch. */
static lbq_status
spread_importance(const lbq_gptq_problem *p, const int64_t *order, float *by_column, float *shares)
{
    LBQ_TRY(lbq_importance_shares(p->cols, p->group, p->importance, by_column));
    for (ptrdiff_t j = 0; j < p->cols; j++)
        for (int l = 0; l < LANES; l++)
            shares[j * LANES + l] = by_column[order[j]];
    return LBQ_OK;
}

static lbq_status
run_tiles(run_state *state)
{
    const lbq_gptq_problem *const p = state->problem;
    if (!p->fixed && !state->refit)
        LBQ_TRY(lbq_parallel(lbq_pieces(p->rows, LANES), fit_rows, state));
    const ptrdiff_t tiles = lbq_pieces(p->rows, state->tile);
    return lbq_parallel(tiles, p->float64 ? round_rows_f64 : round_rows_f32, state);
}

lbq_status
lbq_gptq(const lbq_gptq_problem *problem, const float *W, uint8_t *codes, float *scale,
         float *offset)
{
    const lbq_gptq_problem *const p = problem;
    const ptrdiff_t cols = p->cols, groups = lbq_pieces(cols, p->group);
    LBQ_REQUIRE(p->rows > 0 && cols > 0 && p->group > 0 && p->block > 0,
                LBQ_BAD_SHAPE,
                "%td rows, %td columns in groups of %td and blocks of %td",
                p->rows,
                cols,
                p->group,
                p->block);
    LBQ_TRY(lbq_code_check(p->code));
    LBQ_TRY(lbq_check_weights(p->code->scale_bits, p->rows, cols, W));
    run_state state = {
        .problem = p,
        .groups = groups,
        .refit = !p->fixed && groups > 1,
        .W = W,
        .codes = codes,
        .scale = scale,
        .offset = offset,
        /* Four tasks or more, so that threads end together; whole lanes. A function of the rows
         * alone. */
        .tile = lbq_smaller(lbq_pieces(lbq_pieces(p->rows, 4), LANES) * LANES, MAX_TILE),
    };
    state.pitch = state.tile + (state.tile % (2 * LANES) == 0 ? LANES : 0);

    const size_t order_bytes = lbq_padded((size_t)cols * sizeof(int64_t));
    const size_t begin_bytes = lbq_padded((size_t)(cols + 1) * sizeof(ptrdiff_t));
    const size_t seen_bytes = lbq_padded((size_t)groups);
    const size_t still_bytes = lbq_padded((size_t)(p->rows * groups));
    const size_t share_bytes = p->importance ? (size_t)cols * LANES * sizeof(float) : 0;
    lbq_arena plan, work;
    LBQ_TRY(lbq_arena_open(
        &plan, 5 * order_bytes + begin_bytes + seen_bytes + still_bytes + lbq_padded(share_bytes)));
    int64_t *const order = lbq_arena_take(&plan, order_bytes);
    int64_t *const group_of = lbq_arena_take(&plan, order_bytes);
    ptrdiff_t *const block_begin = lbq_arena_take(&plan, begin_bytes);
    int64_t *const ascending = lbq_arena_take(&plan, order_bytes);
    int64_t *const place = lbq_arena_take(&plan, order_bytes);
    int64_t *const at = lbq_arena_take(&plan, order_bytes);
    uint8_t *const seen = lbq_arena_take(&plan, seen_bytes);
    uint8_t *const still = lbq_arena_take(&plan, still_bytes);
    memset(seen, 0, seen_bytes);
    state.still = find_still(&state, still) ? still : NULL;
    block_begin[0] = 0;
    lbq_status status = copy_order(cols, p->order, order);
    if (status == LBQ_OK && p->importance) {
        float *const shares = lbq_arena_take(&plan, share_bytes);
        status = spread_importance(p, order, (float *)at, shares);
        state.importance = shares;
    }
    if (status == LBQ_OK) {
        for (ptrdiff_t j = 0; j < cols; j++)
            group_of[j] = order[j] / p->group;
        state.order = order;
        state.group_of = group_of;
        state.block_begin = block_begin;
        state.blocks = cut_blocks(p, state.refit, group_of, block_begin, seen);
        if (state.blocks == 0)
            status = lbq_fail(LBQ_BAD_VALUE,
                              "order scatters the columns of a group: fit the scales beforehand");
        sort_blocks(state.blocks, block_begin, order, ascending, place, at);
        state.ascending = ascending;
        state.place = place;
        for (ptrdiff_t i = 0; i < state.blocks; i++)
            if (block_begin[i + 1] - block_begin[i] > state.width)
                state.width = block_begin[i + 1] - block_begin[i];
    }
    if (status == LBQ_OK) {
        state.scratch_bytes =
            p->float64 ? scratch_of_f64(&state, NULL, NULL) : scratch_of_f32(&state, NULL, NULL);
        const size_t total = state.scratch_bytes * (size_t)lbq_threads();
        status = lbq_arena_open(&work, total);
        if (status == LBQ_OK) {
            state.scratch = lbq_arena_take(&work, total);
            status = run_tiles(&state);
            lbq_arena_close(&work);
        }
    }
    lbq_arena_close(&plan);
    return status;
}
