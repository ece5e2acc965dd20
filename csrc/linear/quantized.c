/* Packed weights times int8 activations: quantizes all tokens, then multiplies panels in parallel.
 *
 * A token is rotated and quantized while it is in the L1 cache, once for all layers that read it;
 * factors that depend on a weight's grid are stored once per grid. For up to four tokens, a panel
 * is read once, straight from its codes (gemv), if their kind has such a kernel. More tokens come
 * in tiles of LBQ_TILE: a pair of panels, or a strip if that is more, is expanded to bytes in the
 * L1 cache, some hundred columns at a time, and multiplied with tile after tile (gemm); the sums
 * are then stored to y. Both ways have the same order of float operations. */
#include "linear/quantized.h"

#include <assert.h>
#include <string.h>

#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"

enum {
    FEW = 4,             /* tokens that gemv takes at once */
    EXPANDED_COLS = 640, /* two panels of this many columns take five eighths of a 32 KiB L1 */
    PAIR = 2,            /* panels multiplied at a time */
    STRIP = LBQ_STRIP / LBQ_PANEL,
    BAND = 8,             /* panels of a gemm unit */
    BLOCK = 32,           /* tiles of a gemm task; with 640 columns they take 160 KiB of L2 */
    SPLIT = 1 << 19,      /* fewer multiplications, some 10 us, stay on one thread */
    SPLIT_TASK = 1 << 18, /* and a task has at least this many */
    TILE_SUMS = LBQ_TILE * LBQ_PANEL,
};

/* One of the terms. Its unit, which threads do not share, is a panel or strip for gemv and a band
 * for gemm. Units of all terms are numbered together. A term added to the previous one has no
 * units: it follows that one panel by panel, while the sums are in cache. */
typedef struct {
    const lbq_matrix *matrix;
    lbq_packed_geometry geometry;
    lbq_gemv gemv; /* NULL: none */
    ptrdiff_t rows;
    ptrdiff_t together; /* panels expanded at a time */
    const lbq_term *term;
    ptrdiff_t factors; /* where the factors for its levels begin */
    ptrdiff_t units, first_unit;
} part;

/* Levels of a weight before its scales: base + step * integer. */
typedef struct {
    float base, step;
} grid;

typedef struct {
    const lbq_hadamard *hadamard;     /* before quantizing, or NULL */
    const lbq_activation *activation; /* how to quantize */
    bool centred;                     /* x - zero is quantized */
    ptrdiff_t tokens, cols, step, steps;
    const float *x;
    part parts[LBQ_SHARED];
    ptrdiff_t count, units; /* of all parts */
    ptrdiff_t unit_panels;  /* panels of a unit */
    grid grids[LBQ_SHARED]; /* of the parts, without duplicates */
    ptrdiff_t grid_count;   /* sets of factors */
    ptrdiff_t width, tiles; /* tokens per tile */
    ptrdiff_t padded;       /* columns in whole steps */
    ptrdiff_t tile_bytes;   /* padded * width */
    ptrdiff_t tile_factors; /* steps * 3 * width */
    int8_t *values;         /* per tile as in lbq_activations */
    float *factors;         /* likewise, [grid][tile] */
    size_t sums_bytes;      /* of subset sums: 8 per value, if a part looks up 1-bit codes */
    uint8_t *sums;
    float *zeros;       /* (tokens), if centred */
    ptrdiff_t per_task; /* tiles, units or blocks of units, depending on the loop */
} product;

static lbq_activations
tile_at(const product *job, const part *of, ptrdiff_t tile)
{
    return (lbq_activations){
        .values = job->values + tile * job->tile_bytes,
        .factors = job->factors + of->factors + tile * job->tile_factors,
        .width = job->width,
        .sums = job->sums,
    };
}

/* Scratch of a quantizing task. */
typedef struct {
    int8_t *values;       /* of a tile's tokens, one after the other */
    float *scale, *total; /* of one token */
    float *row;           /* a token, rotated in place */
    float *rotating;
} workspace;

static lbq_status
open_workspace(const product *job, lbq_arena *arena, workspace *w)
{
    const lbq_hadamard *const hadamard = job->hadamard;
    const size_t values = (size_t)job->tile_bytes, steps = sizeof(float) * (size_t)job->steps;
    const size_t row = hadamard || job->centred ? sizeof(float) * (size_t)job->cols : 0;
    const size_t rotating = hadamard ? sizeof(float) * lbq_hadamard_scratch(hadamard) : 0;
    const size_t bytes = lbq_padded(values) + 2 * lbq_padded(steps) + lbq_padded(row);
    LBQ_TRY(lbq_arena_open(arena, bytes + lbq_padded(rotating)));
    w->values = lbq_arena_take(arena, values);
    w->scale = lbq_arena_take(arena, steps);
    w->total = lbq_arena_take(arena, steps);
    w->row = lbq_arena_take(arena, row);
    w->rotating = lbq_arena_take(arena, rotating);
    return LBQ_OK;
}

