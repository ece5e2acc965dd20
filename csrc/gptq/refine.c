/* Coordinate descent on codes, by tiles of rows.
 *
 * A move of column k adds `turn` times row k of H to the product of the row's error with H. This
 * happens at once within a block of columns and later elsewhere, recursively by halves of the
 * columns, as GPTQ feeds errors forward; but since few codes move, single rows of H are added
 * instead of a matrix product. Products are float32. If their rounding could decide whether a move
 * helps, the product is recomputed in float64, so that the codes equal those of a float64
 * descent. */
#include "gptq/refine.h"

#include <limits.h>
#include <math.h>

#include "core/blas.h"
#include "core/interrupt.h"
#include "core/memory.h"
#include "core/threads.h"
#include "gptq/hessian.h"
#include "kernels/kernels.h"

enum {
    MAX_TILE = 1024, /* rows of the largest task; every product packs H again */
    BLOCK = 128,     /* columns within which moves take effect at once: 64 KiB of H */
    /* Rows and columns of H added for all rows of a tile before the next ones: 512 KiB. */
    DEEP = 4 * BLOCK,
    WIDE = 256,
};

/* Bound on the float32 error of the product of an error e with column k of H, relative to
 * sqrt(H_kk) sum_i |e_i| sqrt(H_ii). Some 25 times the actual error for products of random signs,
 * and about the actual error for products of one sign. */
#define NOISE 0x1p-22f

typedef struct {
    const lbq_code *code;
    ptrdiff_t rows, cols, group, groups, blocks, tile;
    const float *W, *scale, *offset;
    const double *H;        /* both triangles, damped */
    const float *narrow;    /* the same in float32 */
    const double *diagonal; /* of H, */
    const float *root;      /* and its square roots */
    float least_gap;        /* between neighbouring levels */
    int sweeps;
    uint8_t *codes;
    ptrdiff_t *moves; /* (rows) */
    char *scratch;    /* of all threads */
    size_t scratch_bytes;
} job;

/* A tile of rows, and the scratch of a thread. */
typedef struct {
    const job *job;
    ptrdiff_t row, rows;
    float *error, *product; /* (rows, cols): w - q, and its product with H */
    float *noise;           /* (rows): NOISE times the sum over a row */
    int32_t *column;        /* (rows, cols): the columns that moved in this sweep, ascending; */
    float *turn;            /* what each move adds to the error */
    ptrdiff_t *begin;       /* (rows, blocks + 1): where the moves of each block begin */
} tile;

static size_t
tile_bytes(const job *j, char *base, tile *t)
{
    const size_t rows = (size_t)j->tile, matrix = lbq_padded(rows * (size_t)j->cols * 4);
    const size_t noise = lbq_padded(rows * sizeof(float));
    const size_t begin = lbq_padded(rows * (size_t)(j->blocks + 1) * sizeof(ptrdiff_t));
    if (t) {
        t->error = (float *)base;
        t->product = (float *)(base + matrix);
        t->column = (int32_t *)(base + 2 * matrix);
        t->turn = (float *)(base + 3 * matrix);
        t->noise = (float *)(base + 4 * matrix);
        t->begin = (ptrdiff_t *)(base + 4 * matrix + noise);
    }
    return 4 * matrix + noise + begin;
}

static inline double
value_of(const job *j, ptrdiff_t row, ptrdiff_t g, int code)
{
    const double level = (double)lbq_level_of(j->code, code);
    const ptrdiff_t at = row * j->groups + g;
    return (double)j->scale[at] * level + (double)j->offset[at];
}

static lbq_status
load_errors(const tile *t)
{
    const job *const j = t->job;
    for (ptrdiff_t r = 0; r < t->rows; r++) {
        const ptrdiff_t row = t->row + r;
        double sum = 0;
        for (ptrdiff_t g = 0; g < j->groups; g++)
            for (ptrdiff_t k = g * j->group; k < lbq_smaller((g + 1) * j->group, j->cols); k++) {
                const ptrdiff_t at = row * j->cols + k;
                LBQ_REQUIRE(
                    isfinite(j->W[at]) && j->codes[at] < lbq_level_count(j->code),
                    LBQ_BAD_VALUE,
                    "weight[%td, %td] is %g with code %d, expected finite numbers, codes below %d",
                    row,
                    k,
                    (double)j->W[at],
                    j->codes[at],
                    lbq_level_count(j->code));
                const double error = (double)j->W[at] - value_of(j, row, g, j->codes[at]);
                t->error[r * j->cols + k] = (float)error;
                sum += fabs(error) * (double)j->root[k];
            }
        t->noise[r] = NOISE * (float)sum;
    }
    return LBQ_OK;
}

