/* H += X^T diag(w) X by single-threaded BLAS on tiles of the upper triangle, one task each.
 *
 * The tile's edge balances two costs: OpenBLAS packs both operands again for every tile, and few
 * tiles balance badly across threads. At 2048 columns, edges of 192, 384 and 512 take 1.35, 1.15
 * and 1.02 times as long as a single syrk. */
#include "gptq/hessian.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "core/blas.h"
#include "core/interrupt.h"
#include "core/memory.h"
#include "core/threads.h"

enum {
    MAX_EDGE = 512,
    LEAST_TILES = 3, /* per side, which makes six tasks */
    TOKENS = 2048,
    MAX_ROWS = 512, /* of the largest task of lbq_hessian_error; every product packs H again */
    SLAB = 256,     /* columns that such a task multiplies at once */
};

typedef struct {
    ptrdiff_t tokens, cols;
    const float *X;
    double *H;
    ptrdiff_t edge;
    float *tiles; /* edge * edge numbers per thread */
} adding;

static lbq_status
add_tile(void *context, ptrdiff_t index, int worker)
{
    const adding *const job = context;
    const ptrdiff_t cols = job->cols, edge = job->edge;
    float *const tile = job->tiles + (ptrdiff_t)worker * edge * edge;
    ptrdiff_t row, column;
    lbq_triangle_at(index, &row, &column);
    row *= edge;
    column *= edge;
    const int height = (int)lbq_smaller(edge, cols - row),
              width = (int)lbq_smaller(edge, cols - column);
    const float *const left = job->X + row, *const right = job->X + column;
    const int tokens = (int)job->tokens, stride = (int)cols, side = (int)edge;
    if (row == column)
        LBQ_CBLAS(ssyrk, CblasUpper, CblasTrans, width, tokens, 1, left, stride, 0, tile, side);
    else
        LBQ_CBLAS(sgemm,
                  CblasTrans,
                  CblasNoTrans,
                  height,
                  width,
                  tokens,
                  1,
                  left,
                  stride,
                  right,
                  stride,
                  0,
                  tile,
                  side);
    for (ptrdiff_t i = 0; i < height; i++) {
        double *const sum = job->H + (row + i) * cols + column;
        for (ptrdiff_t j = row == column ? i : 0; j < width; j++)
            sum[j] += (double)tile[i * edge + j];
    }
    return LBQ_OK;
}

/* Y = diag(sqrt(w)) X. */
static lbq_status
scale_rows(ptrdiff_t tokens, ptrdiff_t cols, const float *X, const float *weights, ptrdiff_t first,
           float *Y)
{
    for (ptrdiff_t t = 0; t < tokens; t++) {
        LBQ_REQUIRE(weights[t] >= 0 && isfinite(weights[t]),
                    LBQ_BAD_VALUE,
                    "weights[%td] is %g, expected a finite number >= 0",
                    first + t,
                    (double)weights[t]);
        const float root = sqrtf(weights[t]);
        for (ptrdiff_t k = 0; k < cols; k++)
            Y[t * cols + k] = root * X[t * cols + k];
    }
    return LBQ_OK;
}

static lbq_status
add_blocks(ptrdiff_t tokens, ptrdiff_t cols, const float *X, const float *weights, double *H,
           ptrdiff_t edge, float *tiles, float *scaled)
{
    const ptrdiff_t side = lbq_pieces(cols, edge);
    for (ptrdiff_t first = 0; first < tokens; first += TOKENS) {
        const ptrdiff_t count = lbq_smaller(TOKENS, tokens - first);
        const float *block = X + first * cols;
        if (weights) {
            LBQ_TRY(scale_rows(count, cols, block, weights + first, first, scaled));
            block = scaled;
        }
        adding job = {count, cols, block, H, edge, tiles};
        LBQ_TRY(lbq_parallel(side * (side + 1) / 2, add_tile, &job));
    }
    return LBQ_OK;
}

lbq_status
lbq_hessian_add(ptrdiff_t tokens, ptrdiff_t cols, const float *X, const float *weights, double *H)
{
    const ptrdiff_t edge = lbq_smaller(MAX_EDGE, lbq_pieces(cols, LEAST_TILES));
    const size_t tile_bytes = (size_t)lbq_threads() * (size_t)(edge * edge) * sizeof(float);
    const size_t scaled_bytes =
        weights ? (size_t)lbq_smaller(TOKENS, tokens) * (size_t)cols * sizeof(float) : 0;
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded(tile_bytes) + lbq_padded(scaled_bytes)));
    float *const tiles = lbq_arena_take(&arena, tile_bytes);
    float *const scaled = lbq_arena_take(&arena, scaled_bytes);
    const lbq_status status = add_blocks(tokens, cols, X, weights, H, edge, tiles, scaled);
    lbq_arena_close(&arena);
    LBQ_TRY(status);
    /* Any bad number in column k of X shows up in H[k,k]. */
    for (ptrdiff_t k = 0; k < cols; k++)
        LBQ_REQUIRE(isfinite(H[k * cols + k]),
                    LBQ_BAD_VALUE,
                    "X has a NaN, an infinity or a number too large to square in column %td",
                    k);
    return LBQ_OK;
}

