/* GPTQ in LDL form: one Cholesky factorisation of the reversed matrix, then tiles of rows, each
 * from the first column to the last without waiting for the others. */
#include "gptq/gptq.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/blas.h"
#include "core/memory.h"
#include "core/threads.h"

enum { LANES = 16, MAX_TILE = 256 };

static inline ptrdiff_t
smaller(ptrdiff_t a, ptrdiff_t b)
{
    return a < b ? a : b;
}

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

/* Mean or median of the positive diagonal entries; `sorted` (cols) is scratch. */
static double
typical_diagonal(ptrdiff_t cols, const double *H, bool median, double *sorted)
{
    ptrdiff_t live = 0;
    double sum = 0;
    for (ptrdiff_t j = 0; j < cols; j++)
        if (H[j * cols + j] > 0)
            sum += sorted[live++] = H[j * cols + j];
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
    for (ptrdiff_t i = 0; i < cols; i++)
        for (ptrdiff_t j = i; j < cols; j++)
            LBQ_REQUIRE(isfinite(H[i * cols + j]) && (i != j || H[i * cols + j] >= 0),
                        LBQ_BAD_VALUE,
                        "H[%td, %td] is %g, expected finite numbers, on the diagonal >= 0",
                        i,
                        j,
                        H[i * cols + j]);
    return LBQ_OK;
}

typedef struct {
    ptrdiff_t cols;
    const double *H;
    const int64_t *order;
    double damping;
    double *R;
    int info; /* LAPACK's: 0 is success */
} factoring;

/* The lower factor C of the matrix in reversed order: then R[i, j] = C[n-1-i, n-1-j] / C[n-1-j,
 * n-1-j], since reversing rows and columns turns lower triangles into upper ones. */
static lbq_status
factor(void *context, ptrdiff_t index, int worker)
{
    (void)index, (void)worker;
    factoring *const job = context;
    const ptrdiff_t n = job->cols;
    for (ptrdiff_t i = 0; i < n; i++) {
        const ptrdiff_t row = job->order[n - 1 - i];
        for (ptrdiff_t j = 0; j < i; j++) {
            const ptrdiff_t col = job->order[n - 1 - j];
            job->R[i * n + j] = row < col ? job->H[row * n + col] : job->H[col * n + row];
        }
        const double diagonal = job->H[row * n + row];
        job->R[i * n + i] = (diagonal > 0 ? diagonal : 1) + job->damping;
    }
    const int order = (int)n;
    BLAS(dpotrf_)("U", &order, job->R, &order, &job->info, 1);
    return LBQ_OK;
}

/* C, lower, to R, upper: entry (i, j) moves to (n-1-i, n-1-j), in place since the two triangles
 * meet only in the diagonal. */
static void
turn_over(ptrdiff_t n, double *R)
{
    for (ptrdiff_t i = 0; i < n; i++)
        for (ptrdiff_t j = 0; j < i; j++)
            R[(n - 1 - i) * n + n - 1 - j] = R[i * n + j] / R[j * n + j];
    for (ptrdiff_t i = 0; i < n; i++)
        R[i * n + i] = 1;
}