/* The product of a row's error with column k of H. */
static double
exact_product(const job *j, ptrdiff_t row, ptrdiff_t k)
{
    const double *const H = j->H + k * j->cols;
    double sum = 0;
    for (ptrdiff_t g = 0; g < j->groups; g++)
        for (ptrdiff_t i = g * j->group; i < lbq_smaller((g + 1) * j->group, j->cols); i++) {
            const ptrdiff_t at = row * j->cols + i;
            sum += ((double)j->W[at] - value_of(j, row, g, j->codes[at])) * H[i];
        }
    return sum;
}

/* The move of column k, by -1, 0 or +1 levels, that reduces the row's error most; *turn is the
 * change in the weight's error. */
static int
best_move(const job *j, ptrdiff_t row, ptrdiff_t g, ptrdiff_t k, double product, double *turn)
{
    const double curvature = j->diagonal[k];
    const int code = j->codes[row * j->cols + k];
    const double here = value_of(j, row, g, code);
    /* 1e-9 of what an unquantized weight could gain: rounding must not pass for progress. */
    double least = curvature > 0 ? -1e-9 * product * product / curvature : 0;
    int best = 0;
    for (int way = -1; way <= 1; way += 2) {
        if (code + way < 0 || code + way >= lbq_level_count(j->code))
            continue;
        const double t = here - value_of(j, row, g, code + way);
        const double change = t * (2 * product + t * curvature);
        if (change < least) {
            least = change;
            *turn = t;
            best = way;
        }
    }
    return best;
}

/* Moves columns [begin, end) of row r, all in one group. Most are rejected by testing the smallest
 * step, since a move by t helps only if |t| H_kk < 2 |product|. */
static ptrdiff_t
move_columns(const tile *t, ptrdiff_t r, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t block,
             ptrdiff_t moved)
{
    const job *const j = t->job;
    const ptrdiff_t cols = j->cols, row = t->row + r, g = begin / j->group;
    const ptrdiff_t width = lbq_smaller(BLOCK, cols - block);
    const float step = fabsf(j->scale[row * j->groups + g]) * j->least_gap;
    float *const product = t->product + r * cols;
    for (ptrdiff_t k = begin; k < end; k++) {
        const float noise = t->noise[r] * j->root[k];
        if (step * j->root[k] * j->root[k] >= 2.001f * (fabsf(product[k]) + noise))
            continue;
        const double p = (double)product[k];
        double turn = 0, other;
        int move = best_move(j, row, g, k, p - (double)noise, &turn);
        if (best_move(j, row, g, k, p + (double)noise, &other) != move)
            move = best_move(j, row, g, k, exact_product(j, row, k), &turn);
        if (!move)
            continue;
        j->codes[row * cols + k] = (uint8_t)(j->codes[row * cols + k] + move);
        t->column[r * cols + moved] = (int32_t)k;
        t->turn[r * cols + moved] = (float)turn;
        lbq_kernel.add_rows_f32(1,
                                t->column + r * cols + moved,
                                t->turn + r * cols + moved,
                                j->narrow + block,
                                cols,
                                width,
                                product + block);
        moved++;
    }
    return moved;
}

/* Adds the moves of the blocks [first, last) to the products of the columns [begin, end). */
static void
add_moves(const tile *t, ptrdiff_t first, ptrdiff_t last, ptrdiff_t begin, ptrdiff_t end)
{
    const job *const j = t->job;
    for (ptrdiff_t block = first; block < last; block += DEEP / BLOCK)
        for (ptrdiff_t k = begin; k < end; k += WIDE)
            for (ptrdiff_t r = 0; r < t->rows; r++) {
                const ptrdiff_t *const at = t->begin + r * (j->blocks + 1);
                const ptrdiff_t from = at[block], to = at[lbq_smaller(block + DEEP / BLOCK, last)];
                lbq_kernel.add_rows_f32(to - from,
                                        t->column + r * j->cols + from,
                                        t->turn + r * j->cols + from,
                                        j->narrow + k,
                                        j->cols,
                                        lbq_smaller(WIDE, end - k),
                                        t->product + r * j->cols + k);
            }
}

/* One sweep over the blocks [first, last) of all rows. */
static lbq_status
sweep_blocks(const tile *t, ptrdiff_t first, ptrdiff_t last)
{
    const job *const j = t->job;
    const ptrdiff_t begin = first * BLOCK, end = lbq_smaller(last * BLOCK, j->cols);
    if (last - first > 1) {
        const ptrdiff_t half = first + (last - first) / 2, middle = half * BLOCK;
        LBQ_TRY(sweep_blocks(t, first, half));
        add_moves(t, first, half, middle, end);
        LBQ_TRY(sweep_blocks(t, half, last));
        add_moves(t, half, last, begin, middle);
        return lbq_interrupted();
    }
    for (ptrdiff_t r = 0; r < t->rows; r++) {
        ptrdiff_t *const at = t->begin + r * (j->blocks + 1) + first, moved = at[0];
        for (ptrdiff_t k = begin, next; k < end; k = next) {
            next = lbq_smaller((k / j->group + 1) * j->group, end);
            moved = move_columns(t, r, k, next, begin, moved);
        }
        at[1] = moved;
    }
    return lbq_interrupted();
}