typedef struct {
    ptrdiff_t rows, cols, tile;
    const double *H;
    const float *E;
    double *scratch; /* tile * (cols + SLAB) numbers per thread */
    double *sums;    /* one per task */
} measuring;

/* e H e^T, one slab of columns at a time; entries above the diagonal of H count twice. */
static lbq_status
measure_rows(void *context, ptrdiff_t index, int worker)
{
    const measuring *const job = context;
    const ptrdiff_t cols = job->cols, first = index * job->tile;
    const ptrdiff_t rows = lbq_smaller(job->tile, job->rows - first);
    double *const e = job->scratch + (ptrdiff_t)worker * job->tile * (cols + SLAB);
    double *const product = e + job->tile * cols;
    for (ptrdiff_t i = 0; i < rows * cols; i++)
        e[i] = (double)job->E[first * cols + i];
    double sum = 0;
    for (ptrdiff_t begin = 0; begin < cols; begin += SLAB) {
        const ptrdiff_t width = lbq_smaller(SLAB, cols - begin);
        LBQ_TRY(lbq_interrupted());
        LBQ_CBLAS(dsymm,
                  CblasRight,
                  CblasUpper,
                  (int)rows,
                  (int)width,
                  1,
                  job->H + begin * (cols + 1),
                  (int)cols,
                  e + begin,
                  (int)cols,
                  0,
                  product,
                  SLAB);
        if (begin > 0)
            LBQ_CBLAS(dgemm,
                      CblasNoTrans,
                      CblasNoTrans,
                      (int)rows,
                      (int)width,
                      (int)begin,
                      2,
                      e,
                      (int)cols,
                      job->H + begin,
                      (int)cols,
                      1,
                      product,
                      SLAB);
        for (ptrdiff_t r = 0; r < rows; r++)
            for (ptrdiff_t k = 0; k < width; k++)
                sum += e[r * cols + begin + k] * product[r * SLAB + k];
    }
    job->sums[index] = sum;
    return LBQ_OK;
}

lbq_status
lbq_hessian_error(ptrdiff_t rows, ptrdiff_t cols, const double *H, const float *E, double *value)
{
    const ptrdiff_t tile = lbq_smaller(rows / 4 + 1, MAX_ROWS);
    const ptrdiff_t tasks = lbq_pieces(rows, tile);
    const size_t sum_bytes = (size_t)tasks * sizeof(double);
    const size_t scratch_bytes =
        (size_t)lbq_threads() * (size_t)tile * (size_t)(cols + SLAB) * sizeof(double);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded(sum_bytes) + lbq_padded(scratch_bytes)));
    measuring job = {.rows = rows, .cols = cols, .tile = tile, .H = H, .E = E};
    job.sums = lbq_arena_take(&arena, sum_bytes);
    job.scratch = lbq_arena_take(&arena, scratch_bytes);
    const lbq_status status = lbq_parallel(tasks, measure_rows, &job);
    double total = 0;
    for (ptrdiff_t i = 0; i < tasks && status == LBQ_OK; i++)
        total += job.sums[i];
    lbq_arena_close(&arena);
    LBQ_TRY(status);
    *value = total;
    return LBQ_OK;
}

/* By tiles, each via a copy, because the entries of a column of H map to few cache sets. */
lbq_status
lbq_hessian_unfold(ptrdiff_t cols, const double *H, double damping, double *full)
{
    enum { SIDE = 32 };
    double most = 0;
    for (ptrdiff_t k = 0; k < cols; k++)
        most = fmax(most, H[k * (cols + 1)] + damping);
    int exponent = 0;
    if (most <= DBL_MAX)
        frexp(most, &exponent);
    const double unit = ldexp(1, exponent > -1000 ? -exponent : 1000);
    bool finite = true;
    for (ptrdiff_t top = 0; top < cols; top += SIDE) {
        LBQ_TRY(lbq_interrupted());
        for (ptrdiff_t left = top; left < cols; left += SIDE) {
            const ptrdiff_t bottom = lbq_smaller(top + SIDE, cols);
            const ptrdiff_t right = lbq_smaller(left + SIDE, cols);
            double copy[SIDE][SIDE + 1];
            for (ptrdiff_t i = top; i < bottom; i++)
                for (ptrdiff_t k = i > left ? i : left; k < right; k++) {
                    const double value = unit * (H[i * cols + k] + (i == k ? damping : 0));
                    finite &= fabs(value) <= DBL_MAX;
                    full[i * cols + k] = copy[k - left][i - top] = value;
                }
            for (ptrdiff_t k = left; k < right; k++)
                for (ptrdiff_t i = top; i < lbq_smaller(bottom, k); i++)
                    full[k * cols + i] = copy[k - left][i - top];
        }
    }
    LBQ_REQUIRE(finite, LBQ_BAD_VALUE, "the Hessian has a NaN or an infinity");
    return LBQ_OK;
}
