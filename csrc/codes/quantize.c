/* Rounds a matrix strip by strip: for each group the scales, then the words. */
#include "codes/quantize.h"

#include <math.h>
#include <string.h>

#include "codes/importance.h"
#include "codes/stored.h"
#include "core/memory.h"
#include "core/pack.h"
#include "core/threads.h"
#include "kernels/kernels.h"

lbq_status
lbq_range_method_find(const char *name, lbq_range_method *method)
{
    static const char *const names[] = {"minmax", "percentile", "mse"};
    for (int i = 0; i < 3; i++)
        if (strcmp(name, names[i]) == 0) {
            *method = (lbq_range_method)i;
            return LBQ_OK;
        }
    return lbq_fail(
        LBQ_BAD_VALUE, "method is '%s', expected 'minmax', 'percentile' or 'mse'", name);
}

/* A single row and group of at least this many weights is a whole matrix, and the search for its
 * scale spreads it over the lanes. Shorter ones are rows, whose sums must not depend on other
 * rows. */
enum { LONG = 1 << 15 };

/* The rounding of a matrix, to codes or to panels. */
typedef struct {
    const lbq_code *code;
    const lbq_search *search;
    ptrdiff_t rows, cols, group, groups;
    ptrdiff_t strip; /* rows per strip */
    ptrdiff_t step;  /* columns encoded at a time */
    bool fixed;
    const float *W;
    const float *importance; /* (cols, LBQ_PANEL), or (cols) if together */
    float *tiles;            /* (threads, tile) */
    ptrdiff_t tile;
    char *scratch; /* (threads, scratch_bytes), for the code's kind */
    size_t scratch_bytes;
    bool together; /* the matrix is one row and one group, LONG or longer */
    uint8_t *codes;
    float *scale, *offset;
    const lbq_packed *packed;
    lbq_packed_geometry geometry;
    uint8_t *panels;
} quantization;

/* A binary group of +-largest has a scale of twice that. */
static float
largest_weight(int scale_bits)
{
    return scale_bits == 16 ? 65504.0f / 2 : 1e30f;
}

/* Checks rows [first, end) of W. */
static lbq_status
check_weight_rows(int scale_bits, ptrdiff_t first, ptrdiff_t end, ptrdiff_t cols, const float *W)
{
    const float largest = largest_weight(scale_bits);
    float low[LBQ_PANEL], high[LBQ_PANEL];
    bool fit = true;
    for (ptrdiff_t row = first; row < end && fit; row += LBQ_PANEL) {
        const ptrdiff_t count = lbq_smaller(LBQ_PANEL, end - row);
        fit = lbq_kernel.range_f32(W + row * cols, cols, count, cols, largest, low, high);
    }
    for (ptrdiff_t i = first * cols; i < end * cols && !fit; i++) {
        LBQ_REQUIRE(isfinite(W[i]),
                    LBQ_BAD_VALUE,
                    "weight[%td, %td] is %g, expected finite numbers",
                    i / cols,
                    i % cols,
                    (double)W[i]);
        LBQ_REQUIRE(fabsf(W[i]) <= largest,
                    LBQ_BAD_VALUE,
                    "weight[%td, %td] is %g, expected at most %g: its scale would not fit",
                    i / cols,
                    i % cols,
                    (double)W[i],
                    (double)largest);
    }
    return LBQ_OK;
}

lbq_status
lbq_check_weights(int scale_bits, ptrdiff_t rows, ptrdiff_t cols, const float *W)
{
    return check_weight_rows(scale_bits, 0, rows, cols, W);
}

/* The rows of one strip, or of one of its panels; none if `count` < 1. */
typedef struct {
    ptrdiff_t first, count;
} panel_rows;

static panel_rows
rows_of(const quantization *job, ptrdiff_t strip)
{
    const ptrdiff_t first = strip * job->strip;
    return (panel_rows){first, lbq_smaller(job->strip, job->rows - first)};
}

