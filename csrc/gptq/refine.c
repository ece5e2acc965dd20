/* Coordinate descent, rows in parallel; the products of all rows' errors with H in one go. */
#include "gptq/refine.h"

#include <limits.h>
#include <math.h>

#include "core/blas.h"
#include "core/memory.h"
#include "core/threads.h"
#include "gptq/hessian.h"

typedef struct {
    const lbq_code *code;
    ptrdiff_t cols, group, groups;
    const float *W, *scale, *offset;
    const double *H; /* both triangles, damped */
    int sweeps;
    uint8_t *codes;
    double *error, *product; /* w - q, and its product with H */
    ptrdiff_t *moves;        /* (rows) */
} job;

static lbq_status
error_row(void *context, ptrdiff_t row, int worker)
{
    const job *const j = context;
    (void)worker;
    for (ptrdiff_t k = 0; k < j->cols; k++) {
        const ptrdiff_t at = row * j->cols + k, g = row * j->groups + k / j->group;
        LBQ_REQUIRE(isfinite(j->W[at]) && j->codes[at] < j->code->count,
                    LBQ_BAD_VALUE,
                    "weight[%td, %td] is %g with code %d, expected finite numbers, codes below %d",
                    row,
                    k,
                    j->W[at],
                    j->codes[at],
                    j->code->count);
        j->error[at] = j->W[at] - lbq_code_decode(j->code, j->codes[at], j->scale[g], j->offset[g]);
    }
    return LBQ_OK;
}

/* The move of column k to a neighbouring level that lowers the row's error most: -1, +1, or 0; and
 * what it adds to the error of the weight. */
static int
best_move(const job *j, const double *product, const uint8_t *value, double scale, double offset,
          ptrdiff_t k, double *turn)
{
    const double curvature = j->H[k * j->cols + k];
    const double here = lbq_code_decode(j->code, *value, scale, offset);
    /* What a free weight could gain here; rounding must not pass for progress. */
    double least = curvature > 0 ? -1e-9 * product[k] * product[k] / curvature : 0;
    int best = 0;
    for (int way = -1; way <= 1; way += 2) {
        const int next = *value + way;
        if (next < 0 || next >= j->code->count)
            continue;
        const double t = here - lbq_code_decode(j->code, (uint8_t)next, scale, offset);
        const double change = t * (2 * product[k] + t * curvature);
        if (change < least) {
            least = change;
            *turn = t;
            best = way;
        }
    }
    return best;
}

static lbq_status
descend_row(void *context, ptrdiff_t row, int worker)
{
    const job *const j = context;
    (void)worker;
    double *const product = j->product + row * j->cols;
    uint8_t *const codes = j->codes + row * j->cols;
    ptrdiff_t before = -1;
    j->moves[row] = 0;
    for (int sweep = 0; sweep < j->sweeps && j->moves[row] > before; sweep++) {
        before = j->moves[row];
        for (ptrdiff_t k = 0; k < j->cols; k++) {
            const ptrdiff_t g = row * j->groups + k / j->group;
            double turn = 0;
            const int move = best_move(j, product, codes + k, j->scale[g], j->offset[g], k, &turn);
            if (!move)
                continue;
            codes[k] = (uint8_t)(codes[k] + move);
            for (ptrdiff_t i = 0; i < j->cols; i++)
                product[i] += turn * j->H[k * j->cols + i];
            j->moves[row]++;
        }
    }
    return LBQ_OK;
}

lbq_status
lbq_refine(const lbq_code *code, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t group, const float *W,
           const double *H, double damping, int sweeps, const float *scale, const float *offset,
           uint8_t *codes, ptrdiff_t *moved)
{
    LBQ_TRY(lbq_code_check(code));
    LBQ_REQUIRE(rows > 0 && cols > 0 && group > 0 && rows <= INT_MAX && cols <= INT_MAX,
                LBQ_BAD_SHAPE,
                "%td rows, %td columns in groups of %td",
                rows,
                cols,
                group);
    const size_t matrix = lbq_padded((size_t)(rows * cols) * sizeof(double));
    const size_t gram = lbq_padded((size_t)(cols * cols) * sizeof(double));
    const size_t counts = lbq_padded((size_t)rows * sizeof(ptrdiff_t));
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, 2 * matrix + gram + counts));
    double *const full = lbq_arena_take(&arena, gram);
    job j = {
        .code = code,
        .cols = cols,
        .group = group,
        .groups = (cols - 1) / group + 1,
        .W = W,
        .scale = scale,
        .offset = offset,
        .H = full,
        .sweeps = sweeps,
        .codes = codes,
        .error = lbq_arena_take(&arena, matrix),
        .product = lbq_arena_take(&arena, matrix),
        .moves = lbq_arena_take(&arena, counts),
    };
    lbq_status status = lbq_hessian_unfold(cols, H, damping, full);
    if (status == LBQ_OK)
        status = lbq_parallel(rows, error_row, &j);
    *moved = 0;
    if (status == LBQ_OK) {
        BLAS(cblas_dgemm)(CblasRowMajor,
                          CblasNoTrans,
                          CblasNoTrans,
                          (int)rows,
                          (int)cols,
                          (int)cols,
                          1,
                          j.error,
                          (int)cols,
                          full,
                          (int)cols,
                          0,
                          j.product,
                          (int)cols);
        status = lbq_parallel(rows, descend_row, &j);
    }
    for (ptrdiff_t r = 0; status == LBQ_OK && r < rows; r++)
        *moved += j.moves[r];
    lbq_arena_close(&arena);
    return status;
}
