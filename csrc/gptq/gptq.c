/* GPTQ in LDL form, for a factored H. Tiles of rows run from the first column to the last without
 * waiting for each other. */
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
#include "gptq/factor.h"
#include "kernels/kernels.h"

enum {
    LANES = LBQ_PANEL,
    /* Rows of the largest task; every product packs R again, so small tasks are slower. */
    MAX_TILE = 1024,
    FEW = 8, /* columns whose sums stay in registers */
};

typedef struct {
    const lbq_gptq_problem *problem;
    ptrdiff_t groups;
    ptrdiff_t strip, run;  /* rows and columns rounded together */
    ptrdiff_t code_rows;   /* rows, padded to whole blocks */
    size_t encoding_bytes; /* scratch of the code's kind */
    ptrdiff_t tile, pitch; /* rows of a task; the same padded to an odd number of cache lines */
    ptrdiff_t blocks;
    const ptrdiff_t *block_begin; /* (blocks + 1) */
    ptrdiff_t width;              /* columns of the widest block */
    bool refit;
    const int64_t *order, *group_of; /* (cols): the column at each place, and its group */
    const int64_t *ascending;        /* (cols): the columns of each block, sorted; */
    const int64_t *place;            /* (cols): and their places in the block */
    const float *importance;         /* (cols, LANES): shares in that order, or NULL */
    const uint8_t *still; /* (rows, groups): whether the group absorbs no errors; NULL: none */
    const float *W;
    uint8_t *codes;
    float *scale, *offset;
    char *scratch; /* of all threads */
    size_t scratch_bytes;
} run_state;

/* A strip of one block: its rows, and the place of the block's first column in the order. */
typedef struct {
    ptrdiff_t row, rows, column;
} lanes;

/* lbq_kernels.feedback_f32 and solve_f32 in float64. */
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

/* Encodes a block with the code's kind; e holds the feedback, then the errors. */
static void
encode_f32(const run_state *state, ptrdiff_t rows, const float *lanes_of, const float *w,
           uint8_t *words, float *e, void *scratch)
{
    const lbq_code *const code = state->problem->code;
    const lbq_grid grid = {.rows = rows, .lanes = lanes_of};
    code->kind->encode(code, &grid, w, e, state->pitch, words, e, scratch);
}

static void
encode_f64(const run_state *state, ptrdiff_t rows, const double *lanes_of, const double *w,
           uint8_t *words, double *e, void *scratch)
{
    const lbq_code *const code = state->problem->code;
    const ptrdiff_t strip = state->strip, run = state->run;
    if (code->kind->encode_f64) {
        code->kind->encode_f64(code, lanes_of, w, e, words, e);
        return;
    }
    float lanes_f32[3 * LBQ_STRIP], w_f32[LBQ_MAX_RUN * LBQ_STRIP], e_f32[LBQ_MAX_RUN * LBQ_STRIP];
    for (ptrdiff_t l = 0; l < 3 * strip; l++)
        lanes_f32[l] = (float)lanes_of[l];
    for (ptrdiff_t i = 0; i < run * strip; i++) {
        w_f32[i] = (float)w[i];
        e_f32[i] = (float)e[i / strip * state->pitch + i % strip];
    }
    const lbq_grid grid = {.rows = rows, .lanes = lanes_f32};
    code->kind->encode(code, &grid, w_f32, e_f32, strip, words, e_f32, scratch);
    for (ptrdiff_t i = 0; i < run * strip; i++)
        e[i / strip * state->pitch + i % strip] = (double)e_f32[i];
}

/* Checks that the grids of a group, in the rows starting at `row`, cover its weights with
 * feedback. */
static lbq_status
check_fit(const run_state *state, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t group,
          const lbq_groups *groups, const float *scale, const float *offset)
{
    const lbq_gptq_problem *const p = state->problem;
    const ptrdiff_t begin = group * p->group;
    for (ptrdiff_t l = 0; l < rows; l++)
        LBQ_REQUIRE(lbq_grid_reaches(p->code, groups->low[l], groups->high[l], scale[l], offset[l]),
                    LBQ_BAD_VALUE,
                    "weight[%td, %td:%td] reaches %g with the errors fed back to it: its scale "
                    "would not fit",
                    row + l,
                    begin,
                    lbq_smaller(begin + p->group, p->cols),
                    (double)fmaxf(-groups->low[l], groups->high[l]));
    return LBQ_OK;
}

#define REAL float
#define NAME(name) name##_f32
#define GEMM lbq_sgemm
#define FEEDBACK lbq_kernel.feedback_f32
#define SOLVE lbq_kernel.solve_f32
#include "gptq/gptq_rows.h"
#undef REAL
#undef NAME
#undef GEMM
#undef FEEDBACK
#undef SOLVE

