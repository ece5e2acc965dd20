/* H = R D R^T by one Cholesky factorisation of the reversed matrix. */
#include "gptq/factor.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/interrupt.h"
#include "core/memory.h"
#include "core/threads.h"
#include "gptq/cholesky.h"

enum { SIDE = 64 /* of the tiles in which H is reordered */ };

/* Smallest float32 pivot accepted, relative to the diagonal of H. Larger pivots and the entries of
 * R were accurate to 0.06 % on Hessians of 512 and 1536 columns, damped by 1e-1 to 1e-5, whose
 * spectra fall as powers up to 3. */
#define LEAST_PIVOT 0x1p-14

lbq_status
lbq_order_copy(ptrdiff_t cols, const int64_t *order, int64_t *copy)
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
                        "hessian H[%td, %td] is %g, expected finite numbers, >= 0 on the diagonal",
                        i,
                        j,
                        H[i * cols + j]);
    }
    return LBQ_OK;
}

/* A power of four that brings the largest diagonal entry to between 1/4 and 1, so that float32
 * holds H at any scale. Square roots of pivots change by a power of two, and R not at all. */
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
    double unit;    /* the matrix to factor is */
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

/* The lower triangle of the damped matrix in reversed order. It goes by tiles: if the order keeps
 * groups together, a tile's entries are close in memory. */
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

/* Finds the lower factor C of the matrix in reversed order. R[i, j] = C[n-1-i, n-1-j] / C[n-1-j,
 * n-1-j], since reversing rows and columns turns a lower triangle into an upper one. */
static lbq_status
factor_f64(factoring *job)
{
    bool positive;
    reverse_f64(job, job->R);
    LBQ_TRY(lbq_cholesky_f64(job->cols, job->R, &positive));
    job->failed = !positive;
    return LBQ_OK;
}

/* The same in float32, which also fails if a pivot has lost its digits. The effect of rounding is
 * that of changing H_ij by some 2^-24 sqrt(H_ii H_jj) (N. Higham, "Accuracy and Stability of
 * Numerical Algorithms", 2002, theorem 10.5). That is negligible next to a damping of 1 %, but a
 * pivot far below the diagonal would be noise. */
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

/* Turns C, lower, into R, upper: entry (i, j) moves to (n-1-i, n-1-j), in place because the two
 * triangles share only the diagonal. `diagonal` (n) is scratch. */
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

/* Factors in float64 and narrows the result to float32 in R. */
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
    lbq_status status = lbq_order_copy(cols, order, permutation);
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
                              "hessian H is not positive definite, even with %g added to its "
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