static void
quantize_token(const product *job, ptrdiff_t token, const workspace *w, int8_t *q)
{
    const float *x = job->x + token * job->cols;
    if (job->hadamard || job->centred) {
        memcpy(w->row, x, sizeof(float) * (size_t)job->cols);
        if (job->hadamard)
            lbq_hadamard_forward(job->hadamard, 1, w->row, w->rotating);
        if (job->centred)
            job->zeros[token] = lbq_activation_centre(job->activation, job->cols, w->row);
        x = w->row;
    }
    lbq_activation_round(job->activation, job->cols, job->step, x, q, w->scale, w->total);
}

/* A token's factors for weights of a grid, as in lbq_activations. */
static void
store_factors(const product *job, const grid *of, const workspace *w, float *factors)
{
    const ptrdiff_t width = job->width;
    for (ptrdiff_t s = 0; s < job->steps; s++, factors += 3 * width) {
        factors[0] = of->step * w->scale[s];
        factors[width] = w->total[s];
        factors[2 * width] = of->base * w->total[s];
    }
}

static void
quantize_tile(const product *job, ptrdiff_t tile, const workspace *w)
{
    const ptrdiff_t width = job->width, set = job->tiles * job->tile_factors;
    int8_t *const values = job->values + tile * job->tile_bytes;
    int8_t *const rows = width == 1 ? values : w->values;
    for (ptrdiff_t t = 0; t < width; t++) {
        const ptrdiff_t token = tile * width + t;
        int8_t *const q = rows + t * job->padded;
        if (token < job->tokens) {
            quantize_token(job, token, w, q);
        } else {
            memset(q, 0, (size_t)job->padded);
            memset(w->scale, 0, sizeof(float) * (size_t)job->steps);
            memset(w->total, 0, sizeof(float) * (size_t)job->steps);
        }
        float *const factors = job->factors + tile * job->tile_factors + t;
        for (ptrdiff_t g = 0; g < job->grid_count; g++)
            store_factors(job, &job->grids[g], w, factors + g * set);
    }
    if (job->sums_bytes)
        lbq_kernel.subset_sums(rows, job->tile_bytes, job->sums);
    if (width > 1)
        lbq_kernel.interleave(rows, job->padded, width, values);
}

static lbq_status
quantize_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const product *const job = context;
    const ptrdiff_t end = lbq_smaller((index + 1) * job->per_task, job->tiles);
    lbq_arena arena;
    workspace w;
    LBQ_TRY(open_workspace(job, &arena, &w));
    for (ptrdiff_t tile = index * job->per_task; tile < end; tile++)
        quantize_tile(job, tile, &w);
    lbq_arena_close(&arena);
    return LBQ_OK;
}

static const part *
part_of(const product *job, ptrdiff_t unit)
{
    const part *of = job->parts;
    while (unit >= of->first_unit + of->units)
        of++;
    return of;
}

/* The next part that is added to the same y; NULL: none. */
static const part *
following(const product *job, const part *of)
{
    const part *const next = of + 1;
    return next < job->parts + job->count && next->units == 0 ? next : NULL;
}

/* Adds the bias to the rows of some panels, for some tokens. */
static void
add_bias(const part *of, ptrdiff_t panel, ptrdiff_t panels, ptrdiff_t token, ptrdiff_t tokens)
{
    const float *const bias = of->term->bias;
    const ptrdiff_t row = panel * LBQ_PANEL;
    const ptrdiff_t rows = lbq_smaller(panels * LBQ_PANEL, of->rows - row);
    for (ptrdiff_t t = token; bias && t < token + tokens; t++)
        for (ptrdiff_t r = row; r < row + rows; r++)
            of->term->y[t * of->rows + r] += bias[r];
}

/* Whether the sums go to y unchanged. */
static bool
is_plain(const part *of)
{
    return !of->term->add && !of->term->weight && !of->term->copy->sums;
}