#define REAL double
#define NAME(name) name##_f64
#define GEMM lbq_dgemm
#define FEEDBACK feedback_f64
#define SOLVE solve_f64
#include "gptq/gptq_rows.h"
#undef REAL
#undef NAME
#undef GEMM
#undef FEEDBACK
#undef SOLVE

/* Columns that blocks must not split: a group if its scale is fitted, else a word. */
static ptrdiff_t
unit_of(const run_state *state)
{
    return state->refit ? state->problem->group : state->run;
}

/* Computed before the first row is rounded: the order and everything derived from it. `at` (cols)
 * is scratch. */
typedef struct {
    int64_t *order, *group_of, *ascending, *place, *at;
    ptrdiff_t *block_begin;
    float *importance;
    uint8_t *seen, *still;
} order_plan;

/* Returns the size of the plan; lays it out at `base` unless `plan` is NULL. */
static size_t
order_plan_of(const run_state *state, char *base, order_plan *plan)
{
    const lbq_gptq_problem *const p = state->problem;
    const size_t cols = (size_t)p->cols;
    const size_t sizes[] = {
        cols * sizeof(int64_t),
        cols * sizeof(int64_t),
        cols * sizeof(int64_t),
        cols * sizeof(int64_t),
        cols * sizeof(int64_t),
        (cols + 1) * sizeof(ptrdiff_t),
        p->importance ? cols * LANES * sizeof(float) : 0,
        cols / (size_t)unit_of(state) + 1,
        (size_t)(p->rows * state->groups),
    };
    size_t at[10] = {0};
    for (int i = 0; i < 9; i++)
        at[i + 1] = at[i] + lbq_padded(sizes[i]);
    if (plan)
        *plan = (order_plan){
            .order = (int64_t *)(base + at[0]),
            .group_of = (int64_t *)(base + at[1]),
            .ascending = (int64_t *)(base + at[2]),
            .place = (int64_t *)(base + at[3]),
            .at = (int64_t *)(base + at[4]),
            .block_begin = (ptrdiff_t *)(base + at[5]),
            .importance = (float *)(base + at[6]),
            .seen = (uint8_t *)(base + at[7]),
            .still = (uint8_t *)(base + at[8]),
        };
    return at[9];
}

/* Cuts the order into blocks of about p->block columns, in whole groups if these are fitted and
 * always in whole runs. Returns the number of blocks, or 0 if the order scatters a group. */
static ptrdiff_t
cut_blocks(const run_state *state, order_plan *plan)
{
    const lbq_gptq_problem *const p = state->problem;
    const int64_t *const order = plan->order;
    const ptrdiff_t unit = unit_of(state);
    memset(plan->seen, 0, (size_t)(p->cols / unit + 1));
    plan->block_begin[0] = 0;
    ptrdiff_t blocks = 0;
    for (ptrdiff_t begin = 0, end; begin < p->cols; begin = end) {
        end = begin;
        for (ptrdiff_t first = begin, next; first < p->cols; first = next) {
            for (next = first; next < p->cols && order[next] / unit == order[first] / unit;)
                next++;
            if (first > begin && next - begin > p->block)
                break;
            if (plan->seen[order[first] / unit]++)
                return 0;
            end = next;
        }
        plan->block_begin[++blocks] = end;
    }
    return blocks;
}

/* Checks that the columns of a word are adjacent and ascending. */
static lbq_status
check_runs(const run_state *state, const int64_t *order)
{
    const ptrdiff_t run = state->run, cols = state->problem->cols;
    LBQ_REQUIRE(cols % run == 0 && (state->groups == 1 || state->problem->group % run == 0),
                LBQ_BAD_SHAPE,
                "%td columns in groups of %td are not whole runs of %td",
                cols,
                state->problem->group,
                run);
    for (ptrdiff_t j = 0; j < cols; j++)
        LBQ_REQUIRE(order[j] == order[j / run * run] + j % run && order[j] % run == j % run,
                    LBQ_BAD_VALUE,
                    "order[%td] is %lld: it scatters the %td columns of a word",
                    j,
                    (long long)order[j],
                    run);
    return LBQ_OK;
}

