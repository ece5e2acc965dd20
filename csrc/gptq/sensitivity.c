/* Sums over pieces of a matrix, each in eight lanes that compilers turn into vectors: they may not
 * reorder a plain sum of floating-point numbers. */
#include "gptq/sensitivity.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "core/threads.h"

enum {
    LANES = 8,
    PIECE = 1 << 15,         /* numbers of a task: some ten microseconds, against one to start it */
    FIRST_INFINITE = 0x7f80, /* the bin of infinity; NaN come after it */
};

static double
total(const double lanes[LANES])
{
    double sum = 0;
    for (int l = 0; l < LANES; l++)
        sum += lanes[l];
    return sum;
}

/* Fails, naming the place, if x (rows, cols) has a number that is not finite. */
static lbq_status
refuse_not_finite(const char *name, const char *row, ptrdiff_t rows, ptrdiff_t cols, const float *x)
{
    for (ptrdiff_t i = 0; i < rows * cols; i++)
        LBQ_REQUIRE(isfinite(x[i]),
                    LBQ_BAD_VALUE,
                    "%s has a NaN or an infinity at %s %td, column %td",
                    name,
                    row,
                    i / cols,
                    i % cols);
    return LBQ_OK;
}

/* --- weights ---------------------------------------------------------------------------------- */

typedef struct {
    ptrdiff_t rows, cols, piece; /* rows of a piece */
    const float *W, *Q, *h, *G;
    lbq_weight_sums *sums; /* one for each piece */
} weighing;

typedef struct {
    double error[LANES], weight[LANES], weighted_error[LANES], weighted_weight[LANES];
    double gradient[LANES], fisher[LANES];
} weight_lanes;

static void
add_weights(const float *w, const float *q, const float *h, const float *g, weight_lanes *sums)
{
    double error[LANES], weight[LANES];
    for (int l = 0; l < LANES; l++) {
        const double value = (double)w[l], e = value - (double)q[l];
        sums->error[l] += error[l] = e * e;
        sums->weight[l] += weight[l] = value * value;
    }
    for (int l = 0; l < LANES && h; l++) {
        sums->weighted_error[l] += (double)h[l] * error[l];
        sums->weighted_weight[l] += (double)h[l] * weight[l];
    }
    for (int l = 0; l < LANES && g; l++) {
        const double square = (double)g[l] * (double)g[l];
        sums->gradient[l] += square;
        sums->fisher[l] += square * error[l];
    }
}

/* The first `count` lanes of x, then zeros; NULL if there is no x. */
static const float *
padded(const float *x, ptrdiff_t count, float lanes[LANES])
{
    if (!x)
        return NULL;
    memset(lanes, 0, LANES * sizeof *lanes);
    return memcpy(lanes, x, (size_t)count * sizeof *x);
}

static lbq_status
weigh_piece(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const weighing *const job = context;
    const ptrdiff_t cols = job->cols, whole = cols / LANES * LANES, rest = cols - whole;
    const ptrdiff_t first = index * job->piece, end = lbq_smaller(first + job->piece, job->rows);
    weight_lanes sums = {0};
    for (ptrdiff_t r = first; r < end; r++) {
        const float *const w = job->W + r * cols, *const q = job->Q + r * cols;
        const float *const g = job->G ? job->G + r * cols : NULL, *const h = job->h;
        for (ptrdiff_t k = 0; k < whole; k += LANES)
            add_weights(w + k, q + k, h ? h + k : NULL, g ? g + k : NULL, &sums);
        float tails[4][LANES];
        if (rest)
            add_weights(padded(w + whole, rest, tails[0]),
                        padded(q + whole, rest, tails[1]),
                        padded(h ? h + whole : NULL, rest, tails[2]),
                        padded(g ? g + whole : NULL, rest, tails[3]),
                        &sums);
    }
    job->sums[index] = (lbq_weight_sums){
        .error = total(sums.error),
        .weight = total(sums.weight),
        .weighted_error = total(sums.weighted_error),
        .weighted_weight = total(sums.weighted_weight),
        .gradient = total(sums.gradient),
        .fisher = total(sums.fisher),
    };
    return LBQ_OK;
}

lbq_status
lbq_weights_sum(ptrdiff_t rows, ptrdiff_t cols, const float *W, const float *Q, const float *h,
                const float *G, lbq_weight_sums *sums)
{
    for (ptrdiff_t k = 0; k < cols && h; k++)
        LBQ_REQUIRE(h[k] >= 0 && isfinite(h[k]),
                    LBQ_BAD_VALUE,
                    "importance[%td] is %g, expected a finite number >= 0",
                    k,
                    (double)h[k]);
    weighing job = {.rows = rows, .cols = cols, .W = W, .Q = Q, .h = h, .G = G};
    job.piece = PIECE / cols + 1;
    const ptrdiff_t pieces = lbq_pieces(rows, job.piece);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded((size_t)pieces * sizeof *job.sums)));
    job.sums = lbq_arena_take(&arena, (size_t)pieces * sizeof *job.sums);
    const lbq_status status = lbq_parallel(pieces, weigh_piece, &job);
    *sums = (lbq_weight_sums){0};
    for (ptrdiff_t i = 0; i < pieces && status == LBQ_OK; i++) {
        sums->error += job.sums[i].error;
        sums->weight += job.sums[i].weight;
        sums->weighted_error += job.sums[i].weighted_error;
        sums->weighted_weight += job.sums[i].weighted_weight;
        sums->gradient += job.sums[i].gradient;
        sums->fisher += job.sums[i].fisher;
    }
    lbq_arena_close(&arena);
    LBQ_TRY(status);
    if (!isfinite(sums->error + sums->gradient)) {
        LBQ_TRY(refuse_not_finite("weight", "row", rows, cols, W));
        LBQ_TRY(refuse_not_finite("quantized", "row", rows, cols, Q));
        LBQ_TRY(refuse_not_finite("gradient", "row", rows, cols, G));
    }
    return LBQ_OK;
}