/* Stores the sums of some rows and one token to y. */
static void
store_sums(const product *job, const part *of, ptrdiff_t token, ptrdiff_t row, ptrdiff_t rows,
           const float *sums)
{
    const lbq_term *const term = of->term;
    float *const y = term->y + token * of->rows + row;
    if (is_plain(of)) {
        memcpy(y, sums, sizeof(float) * (size_t)rows);
        return;
    }
    const float zero = job->centred ? job->zeros[token] : 0;
    for (ptrdiff_t r = 0; r < rows; r++) {
        float value = sums[r];
        if (term->copy->sums)
            value += zero * term->copy->sums[row + r];
        if (term->weight)
            value *= term->weight[row + r];
        y[r] = term->add ? y[r] + value : value;
    }
}

static lbq_panel
panel_at(const part *of, ptrdiff_t index)
{
    lbq_panel panel = lbq_packed_panel(&of->matrix->packed, &of->geometry, index);
    panel.bytes = of->matrix->code->bytes.table;
    panel.trellis = of->matrix->code->trellis;
    return panel;
}

/* Multiplies some panels of a part, whole strips, by a few tokens. */
static void
multiply_panels(const product *job, const part *of, ptrdiff_t first, ptrdiff_t panels)
{
    const ptrdiff_t strip = of->geometry.strip, bytes = strip * of->geometry.panel_bytes;
    const ptrdiff_t rows = of->rows;
    const ptrdiff_t whole = job->tokens == 1 && is_plain(of) ? rows / LBQ_PANEL : 0;
    const lbq_activations x = tile_at(job, of, 0);
    lbq_panel panel = panel_at(of, first);
    for (ptrdiff_t p = first; p < first + panels; p += strip) {
        _Alignas(64) float sums[FEW * LBQ_STRIP];
        if (p + strip <= whole) { /* sums of one token */
            of->gemv(&panel, &x, of->term->y + p * LBQ_PANEL);
        } else {
            of->gemv(&panel, &x, sums);
            for (ptrdiff_t i = 0; i < strip && (p + i) * LBQ_PANEL < rows; i++) {
                const ptrdiff_t row = (p + i) * LBQ_PANEL;
                const float *const from = sums + i * job->width * LBQ_PANEL;
                const ptrdiff_t here = lbq_smaller(LBQ_PANEL, rows - row);
                for (ptrdiff_t t = 0; t < job->tokens; t++)
                    store_sums(job, of, t, row, here, from + t * LBQ_PANEL);
            }
        }
        panel.codes += bytes;
        panel.scale += bytes;
    }
    add_bias(of, first, panels, 0, job->tokens);
}

static lbq_status
gemv_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const product *const job = context;
    const ptrdiff_t end = lbq_smaller((index + 1) * job->per_task, job->units);
    for (ptrdiff_t unit = index * job->per_task; unit < end;) {
        const part *const of = part_of(job, unit);
        const ptrdiff_t first = unit - of->first_unit;
        const ptrdiff_t units = lbq_smaller(of->units - first, end - unit);
        const ptrdiff_t panel = first * job->unit_panels;
        const ptrdiff_t panels =
            lbq_smaller(units * job->unit_panels, lbq_pieces(of->rows, LBQ_PANEL) - panel);
        for (const part *p = of; p; p = following(job, p))
            multiply_panels(job, p, panel, panels);
        unit += units;
    }
    return LBQ_OK;
}

/* Stores the sums of a tile, [panel][token][row], to y, without padding rows and tokens. */
static void
store_tile(const product *job, const part *of, ptrdiff_t first, ptrdiff_t panels, ptrdiff_t tile,
           const float *sums)
{
    const ptrdiff_t rows = of->rows, token = tile * LBQ_TILE;
    const ptrdiff_t tokens = lbq_smaller(LBQ_TILE, job->tokens - token);
    ptrdiff_t p = 0;
    if (is_plain(of)) {
        p = lbq_smaller(panels, rows / LBQ_PANEL - first);
        float *const y = of->term->y + token * rows + first * LBQ_PANEL;
        lbq_kernel.store_tile(sums, p, tokens, rows, y);
    }
    for (; p < panels; p++) {
        const ptrdiff_t row = (first + p) * LBQ_PANEL, here = lbq_smaller(LBQ_PANEL, rows - row);
        for (ptrdiff_t t = 0; t < tokens; t++)
            store_sums(job, of, token + t, row, here, sums + (p * LBQ_TILE + t) * LBQ_PANEL);
    }
}

/* Multiplies the panels expanded together, starting at `first`, by `tiles` tiles; bytes and sums
 * are scratch. */