static int
compare_columns(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void
sort_blocks(ptrdiff_t blocks, const order_plan *plan)
{
    const int64_t *const order = plan->order;
    memcpy(plan->ascending, order, (size_t)plan->block_begin[blocks] * sizeof *order);
    for (ptrdiff_t b = 0; b < blocks; b++) {
        const ptrdiff_t begin = plan->block_begin[b], end = plan->block_begin[b + 1];
        int64_t *const ascending = plan->ascending + begin;
        for (ptrdiff_t j = begin; j < end; j++)
            plan->at[order[j]] = j - begin;
        qsort(ascending, (size_t)(end - begin), sizeof *ascending, compare_columns);
        for (ptrdiff_t j = begin; j < end; j++)
            plan->place[j] = plan->at[plan->ascending[j]];
    }
}

/* Finds the groups that absorb no errors: groups of zeros, which stay zero, and groups whose
 * weights are at most twice the smallest scale, which could not follow the feedback. Rows that
 * share one scale for the whole matrix can, unless all weights are that small. */
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

/* One group per row: fits scale and offset to the original weights. */
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
    p->code->kind->fit(p->code, p->search, &groups, scale, offset);
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

/* Fills the plan and hands it to the state. */
static lbq_status
make_plan(run_state *state, order_plan *plan)
{
    const lbq_gptq_problem *const p = state->problem;
    LBQ_TRY(lbq_order_copy(p->cols, p->order, plan->order));
    LBQ_TRY(check_runs(state, plan->order));
    if (p->importance)
        LBQ_TRY(spread_importance(p, plan->order, (float *)plan->at, plan->importance));
    state->blocks = cut_blocks(state, plan);
    LBQ_REQUIRE(state->blocks > 0,
                LBQ_BAD_VALUE,
                "order scatters the columns of a group: fit the scales beforehand");
    sort_blocks(state->blocks, plan);
    for (ptrdiff_t j = 0; j < p->cols; j++)
        plan->group_of[j] = plan->order[j] / p->group;
    for (ptrdiff_t i = 0; i < state->blocks; i++) {
        const ptrdiff_t width = plan->block_begin[i + 1] - plan->block_begin[i];
        state->width = width > state->width ? width : state->width;
    }
    state->order = plan->order;
    state->group_of = plan->group_of;
    state->block_begin = plan->block_begin;
    state->ascending = plan->ascending;
    state->place = plan->place;
    state->importance = p->importance ? plan->importance : NULL;
    state->still = find_still(state, plan->still) ? plan->still : NULL;
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

/* Rows of a task: at least four tasks, to balance threads. Words of a larger block take so long to
 * find that a task is one strip. Depends on rows only, so results do not depend on the thread
 * count. */
static ptrdiff_t
tile_of(ptrdiff_t rows, ptrdiff_t strip)
{
    if (strip > LANES)
        return strip;
    return lbq_smaller(lbq_pieces(lbq_pieces(rows, 4), strip) * strip, MAX_TILE);
}

/* Runs the tiles with scratch for every thread. */
static lbq_status
round_tiles(run_state *state)
{
    state->scratch_bytes = state->problem->float64 ? scratch_of_f64(state, NULL, NULL)
                                                   : scratch_of_f32(state, NULL, NULL);
    const size_t total = state->scratch_bytes * (size_t)lbq_threads();
    lbq_arena work;
    LBQ_TRY(lbq_arena_open(&work, total));
    state->scratch = lbq_arena_take(&work, total);
    const lbq_status status = run_tiles(state);
    lbq_arena_close(&work);
    return status;
}

lbq_status
lbq_gptq(const lbq_gptq_problem *problem, const float *W, uint8_t *codes, float *scale,
         float *offset)
{
    const lbq_gptq_problem *const p = problem;
    LBQ_REQUIRE(p->rows > 0 && p->cols > 0 && p->group > 0 && p->block > 0,
                LBQ_BAD_SHAPE,
                "%td rows, %td columns in groups of %td and blocks of %td",
                p->rows,
                p->cols,
                p->group,
                p->block);
    LBQ_TRY(lbq_code_check(p->code, p->fixed ? NULL : p->search));
    LBQ_TRY(lbq_check_weights(p->code->scale_bits, p->rows, p->cols, W));
    const lbq_code_kind *const kind = p->code->kind;
    const ptrdiff_t strip = lbq_strip_rows(p->code), groups = lbq_pieces(p->cols, p->group);
    run_state state = {
        .problem = p,
        .groups = groups,
        .strip = strip,
        .run = kind->cols,
        .code_rows = lbq_pieces(p->rows, kind->rows) * kind->rows,
        .encoding_bytes = kind->scratch ? kind->scratch(p->code) : 0,
        .refit = !p->fixed && groups > 1,
        .W = W,
        .codes = codes,
        .scale = scale,
        .offset = offset,
        .tile = tile_of(p->rows, strip),
    };
    state.pitch = state.tile + (state.tile % (2 * LANES) == 0 ? LANES : 0);

    lbq_arena arena;
    order_plan plan;
    const size_t bytes = order_plan_of(&state, NULL, NULL);
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    order_plan_of(&state, lbq_arena_take(&arena, bytes), &plan);
    lbq_status status = make_plan(&state, &plan);
    if (status == LBQ_OK)
        status = round_tiles(&state);
    lbq_arena_close(&arena);
    return status;
}