static panel_rows
panel_of(panel_rows strip, ptrdiff_t panel)
{
    const ptrdiff_t before = panel * LBQ_PANEL;
    return (panel_rows){strip.first + before, lbq_smaller(LBQ_PANEL, strip.count - before)};
}

static lbq_status
check_rows(const quantization *job, panel_rows rows)
{
    const ptrdiff_t end = rows.first + rows.count;
    return check_weight_rows(job->code->scale_bits, rows.first, end, job->cols, job->W);
}

/* Fits the only group of a one-row matrix, spread over all lanes. */
static void
fit_together(const quantization *job, float *tile, float *scale, float *offset)
{
    const ptrdiff_t count = job->cols, rows = count / LBQ_PANEL;
    const lbq_groups groups = {
        .w = tile,
        .importance = job->importance,
        .count = rows,
        .together = true,
        .rest = (int)(count % LBQ_PANEL),
    };
    memset(tile + rows * LBQ_PANEL, 0, LBQ_PANEL * sizeof *tile);
    memcpy(tile, job->W, (size_t)count * sizeof *tile);
    job->code->kind->fit(job->code, job->search, &groups, scale, offset);
}

/* Fits scales and offsets of the group that starts at column `begin`, and checks its weights. */
static lbq_status
fit_rows(const quantization *job, panel_rows rows, ptrdiff_t begin, ptrdiff_t count, int worker,
         float *scale, float *offset)
{
    const float *const W = job->W + rows.first * job->cols + begin;
    float *const tile = job->tiles + worker * job->tile;
    float low[LBQ_PANEL], high[LBQ_PANEL];
    if (job->together) {
        LBQ_TRY(check_rows(job, rows));
        fit_together(job, tile, scale, offset);
        return LBQ_OK;
    }
    if (!lbq_kernel.range_f32(
            W, job->cols, rows.count, count, largest_weight(job->code->scale_bits), low, high))
        return check_rows(job, rows);
    for (ptrdiff_t l = rows.count; l < LBQ_PANEL; l++)
        low[l] = high[l] = 0;
    if (job->search->method == LBQ_RANGE_MINMAX) {
        lbq_range_fit(job->code, job->search->clip, low, high, scale, offset);
        if (!job->code->symmetric || !lbq_any_coarse(job->code, scale))
            return LBQ_OK;
    }
    lbq_kernel.to_lanes_f32(W, job->cols, rows.count, NULL, NULL, count, tile);
    const lbq_groups groups = {
        .w = tile,
        .importance = job->importance ? job->importance + begin * LBQ_PANEL : NULL,
        .count = count,
        .low = low,
        .high = high,
    };
    job->code->kind->fit(job->code, job->search, &groups, scale, offset);
    return LBQ_OK;
}

/* Grids of a strip: scale, offset and 1 / scale as [3][rows of the strip]. */
typedef float grids[3 * LBQ_STRIP];

static lbq_status
fit_strip(const quantization *job, panel_rows rows, ptrdiff_t begin, ptrdiff_t count, int worker,
          float *grid)
{
    for (ptrdiff_t p = 0; p * LBQ_PANEL < rows.count; p++) {
        float *const scale = grid + p * LBQ_PANEL, *const offset = scale + job->strip;
        LBQ_TRY(fit_rows(job, panel_of(rows, p), begin, count, worker, scale, offset));
    }
    return LBQ_OK;
}