lbq_status
lbq_gptq_factor(ptrdiff_t cols, const double *H, const int64_t *order, double damping, bool median,
                double *R, lbq_gptq_report *report)
{
    LBQ_REQUIRE(cols > 0, LBQ_BAD_SHAPE, "H has no columns");
    LBQ_REQUIRE(damping >= 0 && isfinite(damping),
                LBQ_BAD_VALUE,
                "damping is %g, expected a finite number >= 0",
                damping);
    LBQ_TRY(check_hessian(cols, H));
    const size_t order_bytes = (size_t)cols * sizeof(int64_t);
    const size_t sorted_bytes = (size_t)cols * sizeof(double);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded(order_bytes) + lbq_padded(sorted_bytes)));
    int64_t *const permutation = lbq_arena_take(&arena, order_bytes);
    lbq_status status = copy_order(cols, order, permutation);
    double *const sorted = lbq_arena_take(&arena, sorted_bytes);
    const double mean = typical_diagonal(cols, H, false, sorted);
    const double typical = median ? typical_diagonal(cols, H, true, sorted) : mean;
    factoring job = {
        .cols = cols, .H = H, .order = permutation, .damping = damping * typical, .R = R};
    *report = (lbq_gptq_report){0};
    for (ptrdiff_t j = 0; j < cols; j++)
        report->dead += H[j * cols + j] == 0;
    while (status == LBQ_OK) {
        report->damping = job.damping;
        /* As a task, so that OpenBLAS runs it in one thread: cut among threads it would round
         * differently for each number of them. */
        status = lbq_parallel_blas(1, factor, &job);
        if (status != LBQ_OK || job.info == 0)
            break;
        report->retries++;
        job.damping = job.damping > 0 ? 10 * job.damping : 1e-8 * typical;
        if (job.damping > 10 * mean)
            status = lbq_fail(LBQ_NOT_POSITIVE_DEFINITE,
                              "H is not positive definite, not even with %g added to its diagonal",
                              report->damping);
    }
    lbq_arena_close(&arena);
    if (status == LBQ_OK)
        turn_over(cols, R);
    return status;
}

/* --- rounding --------------------------------------------------------------------------------- */