/* --- inputs ----------------------------------------------------------------------------------- */

typedef struct {
    ptrdiff_t count;
    const float *x;
    double tau;
    lbq_input_sums *sums; /* one for each piece */
    int64_t *counts;      /* LBQ_MAGNITUDES for each thread */
} scanning;

typedef struct {
    double above[LANES], magnitude[LANES], squares[LANES], squares_above[LANES], largest[LANES];
} input_lanes;

static void
add_inputs(const float *x, double tau, input_lanes *sums)
{
    for (int l = 0; l < LANES; l++) {
        const double value = fabs((double)x[l]), square = value * value;
        sums->magnitude[l] += value;
        sums->squares[l] += square;
        sums->squares_above[l] += value > tau ? square : 0;
        sums->above[l] += value > tau ? 1.0 : 0;
        sums->largest[l] = value > sums->largest[l] ? value : sums->largest[l];
    }
}

static lbq_status
scan_piece(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const scanning *const job = context;
    const ptrdiff_t first = index * PIECE, count = lbq_smaller(PIECE, job->count - first);
    const ptrdiff_t whole = count / LANES * LANES;
    const float *const x = job->x + first;
    input_lanes sums = {0};
    for (ptrdiff_t i = 0; i < whole; i += LANES)
        add_inputs(x + i, job->tau, &sums);
    float tail[LANES];
    if (whole < count)
        add_inputs(padded(x + whole, count - whole, tail), job->tau, &sums);
    double largest = 0;
    for (int l = 0; l < LANES; l++)
        largest = fmax(largest, sums.largest[l]);
    job->sums[index] = (lbq_input_sums){
        .above = (ptrdiff_t)total(sums.above),
        .magnitude = total(sums.magnitude),
        .squares = total(sums.squares),
        .squares_above = total(sums.squares_above),
        .largest = largest,
    };
    return LBQ_OK;
}

lbq_status
lbq_inputs_sum(ptrdiff_t tokens, ptrdiff_t cols, const float *x, double tau, lbq_input_sums *sums)
{
    scanning job = {.count = tokens * cols, .x = x, .tau = tau};
    const ptrdiff_t pieces = lbq_pieces(job.count, PIECE);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded((size_t)pieces * sizeof *job.sums)));
    job.sums = lbq_arena_take(&arena, (size_t)pieces * sizeof *job.sums);
    const lbq_status status = lbq_parallel(pieces, scan_piece, &job);
    *sums = (lbq_input_sums){0};
    for (ptrdiff_t i = 0; i < pieces && status == LBQ_OK; i++) {
        sums->above += job.sums[i].above;
        sums->magnitude += job.sums[i].magnitude;
        sums->squares += job.sums[i].squares;
        sums->squares_above += job.sums[i].squares_above;
        sums->largest = fmax(sums->largest, job.sums[i].largest);
    }
    lbq_arena_close(&arena);
    LBQ_TRY(status);
    return isfinite(sums->squares) ? LBQ_OK : refuse_not_finite("x", "token", tokens, cols, x);
}

static lbq_status
count_piece(void *context, ptrdiff_t index, int worker)
{
    const scanning *const job = context;
    int64_t *const counts = job->counts + (ptrdiff_t)worker * LBQ_MAGNITUDES;
    const ptrdiff_t end = lbq_smaller((index + 1) * PIECE, job->count);
    for (ptrdiff_t i = index * PIECE; i < end; i++) {
        uint32_t bits;
        memcpy(&bits, &job->x[i], sizeof bits);
        counts[bits >> 16 & (LBQ_MAGNITUDES - 1)]++;
    }
    return LBQ_OK;
}

lbq_status
lbq_magnitudes_count(ptrdiff_t tokens, ptrdiff_t cols, const float *x, int64_t *counts)
{
    const ptrdiff_t threads = lbq_threads();
    const size_t bytes = (size_t)threads * LBQ_MAGNITUDES * sizeof *counts;
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded(bytes)));
    scanning job = {.count = tokens * cols, .x = x, .counts = lbq_arena_take(&arena, bytes)};
    memset(job.counts, 0, bytes);
    const lbq_status status = lbq_parallel(lbq_pieces(job.count, PIECE), count_piece, &job);
    int64_t infinite = 0;
    for (ptrdiff_t i = 0; i < threads * LBQ_MAGNITUDES && status == LBQ_OK; i++) {
        counts[i % LBQ_MAGNITUDES] += job.counts[i];
        infinite += i % LBQ_MAGNITUDES >= FIRST_INFINITE ? job.counts[i] : 0;
    }
    lbq_arena_close(&arena);
    LBQ_TRY(status);
    return infinite == 0 ? LBQ_OK : refuse_not_finite("x", "token", tokens, cols, x);
}