/* Words of the columns [begin, begin + count), block by block. */
static void
encode_blocks(const quantization *job, panel_rows rows, ptrdiff_t begin, ptrdiff_t count,
              const lbq_grid *grid, int worker, uint8_t *words)
{
    const lbq_code_kind *const kind = job->code->kind;
    const ptrdiff_t strip = job->strip;
    static const float none[LBQ_MAX_RUN * LBQ_STRIP];
    float w[LBQ_MAX_RUN * LBQ_STRIP], e[LBQ_MAX_RUN * LBQ_STRIP];
    uint8_t block[LBQ_MAX_RUN * LBQ_STRIP];
    char *const scratch = job->scratch + (size_t)worker * job->scratch_bytes;
    for (ptrdiff_t k = 0; k < count; k += kind->cols) {
        for (ptrdiff_t c = 0; c < kind->cols; c++)
            for (ptrdiff_t r = 0; r < strip; r++)
                w[c * strip + r] = r < rows.count && k + c < count
                                       ? job->W[(rows.first + r) * job->cols + begin + k + c]
                                       : 0;
        kind->encode(job->code, grid, w, none, strip, block, e, scratch);
        for (ptrdiff_t c = 0; c < kind->cols; c++)
            for (ptrdiff_t r = 0; r < strip; r++)
                words[r / LBQ_PANEL * job->step * LBQ_PANEL + lbq_word_at(k + c, r % LBQ_PANEL)] =
                    block[c * strip + r];
    }
}

/* Words of `count` columns starting at `begin`, at most a step, which zeros fill up. */
static void
encode_step(const quantization *job, panel_rows rows, ptrdiff_t begin, ptrdiff_t count,
            ptrdiff_t ahead, const float *lanes, int worker, uint8_t *words)
{
    const lbq_code_kind *const kind = job->code->kind;
    const lbq_grid grid = {.rows = rows.count, .lanes = lanes};
    if (count < job->step)
        memset(words, 0, (size_t)(job->step * job->strip));
    if (kind->encode_rows)
        kind->encode_rows(job->code,
                          &grid,
                          job->W + rows.first * job->cols + begin,
                          job->cols,
                          count,
                          ahead,
                          words);
    else
        encode_blocks(job, rows, begin, count, &grid, worker, words);
}

/* Writes words of a strip, starting at column `begin`, to the codes. */
static void
store_codes(const quantization *job, panel_rows rows, ptrdiff_t begin, ptrdiff_t count,
            const uint8_t *words)
{
    const lbq_code_kind *const kind = job->code->kind;
    const ptrdiff_t cols = lbq_pieces(job->cols, kind->cols) * kind->cols;
    const ptrdiff_t whole = lbq_pieces(count, kind->cols) * kind->cols;
    for (ptrdiff_t r = 0; r < (kind->rows == 1 ? rows.count : job->strip); r++) {
        uint8_t *const to = job->codes + (rows.first + r) * cols + begin;
        const uint8_t *const from = words + r / LBQ_PANEL * job->step * LBQ_PANEL;
        ptrdiff_t k = 0;
        for (; k + 4 <= whole; k += 4)
            memcpy(to + k, from + lbq_word_at(k, r % LBQ_PANEL), 4);
        for (; k < whole; k++)
            to[k] = from[lbq_word_at(k, r % LBQ_PANEL)];
    }
}

/* Packs scales and offsets of a panel's group; missing rows get 0. */
static lbq_status
pack_scales(const quantization *job, panel_rows rows, ptrdiff_t group, const float *scale,
            uint8_t *panel)
{
    const lbq_packed *const packed = job->packed;
    const float *const offset = scale + job->strip;
    uint8_t *const to = panel + job->geometry.scale_at + group * job->geometry.scale_stride;
    if (packed->scale_bits != 16) {
        memset(to, 0, (size_t)(packed->scale_bits * LBQ_PANEL / 8));
        for (ptrdiff_t l = 0; l < rows.count; l++)
            LBQ_TRY(lbq_scale_pack(packed, rows.first + l, group, scale[l], offset[l], to));
        return LBQ_OK;
    }
    uint16_t half[2 * LBQ_PANEL];
    lbq_kernel.narrow_f16(scale, LBQ_PANEL, half);
    lbq_kernel.narrow_f16(offset, LBQ_PANEL, half + LBQ_PANEL);
    for (ptrdiff_t l = rows.count > 0 ? rows.count : 0; l < LBQ_PANEL; l++)
        half[l] = half[LBQ_PANEL + l] = 0;
    memcpy(to, half, sizeof half / 2);
    if (packed->has_offset)
        memcpy(to + sizeof half / 2, half + LBQ_PANEL, sizeof half / 2);
    return LBQ_OK;
}

