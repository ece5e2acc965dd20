/* Strips in parallel, step after step: levels decoded with scale 1 and offset 0, gradients brought
 * to the same lanes, sums in one lane a row. Each strip has a table of its own for dlevels; they
 * are added in the order of strips. */
#include "codes/gradient.h"

#include <assert.h>

#include "core/memory.h"
#include "core/pack.h"
#include "core/threads.h"

typedef struct {
    const lbq_matrix *matrix;
    lbq_packed_geometry geometry;
    const float *dW, *scale;
    float *dscale, *doffset;
    double *tables; /* (strips, LBQ_MAX_LEVELS), or NULL */
} job;

/* Sums of a group, one lane a row: of dW level, and of dW. */
typedef struct {
    double level[LBQ_STRIP], plain[LBQ_STRIP];
} sums;

/* Adds `count` columns of a panel. dW (count, LBQ_PANEL); level alike, but `pitch` from one column
 * to the next. */
static void
add_columns(const float *dW, const float *level, ptrdiff_t pitch, ptrdiff_t count,
            double *restrict of_level, double *restrict plain)
{
    for (ptrdiff_t k = 0; k < count; k++)
        for (ptrdiff_t l = 0; l < LBQ_PANEL; l++) {
            const double d = (double)dW[k * LBQ_PANEL + l];
            of_level[l] += d * (double)level[k * pitch + l];
            plain[l] += d;
        }
}

/* Adds a panel's dW scale of one step to the table, by words: kinds with a table have strips of one
 * panel. */
static void
add_words(const job *j, const float *dW, ptrdiff_t panel, ptrdiff_t step, ptrdiff_t rows,
          ptrdiff_t count, double *table)
{
    const ptrdiff_t groups = lbq_matrix_groups(j->matrix);
    const float *const scale =
        j->scale + panel * LBQ_PANEL * groups + lbq_matrix_group_of(j->matrix, step);
    uint8_t words[LBQ_MAX_STEP * LBQ_PANEL];
    assert(j->geometry.strip == 1);
    lbq_matrix_words(j->matrix, &j->geometry, panel, step, step + 1, words);
    for (ptrdiff_t k = 0; k < count; k++)
        for (ptrdiff_t r = 0; r < rows; r++)
            table[words[lbq_word_at(k, r)]] +=
                (double)dW[k * LBQ_PANEL + r] * (double)scale[r * groups];
}

static void
store(const job *j, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t group, const sums *sum)
{
    const lbq_packed *const packed = &j->matrix->packed;
    const ptrdiff_t groups = lbq_matrix_groups(j->matrix);
    const double zero = packed->has_offset ? 0 : (double)packed->zero;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const ptrdiff_t at = (first + r) * groups + group;
        if (j->dscale)
            j->dscale[at] = (float)(sum->level[r] - zero * sum->plain[r]);
        if (j->doffset)
            j->doffset[at] = (float)sum->plain[r];
    }
}

/* Adds step `step` of a strip's `rows` rows from `first`. */
static void
add_step(const job *j, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t step, sums *sum, double *table)
{
    const lbq_packed_geometry *const g = &j->geometry;
    const ptrdiff_t cols = j->matrix->packed.cols, lanes = g->strip * LBQ_PANEL;
    const ptrdiff_t begin = step * g->step, count = lbq_smaller(g->step, cols - begin);
    float unit[2 * LBQ_STRIP] = {0}; /* scales, offsets */
    float level[LBQ_MAX_STEP * LBQ_STRIP], dW[LBQ_MAX_STEP * LBQ_PANEL];
    for (ptrdiff_t r = 0; r < lanes; r++)
        unit[r] = 1;
    lbq_matrix_decode(j->matrix, g, first / LBQ_PANEL, step, unit, lanes, level);
    for (ptrdiff_t r = 0; r < rows; r += LBQ_PANEL) {
        const float *const from = j->dW + (first + r) * cols + begin;
        const ptrdiff_t here = lbq_smaller(LBQ_PANEL, rows - r);
        lbq_kernel.to_lanes_f32(from, cols, here, NULL, NULL, count, dW);
        add_columns(dW, level + r, lanes, count, sum->level + r, sum->plain + r);
        if (table)
            add_words(j, dW, (first + r) / LBQ_PANEL, step, here, count, table);
    }
}

static lbq_status
strip_task(void *context, ptrdiff_t strip, int worker)
{
    (void)worker;
    const job *const j = context;
    const ptrdiff_t steps = j->geometry.steps, lanes = j->geometry.strip * LBQ_PANEL;
    const ptrdiff_t first = strip * lanes,
                    rows = lbq_smaller(lanes, j->matrix->packed.rows - first);
    double *const table = j->tables ? j->tables + strip * LBQ_MAX_LEVELS : NULL;
    sums sum = {0};
    for (ptrdiff_t s = 0; s < steps; s++) {
        const ptrdiff_t group = lbq_matrix_group_of(j->matrix, s);
        add_step(j, first, rows, s, &sum, table);
        if (s + 1 < steps && lbq_matrix_group_of(j->matrix, s + 1) == group)
            continue;
        store(j, first, rows, group, &sum);
        sum = (sums){0};
    }
    return LBQ_OK;
}

static lbq_status
run(job *j, float *dlevels)
{
    const ptrdiff_t strips = lbq_pieces(j->matrix->packed.rows, j->geometry.strip * LBQ_PANEL);
    if (!dlevels)
        return lbq_parallel(strips, strip_task, j);
    const ptrdiff_t size = strips * LBQ_MAX_LEVELS;
    LBQ_TRY(lbq_allocate((size_t)size * sizeof *j->tables, &j->tables));
    for (ptrdiff_t i = 0; i < size; i++)
        j->tables[i] = 0;
    const lbq_status status = lbq_parallel(strips, strip_task, j);
    for (int c = 0; c < j->matrix->code->count && status == LBQ_OK; c++) {
        double total = 0;
        for (ptrdiff_t i = 0; i < strips; i++)
            total += j->tables[i * LBQ_MAX_LEVELS + c];
        dlevels[c] = (float)total;
    }
    lbq_free(j->tables);
    return status;
}

lbq_status
lbq_code_gradient(const lbq_matrix *matrix, const float *dW, const float *scale, float *dscale,
                  float *doffset, float *dlevels)
{
    job j = {
        .matrix = matrix,
        .dW = dW,
        .scale = scale,
        .dscale = dscale,
        .doffset = doffset,
    };
    LBQ_TRY(lbq_packed_geometry_of(&matrix->packed, &j.geometry));
    LBQ_REQUIRE(!dlevels || matrix->code->levels,
                LBQ_BAD_VALUE,
                "dlevels is given, but kind %s has no table of levels",
                matrix->code->kind->name);
    return run(&j, dlevels);
}