static void
multiply_together(const product *job, const part *of, ptrdiff_t first, ptrdiff_t first_tile,
                  ptrdiff_t tiles, uint8_t *bytes, float *sums)
{
    const lbq_packed_geometry *const g = &of->geometry;
    const ptrdiff_t most = PAIR * EXPANDED_COLS / of->together / LBQ_MAX_STEP * LBQ_MAX_STEP;
    const ptrdiff_t passes = lbq_pieces(job->padded, most), steps = lbq_pieces(job->steps, passes);
    const ptrdiff_t panels = lbq_smaller(of->together, lbq_pieces(of->rows, LBQ_PANEL) - first);
    const ptrdiff_t tile_sums = passes == 1 ? 0 : of->together * TILE_SUMS;
    lbq_panel panel[STRIP];
    for (ptrdiff_t p = 0; p < panels; p++)
        panel[p] = panel_at(of, first + p);
    for (ptrdiff_t s = 0; s < job->steps; s += steps) {
        const ptrdiff_t end = lbq_smaller(s + steps, job->steps);
        const ptrdiff_t panel_bytes = (end - s) * job->step * LBQ_PANEL;
        for (ptrdiff_t p = 0; p < panels; p += g->strip)
            lbq_matrix_bytes(of->matrix, g, first + p, s, end, bytes + p * panel_bytes);
        for (ptrdiff_t i = 0; i < tiles; i++) {
            const lbq_activations x = tile_at(job, of, first_tile + i);
            float *const y = sums + i * tile_sums;
            for (ptrdiff_t p = 0; p < panels; p += PAIR)
                lbq_kernel.gemm_u8_i8(panel + p,
                                      lbq_smaller(PAIR, panels - p),
                                      of->matrix->code->bytes.bits,
                                      bytes + p * panel_bytes,
                                      s,
                                      end,
                                      &x,
                                      y + p * TILE_SUMS);
            if (end == job->steps)
                store_tile(job, of, first, panels, first_tile + i, y);
        }
    }
}

/* A band of panels times a block of tiles. */
static void
multiply_band(const product *job, const part *of, ptrdiff_t first, ptrdiff_t first_tile,
              uint8_t *bytes, float *sums)
{
    const ptrdiff_t end = lbq_smaller(first + BAND, lbq_pieces(of->rows, LBQ_PANEL));
    const ptrdiff_t tiles = lbq_smaller(BLOCK, job->tiles - first_tile);
    for (ptrdiff_t p = first; p < end; p += of->together)
        multiply_together(job, of, p, first_tile, tiles, bytes, sums);
    const ptrdiff_t token = first_tile * LBQ_TILE;
    add_bias(of, first, end - first, token, lbq_smaller(tiles * LBQ_TILE, job->tokens - token));
}

static lbq_status
gemm_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const product *const job = context;
    const ptrdiff_t count = job->units * lbq_pieces(job->tiles, BLOCK);
    const ptrdiff_t end = lbq_smaller((index + 1) * job->per_task, count);
    const size_t sum_bytes = sizeof(float) * BLOCK * STRIP * TILE_SUMS;
    const size_t expanded_bytes = PAIR * LBQ_PANEL * EXPANDED_COLS;
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, sum_bytes + expanded_bytes));
    float *const sums = lbq_arena_take(&arena, sum_bytes);
    uint8_t *const bytes = lbq_arena_take(&arena, expanded_bytes);
    for (ptrdiff_t i = index * job->per_task; i < end; i++) {
        const part *const of = part_of(job, i % job->units);
        const ptrdiff_t first = (i % job->units - of->first_unit) * BAND;
        for (const part *p = of; p; p = following(job, p))
            multiply_band(job, p, first, i / job->units * BLOCK, bytes, sums);
    }
    lbq_arena_close(&arena);
    return LBQ_OK;
}

/* Runs `task` over `count` pieces of `work` operations each, on one thread if few. */
static lbq_status
split(product *job, lbq_task task, ptrdiff_t count, double work)
{
    job->per_task = work * (double)count < SPLIT ? count
                    : work < SPLIT_TASK          ? (ptrdiff_t)(SPLIT_TASK / work) + 1
                                                 : 1;
    return lbq_parallel(lbq_pieces(count, job->per_task), task, job);
}