static lbq_status
store_grid(const quantization *job, panel_rows rows, ptrdiff_t group, const float *grid,
           uint8_t *panels)
{
    for (ptrdiff_t p = 0; job->packed && p < job->geometry.strip; p++) {
        uint8_t *const panel = panels + p * job->geometry.panel_bytes;
        LBQ_TRY(pack_scales(job, panel_of(rows, p), group, grid + p * LBQ_PANEL, panel));
    }
    for (ptrdiff_t l = 0; !job->packed && l < rows.count; l++) {
        const ptrdiff_t at = (rows.first + l) * job->groups + group;
        job->scale[at] = grid[l];
        job->offset[at] = grid[job->strip + l];
    }
    return LBQ_OK;
}

/* Loads the given scales and offsets. */
static void
load_grid(const quantization *job, panel_rows rows, ptrdiff_t group, float *grid)
{
    const lbq_packed *const packed = job->packed;
    for (ptrdiff_t l = 0; l < rows.count; l++) {
        const ptrdiff_t at = (rows.first + l) * job->groups + group;
        grid[l] = packed ? packed->unit : job->scale[at];
        grid[job->strip + l] = packed ? -packed->zero * packed->unit : job->offset[at];
    }
}

/* Whether a packed group is finished: no scale is the smallest float16, for which zeros may be
 * better. */
static bool
finished(const quantization *job, ptrdiff_t group, const uint8_t *panel)
{
    uint16_t half[LBQ_PANEL];
    memcpy(half, panel + job->geometry.scale_at + group * job->geometry.scale_stride, sizeof half);
    bool coarse = false;
    for (int l = 0; l < LBQ_PANEL; l++)
        coarse |= half[l] <= 1;
    return !(coarse && job->code->symmetric);
}

static lbq_status
round_strip(void *context, ptrdiff_t strip, int worker)
{
    const quantization *const job = context;
    const lbq_code *const code = job->code;
    const panel_rows rows = rows_of(job, strip);
    uint8_t *const panels = job->panels + strip * job->geometry.strip * job->geometry.panel_bytes;
    const float *const W = job->W + rows.first * job->cols;
    /* With one scale per row, finding the range has cached these rows: prefetch the next ones. */
    const ptrdiff_t ahead = job->groups == 1 ? LBQ_PANEL * job->cols : 0;
    const float limit = largest_weight(code->scale_bits);
    bool fit = !job->fixed;
    ptrdiff_t packed = 0;
    if (fit && job->packed && code->kind->pack && rows.count == LBQ_PANEL)
        packed = code->kind->pack(code, job->search, job->packed, W, limit, panels, &fit);
    if (!fit)
        LBQ_TRY(check_rows(job, rows));
    for (ptrdiff_t g = 0; g < job->groups; g++) {
        if (g < packed && finished(job, g, panels))
            continue;
        const ptrdiff_t begin = g * job->group, end = lbq_smaller(begin + job->group, job->cols);
        grids grid = {0};
        if (job->fixed) {
            load_grid(job, rows, g, grid);
        } else {
            LBQ_TRY(fit_strip(job, rows, begin, end - begin, worker, grid));
            LBQ_TRY(store_grid(job, rows, g, grid, panels));
        }
        for (ptrdiff_t l = 0; l < job->strip; l++)
            grid[2 * job->strip + l] = grid[l] != 0 ? 1 / grid[l] : 0;
        for (ptrdiff_t k = begin; k < end && (job->codes || job->packed); k += job->step) {
            uint8_t words[LBQ_MAX_STEP * LBQ_STRIP];
            const ptrdiff_t count = lbq_smaller(job->step, end - k);
            encode_step(job, rows, k, count, ahead, grid, worker, words);
            if (job->packed)
                lbq_strip_pack(job->packed,
                               &job->geometry,
                               words,
                               panels + k / job->step * job->geometry.step_bytes);
            else
                store_codes(job, rows, k, count, words);
        }
    }
    return LBQ_OK;
}

