/* Whole rows per task. Each task has a table of its own for dlevels; they are added in order. */
#include "codes/groups.h"

#include "core/memory.h"
#include "core/threads.h"

enum { WORKSET = 1 << 16 /* weights per task: some 50 us */ };

typedef struct {
    const lbq_grids *grids;
    lbq_visitor visit;
    const void *context;
    const lbq_grid_gradients *gradients;
    ptrdiff_t groups, rows_per_task;
    double *tables; /* (tasks, LBQ_MAX_LEVELS), or NULL */
} job;

static void
visit_row(const job *j, ptrdiff_t row, double *table)
{
    const lbq_grids *const grids = j->grids;
    const float zero = grids->code->zero;
    float *const dscale = j->gradients->dscale, *const doffset = j->gradients->doffset;
    for (ptrdiff_t g = 0; g < j->groups; g++) {
        const ptrdiff_t at = row * j->groups + g, begin = g * grids->group;
        const float scale = grids->scale[at];
        lbq_group group = {
            .first = row * grids->cols + begin,
            .count = lbq_smaller(grids->group, grids->cols - begin),
            .at = at,
            .scale = scale,
            .offset = grids->offset ? grids->offset[at] : -zero * scale,
            .by_level = table,
        };
        j->visit(j->context, &group);
        const double shifted = grids->offset ? 0 : (double)zero * group.by_offset;
        if (dscale)
            dscale[at] = (float)(group.by_scale - shifted);
        if (doffset)
            doffset[at] = (float)group.by_offset;
    }
}

static lbq_status
rows_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const job *const j = context;
    const ptrdiff_t first = index * j->rows_per_task;
    const ptrdiff_t end = lbq_smaller(first + j->rows_per_task, j->grids->rows);
    double *const table = j->tables ? j->tables + index * LBQ_MAX_LEVELS : NULL;
    for (ptrdiff_t row = first; row < end; row++)
        visit_row(j, row, table);
    return LBQ_OK;
}

static lbq_status
run(job *j)
{
    const ptrdiff_t tasks = lbq_pieces(j->grids->rows, j->rows_per_task);
    float *const dlevels = j->gradients->dlevels;
    if (!dlevels)
        return lbq_parallel(tasks, rows_task, j);
    const ptrdiff_t size = tasks * LBQ_MAX_LEVELS;
    LBQ_TRY(lbq_allocate((size_t)size * sizeof *j->tables, &j->tables));
    for (ptrdiff_t i = 0; i < size; i++)
        j->tables[i] = 0;
    const lbq_status status = lbq_parallel(tasks, rows_task, j);
    for (int c = 0; c < j->grids->code->count && status == LBQ_OK; c++) {
        double total = 0;
        for (ptrdiff_t i = 0; i < tasks; i++)
            total += j->tables[i * LBQ_MAX_LEVELS + c];
        dlevels[c] = (float)total;
    }
    lbq_free(j->tables);
    return status;
}

lbq_status
lbq_visit_groups(const lbq_grids *grids, lbq_visitor visit, const void *context,
                 const lbq_grid_gradients *gradients)
{
    const lbq_code *const code = grids->code;
    static const lbq_grid_gradients none = {0};
    job j = {
        .grids = grids,
        .visit = visit,
        .context = context,
        .gradients = gradients ? gradients : &none,
        .groups = lbq_pieces(grids->cols, grids->group),
        .rows_per_task = WORKSET / grids->cols + 1,
    };
    LBQ_REQUIRE(code->kind->ordered,
                LBQ_BAD_VALUE,
                "words of kind %s are no levels, so they cannot follow a weight one by one",
                code->kind->name);
    LBQ_REQUIRE(!j.gradients->dlevels || code->levels,
                LBQ_BAD_VALUE,
                "dlevels is given, but kind %s has no table of levels",
                code->kind->name);
    return run(&j);
}

lbq_status
lbq_check_words(const lbq_grids *grids, const uint8_t *words, const char *name, int top)
{
    const ptrdiff_t count = grids->rows * grids->cols;
    uint8_t most = 0;
    for (ptrdiff_t i = 0; i < count; i++)
        most = words[i] > most ? words[i] : most;
    for (ptrdiff_t i = 0; i < count && most > top; i++)
        LBQ_REQUIRE(words[i] <= top,
                    LBQ_BAD_VALUE,
                    "%s[%td, %td] is %d, expected at most %d",
                    name,
                    i / grids->cols,
                    i % grids->cols,
                    words[i],
                    top);
    return LBQ_OK;
}