static lbq_status
run(product *job)
{
    const double row = (double)job->padded; /* multiplications of one row and token */
    const double width = (double)job->width;
    /* Quantizing a number takes about as long as sixteen multiplications, an addition in its
     * rotation as long as three. */
    const double rotating = job->hadamard ? 3 * (double)job->hadamard->cost : 0;
    LBQ_TRY(split(job, quantize_task, job->tiles, (16 + rotating) * row * width));
    const double panel = LBQ_PANEL * row * width;
    if (job->width < LBQ_TILE)
        return split(job, gemv_task, job->units, panel * (double)job->unit_panels);
    const ptrdiff_t tasks = job->units * lbq_pieces(job->tiles, BLOCK);
    const double tiles = (double)lbq_smaller(job->tiles, BLOCK);
    return split(job, gemm_task, tasks, BAND * panel * tiles);
}

static lbq_gemv
gemv_of(const lbq_copy *copy)
{
    const lbq_code *const code = copy->matrix.code;
    return code->kind->gemv ? code->kind->gemv(code) : NULL;
}

/* Appends the term to the parts. */
static lbq_status
add_part(product *job, const lbq_term *term)
{
    const lbq_matrix *const matrix = &term->copy->matrix;
    const lbq_byte_levels *const levels = &matrix->code->bytes;
    part *const to = &job->parts[job->count];
    *to = (part){
        .matrix = matrix,
        .gemv = gemv_of(term->copy),
        .rows = term->copy->rows,
        .term = term,
        .first_unit = job->units,
    };
    LBQ_TRY(lbq_packed_geometry_of(&matrix->packed, &to->geometry));
    to->together = to->geometry.strip > PAIR ? to->geometry.strip : PAIR;
    if (job->count == 0 || term->y != to[-1].term->y)
        to->units = lbq_pieces(to->rows, LBQ_PANEL * job->unit_panels);
    job->count++;
    job->units += to->units;
    if (to->gemv == lbq_kernel.gemv_u1_i8 && job->width < LBQ_TILE)
        job->sums_bytes = 8 * (size_t)job->tile_bytes;

    const float base = levels->base - (matrix->packed.has_offset ? 0 : matrix->packed.zero);
    const float step = levels->step;
    ptrdiff_t g = 0;
    while (g < job->grid_count && (job->grids[g].base != base || job->grids[g].step != step))
        g++;
    if (g == job->grid_count)
        job->grids[job->grid_count++] = (grid){.base = base, .step = step};
    to->factors = g * job->tiles * job->tile_factors;
    return LBQ_OK;
}

lbq_status
lbq_multiply_quantized(ptrdiff_t count, const lbq_term *terms, const lbq_hadamard *hadamard,
                       ptrdiff_t tokens, const float *x)
{
    assert(count <= LBQ_SHARED);
    const lbq_copy *const first = terms[0].copy;
    bool few = tokens <= FEW;
    ptrdiff_t strip = 1;
    for (ptrdiff_t i = 0; i < count; i++) {
        few = few && gemv_of(terms[i].copy);
        if (lbq_strip_rows(terms[i].copy->matrix.code) > LBQ_PANEL)
            strip = STRIP;
    }
    product job = {
        .hadamard = hadamard,
        .activation = &first->activation,
        .centred = first->sums,
        .tokens = tokens,
        .cols = first->cols,
        .step = lbq_packed_step(&first->matrix.packed),
        .x = x,
        .unit_panels = few ? strip : BAND,
        .width = !few          ? LBQ_TILE
                 : tokens == 1 ? 1
                               : FEW,
    };
    job.steps = lbq_pieces(job.cols, job.step);
    job.tiles = lbq_pieces(tokens, job.width);
    job.padded = job.steps * job.step;
    job.tile_bytes = job.padded * job.width;
    job.tile_factors = job.steps * 3 * job.width;
    for (ptrdiff_t i = 0; i < count; i++)
        LBQ_TRY(add_part(&job, &terms[i]));
    const size_t values = (size_t)(job.tiles * job.tile_bytes);
    const size_t factors = sizeof(float) * (size_t)(job.grid_count * job.tiles * job.tile_factors);
    const size_t zeros = job.centred ? sizeof(float) * (size_t)tokens : 0;

    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena,
                           lbq_padded(values) + lbq_padded(factors) + lbq_padded(zeros) +
                               lbq_padded(job.sums_bytes)));
    job.values = lbq_arena_take(&arena, values);
    job.factors = lbq_arena_take(&arena, factors);
    job.zeros = lbq_arena_take(&arena, zeros);
    job.sums = lbq_arena_take(&arena, job.sums_bytes);
    const lbq_status status = run(&job);
    lbq_arena_close(&arena);
    return status;
}