/* Checks the arguments, allocates scratch, and rounds all strips. */
static lbq_status
over_strips(quantization *job, const float *importance)
{
    const lbq_code_kind *const kind = job->code->kind;
    LBQ_TRY(lbq_code_check(job->code, job->fixed ? NULL : job->search));
    const ptrdiff_t rows = job->rows, cols = job->cols, group = job->group;
    LBQ_REQUIRE(rows > 0 && cols > 0 && group > 0,
                LBQ_BAD_SHAPE,
                "%td rows, %td columns in groups of %td",
                rows,
                cols,
                group);
    job->groups = lbq_pieces(cols, group);
    job->together = rows == 1 && job->groups == 1 && cols >= LONG;
    const ptrdiff_t width = lbq_smaller(group, cols);
    job->tile = job->together ? (cols / LBQ_PANEL + 1) * LBQ_PANEL : width * LBQ_PANEL;
    const ptrdiff_t wide = job->together ? job->tile : cols * LBQ_PANEL;
    const size_t tile_bytes = (size_t)(job->tile * lbq_threads()) * sizeof(float);
    const size_t wide_bytes = importance ? (size_t)wide * sizeof(float) : 0;
    const size_t share_bytes = importance ? (size_t)cols * sizeof(float) : 0;
    job->strip = lbq_strip_rows(job->code);
    job->scratch_bytes = kind->scratch ? lbq_padded(kind->scratch(job->code)) : 0;
    const size_t scratch_bytes = job->scratch_bytes * (size_t)lbq_threads();
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena,
                           lbq_padded(tile_bytes) + lbq_padded(scratch_bytes) +
                               lbq_padded(wide_bytes) + lbq_padded(share_bytes)));
    job->tiles = lbq_arena_take(&arena, tile_bytes);
    job->scratch = lbq_arena_take(&arena, scratch_bytes);
    lbq_status status = LBQ_OK;
    if (importance) {
        float *const lanes = lbq_arena_take(&arena, wide_bytes);
        float *const shares = lbq_arena_take(&arena, share_bytes);
        const ptrdiff_t copies = job->together ? 1 : LBQ_PANEL;
        status = lbq_importance_shares(cols, group, importance, shares);
        for (ptrdiff_t i = 0; i < wide && status == LBQ_OK; i++)
            lanes[i] = i < cols * copies ? shares[i / copies] : 0;
        job->importance = lanes;
    }
    if (status == LBQ_OK)
        status = lbq_parallel(lbq_pieces(rows, job->strip), round_strip, job);
    lbq_arena_close(&arena);
    return status;
}

lbq_status
lbq_quantize(const lbq_code *code, const lbq_search *search, ptrdiff_t rows, ptrdiff_t cols,
             ptrdiff_t group, bool fixed, const float *W, const float *importance, uint8_t *codes,
             float *scale, float *offset)
{
    quantization job = {
        .code = code,
        .search = search,
        .rows = rows,
        .cols = cols,
        .group = group,
        .step = LBQ_MAX_STEP,
        .fixed = fixed,
        .W = W,
        .codes = codes,
        .scale = scale,
        .offset = offset,
    };
    return over_strips(&job, importance);
}

lbq_status
lbq_quantize_packed(const lbq_code *code, const lbq_search *search, const lbq_packed *packed,
                    const float *W, const float *importance, uint8_t *panels)
{
    quantization job = {
        .code = code,
        .search = search,
        .rows = packed->rows,
        .cols = packed->cols,
        .group = packed->group,
        .fixed = packed->scale_bits == 0,
        .W = W,
        .packed = packed,
        .panels = panels,
    };
    LBQ_TRY(lbq_packed_geometry_of(packed, &job.geometry));
    job.step = job.geometry.step;
    return over_strips(&job, importance);
}