typedef struct {
    const lbq_gptq_problem *problem;
    ptrdiff_t groups, tile, width; /* rows of a task; columns of the widest block */
    bool refit;
    const int64_t *order;
    const ptrdiff_t *block_end; /* (cols), at the first column of each block */
    const void *R;              /* (cols, cols) in the arithmetic's type */
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

#define REAL float
#define NAME(name) name##_f32
#define GEMM BLAS(cblas_sgemm)
#include "gptq/gptq_rows.h"
#undef REAL
#undef NAME
#undef GEMM

#define REAL double
#define NAME(name) name##_f64
#define GEMM BLAS(cblas_dgemm)
#include "gptq/gptq_rows.h"
#undef REAL
#undef NAME
#undef GEMM

/* Cuts the order into blocks of about p->block columns, of whole groups if groups are to be
 * fitted; returns the width of the widest, or 0 if the order scatters a group. */
static ptrdiff_t
cut_blocks(const lbq_gptq_problem *p, bool refit, const int64_t *order, ptrdiff_t *block_end,
           uint8_t *seen)
{
    ptrdiff_t widest = 0;
    for (ptrdiff_t begin = 0, end; begin < p->cols; begin = end) {
        end = smaller(begin + p->block, p->cols);
        for (ptrdiff_t run = begin, next; refit && run < p->cols; run = next) {
            for (next = run; next < p->cols && order[next] / p->group == order[run] / p->group;)
                next++;
            if (run > begin && next - begin > p->block) {
                end = run;
                break;
            }
            if (seen[order[run] / p->group]++)
                return 0;
            end = next;
        }
        block_end[begin] = end;
        widest = end - begin > widest ? end - begin : widest;
    }
    return widest;
}

static lbq_status
check_weights(const lbq_gptq_problem *p, const float *W)
{
    for (ptrdiff_t i = 0; i < p->rows * p->cols; i++)
        LBQ_REQUIRE(isfinite(W[i]),
                    LBQ_BAD_VALUE,
                    "weight[%td, %td] is %g, expected finite numbers",
                    i / p->cols,
                    i % p->cols,
                    (double)W[i]);
    return LBQ_OK;
}

/* One group per row: scale and offset of the weights as they are. */
static lbq_status
fit_row(void *context, ptrdiff_t row, int worker)
{
    const run_state *const state = context;
    const lbq_gptq_problem *const p = state->problem;
    double *const values = (double *)(state->scratch + (size_t)worker * state->scratch_bytes);
    double *const importance = p->importance ? values + p->cols : NULL;
    for (ptrdiff_t k = 0; k < p->cols; k++)
        values[k] = (double)state->W[row * p->cols + k];
    for (ptrdiff_t k = 0; importance && k < p->cols; k++)
        importance[k] = (double)p->importance[k];
    double scale, offset;
    lbq_code_fit(p->code, p->range, p->cols, values, importance, &scale, &offset);
    state->scale[row] = (float)scale;
    state->offset[row] = (float)offset;
    return LBQ_OK;
}

static lbq_status
run_tiles(run_state *state, float *narrowed)
{
    const lbq_gptq_problem *const p = state->problem;
    state->R = p->R;
    if (narrowed) {
        for (ptrdiff_t i = 0; i < p->cols; i++)
            for (ptrdiff_t j = i; j < p->cols; j++)
                narrowed[i * p->cols + j] = (float)p->R[i * p->cols + j];
        state->R = narrowed;
    }
    if (!p->fixed && !state->refit)
        LBQ_TRY(lbq_parallel(p->rows, fit_row, state));
    const ptrdiff_t tiles = (p->rows + state->tile - 1) / state->tile;
    return lbq_parallel_blas(tiles, p->float64 ? round_rows_f64 : round_rows_f32, state);
}

lbq_status
lbq_gptq(const lbq_gptq_problem *problem, const float *W, uint8_t *codes, float *scale,
         float *offset)
{
    const lbq_gptq_problem *const p = problem;
    const ptrdiff_t cols = p->cols, groups = (cols + p->group - 1) / p->group;
    LBQ_REQUIRE(p->rows > 0 && cols > 0 && p->group > 0 && p->block > 0,
                LBQ_BAD_SHAPE,
                "%td rows, %td columns in groups of %td and blocks of %td",
                p->rows,
                cols,
                p->group,
                p->block);
    LBQ_TRY(lbq_code_check(p->code));
    LBQ_TRY(check_weights(p, W));
    run_state state = {
        .problem = p,
        .groups = groups,
        .refit = !p->fixed && groups > 1,
        .W = W,
        .codes = codes,
        .scale = scale,
        .offset = offset,
        /* Eight tasks or more, so that threads end together; whole lanes; no wider than what keeps
         * the tile's errors in the second-level cache. A function of the rows alone. */
        .tile = smaller((p->rows / 8 + LANES) / LANES * LANES, MAX_TILE),
    };

    const size_t order_bytes = lbq_padded((size_t)cols * sizeof(int64_t));
    const size_t end_bytes = lbq_padded((size_t)cols * sizeof(ptrdiff_t));
    const size_t seen_bytes = lbq_padded((size_t)groups);
    lbq_arena plan, work;
    LBQ_TRY(lbq_arena_open(&plan, order_bytes + end_bytes + seen_bytes));
    int64_t *const order = lbq_arena_take(&plan, order_bytes);
    ptrdiff_t *const block_end = lbq_arena_take(&plan, end_bytes);
    uint8_t *const seen = lbq_arena_take(&plan, seen_bytes);
    memset(seen, 0, seen_bytes);
    lbq_status status = copy_order(cols, p->order, order);
    if (status == LBQ_OK) {
        state.order = order;
        state.block_end = block_end;
        state.width = cut_blocks(p, state.refit, order, block_end, seen);
        if (state.width == 0)
            status = lbq_fail(LBQ_BAD_VALUE,
                              "order scatters the columns of a group: fit the scales beforehand");
    }
    if (status == LBQ_OK) {
        state.scratch_bytes =
            p->float64 ? scratch_of_f64(&state, NULL, NULL) : scratch_of_f32(&state, NULL, NULL);
        const size_t total = state.scratch_bytes * (size_t)lbq_threads();
        const size_t narrow =
            p->float64 ? 0 : lbq_padded((size_t)cols * (size_t)cols * sizeof(float));
        status = lbq_arena_open(&work, total + narrow);
        if (status == LBQ_OK) {
            state.scratch = lbq_arena_take(&work, total);
            status = run_tiles(&state, p->float64 ? NULL : lbq_arena_take(&work, narrow));
            lbq_arena_close(&work);
        }
    }
    lbq_arena_close(&plan);
    return status;
}