static lbq_status
descend_rows(void *context, ptrdiff_t index, int worker)
{
    const job *const j = context;
    const ptrdiff_t row = index * j->tile;
    tile t = {.job = j, .row = row, .rows = lbq_smaller(j->tile, j->rows - row)};
    tile_bytes(j, j->scratch + (size_t)worker * j->scratch_bytes, &t);
    LBQ_TRY(load_errors(&t));
    LBQ_TRY(lbq_sgemm(CblasNoTrans,
                      CblasNoTrans,
                      t.rows,
                      j->cols,
                      j->cols,
                      1,
                      t.error,
                      j->cols,
                      j->narrow,
                      j->cols,
                      0,
                      t.product,
                      j->cols));
    for (ptrdiff_t r = 0; r < t.rows; r++)
        j->moves[row + r] = t.begin[r * (j->blocks + 1)] = 0;
    bool more = true;
    for (int sweep = 0; sweep < j->sweeps && more; sweep++) {
        more = false;
        LBQ_TRY(sweep_blocks(&t, 0, j->blocks));
        for (ptrdiff_t r = 0; r < t.rows; r++) {
            const ptrdiff_t moved = t.begin[r * (j->blocks + 1) + j->blocks];
            j->moves[row + r] += moved;
            more = more || moved > 0;
        }
    }
    return LBQ_OK;
}

/* Derives everything from H, scaled so that float32 can hold it. */
static lbq_status
prepare(job *j, const double *H, double damping, double *full, float *narrow, double *diagonal,
        float *root)
{
    LBQ_TRY(lbq_hessian_unfold(j->cols, H, damping, full));
    for (ptrdiff_t i = 0; i < j->cols * j->cols; i++) {
        if (i % j->cols == 0)
            LBQ_TRY(lbq_interrupted());
        narrow[i] = (float)full[i];
    }
    for (ptrdiff_t k = 0; k < j->cols; k++) {
        diagonal[k] = full[k * (j->cols + 1)];
        root[k] = (float)sqrt(fmax(diagonal[k], 0));
    }
    j->H = full;
    j->narrow = narrow;
    j->diagonal = diagonal;
    j->root = root;
    for (int i = 1; i < lbq_level_count(j->code); i++) {
        const float gap = lbq_level_of(j->code, i) - lbq_level_of(j->code, i - 1);
        j->least_gap = i == 1 || gap < j->least_gap ? gap : j->least_gap;
    }
    return LBQ_OK;
}

lbq_status
lbq_refine(const lbq_code *code, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t group, const float *W,
           const double *H, double damping, int sweeps, const float *scale, const float *offset,
           uint8_t *codes, ptrdiff_t *moved)
{
    LBQ_TRY(lbq_code_check_ordered(code));
    LBQ_REQUIRE(rows > 0 && cols > 0 && group > 0 && rows <= INT_MAX && cols <= INT_MAX,
                LBQ_BAD_SHAPE,
                "%td rows, %td columns in groups of %td",
                rows,
                cols,
                group);
    job j = {
        .code = code,
        .rows = rows,
        .cols = cols,
        .group = group,
        .groups = lbq_pieces(cols, group),
        .blocks = lbq_pieces(cols, BLOCK),
        .tile = lbq_smaller(lbq_pieces(rows, 4), MAX_TILE),
        .W = W,
        .scale = scale,
        .offset = offset,
        .sweeps = sweeps,
        .codes = codes,
    };
    const size_t entries = (size_t)cols * (size_t)cols, n = (size_t)cols;
    const size_t full = lbq_padded(entries * sizeof(double));
    const size_t narrow = lbq_padded(entries * sizeof(float));
    const size_t diagonal = lbq_padded(n * sizeof(double)), root = lbq_padded(n * sizeof(float));
    const size_t counts = lbq_padded((size_t)rows * sizeof(ptrdiff_t));
    j.scratch_bytes = tile_bytes(&j, NULL, NULL);
    const size_t scratch = j.scratch_bytes * (size_t)lbq_threads();
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, full + narrow + diagonal + root + counts + scratch));
    j.moves = lbq_arena_take(&arena, counts);
    j.scratch = lbq_arena_take(&arena, scratch);
    double *const both = lbq_arena_take(&arena, full);
    lbq_status status = prepare(&j,
                                H,
                                damping,
                                both,
                                lbq_arena_take(&arena, narrow),
                                lbq_arena_take(&arena, diagonal),
                                lbq_arena_take(&arena, root));
    if (status == LBQ_OK)
        status = lbq_parallel(lbq_pieces(rows, j.tile), descend_rows, &j);
    *moved = 0;
    for (ptrdiff_t r = 0; status == LBQ_OK && r < rows; r++)
        *moved += j.moves[r];
    lbq_arena_close(&arena);
    return status;
}
