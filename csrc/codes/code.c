/* Encoding and decoding by a scalar code, one number or a matrix at a time. */
#include "codes/code.h"

#include <assert.h>
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

static inline bool
odd(int value)
{
    return value & 1;
}

uint8_t
lbq_code_encode(const lbq_code *code, double w, double scale, double offset)
{
    const double x = scale != 0 ? (w - offset) / scale : 0;
    const int top = code->count - 1;
    if (!code->levels)
        return (uint8_t)(x > 0 ? x < top ? rint(x) : top : 0);
    int value = 0;
    for (; value < top && scale != 0; value++) {
        const double middle = 0.5 * ((double)code->levels[value] + code->levels[value + 1]);
        if (!(x > middle || (x == middle && odd(value))))
            break;
    }
    return (uint8_t)value;
}

double
lbq_code_decode(const lbq_code *code, uint8_t value, double scale, double offset)
{
    return scale * (code->levels ? code->levels[value] : value) + offset;
}

/* Codes of one row of one group. */
static void
encode_row(const lbq_code *code, ptrdiff_t count, const float *w, float scale, float offset,
           uint8_t *codes)
{
    if (code->levels) {
        for (ptrdiff_t k = 0; k < count; k++)
            codes[k] = lbq_code_encode(code, (double)w[k], (double)scale, (double)offset);
        return;
    }
    const float inverse = scale != 0 ? 1 / scale : 0, top = (float)(code->count - 1);
    for (ptrdiff_t k = 0; k < count; k++) {
        float x = (w[k] - offset) * inverse;
        x = x > 0 ? x : 0;
        x = x < top ? x : top;
        codes[k] = (uint8_t)(int32_t)((x + 0x1.8p23f) - 0x1.8p23f); /* ties to even */
    }
}

/* A group of so many weights is a whole matrix: it is spread over the lanes when its scale is
 * searched. Shorter ones are rows, whose sums must not depend on whether other rows go with them.
 */
enum { LONG = 1 << 15 };

/* Rounding a matrix: to codes, or to panels. */
typedef struct {
    const lbq_code *code;
    const lbq_range *range;
    ptrdiff_t rows, cols, group, groups;
    bool fixed;
    const float *W;
    const float *importance; /* (cols, LBQ_PANEL); together (cols) */
    float *tiles;            /* (threads, tile) */
    ptrdiff_t tile;
    bool together; /* the matrix is one row and one group, LONG or longer */
    uint8_t *codes;
    float *scale, *offset;
    const lbq_packed *packed;
    lbq_packed_geometry geometry;
    uint8_t *panels;
} quantization;

/* A group of +-largest has a scale of twice that if it is binary. */
static float
largest_weight(int scale_bits)
{
    return scale_bits == 16 ? 65504.0f / 2 : 1e30f;
}

/* The rows [first, end) of W. */
static lbq_status
check_rows(int scale_bits, ptrdiff_t first, ptrdiff_t end, ptrdiff_t cols, const float *W)
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
    return check_rows(scale_bits, 0, rows, cols, W);
}

/* The rows of one panel. */
typedef struct {
    ptrdiff_t first, count;
} panel_rows;

static panel_rows
rows_of(const quantization *job, ptrdiff_t panel)
{
    const ptrdiff_t first = panel * LBQ_PANEL;
    return (panel_rows){first, lbq_smaller(LBQ_PANEL, job->rows - first)};
}

static lbq_status
check_panel(const quantization *job, panel_rows rows)
{
    const ptrdiff_t end = rows.first + rows.count;
    return check_rows(job->code->scale_bits, rows.first, end, job->cols, job->W);
}

/* The only group of a matrix that is one row, spread over all lanes. */
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
    lbq_code_fit(job->code, job->range, &groups, scale, offset);
}

/* Scales and offsets of the group from column `begin` on, whose weights are checked on the way. */
static lbq_status
fit_rows(const quantization *job, panel_rows rows, ptrdiff_t begin, ptrdiff_t count, int worker,
         float *scale, float *offset)
{
    const float *const W = job->W + rows.first * job->cols + begin;
    float *const tile = job->tiles + worker * job->tile;
    float low[LBQ_PANEL], high[LBQ_PANEL];
    if (job->together) {
        LBQ_TRY(check_panel(job, rows));
        fit_together(job, tile, scale, offset);
        return LBQ_OK;
    }
    if (!lbq_kernel.range_f32(
            W, job->cols, rows.count, count, largest_weight(job->code->scale_bits), low, high))
        return check_panel(job, rows);
    if (job->range->method == LBQ_RANGE_MINMAX) {
        lbq_range_fit(job->code, job->range->clip, low, high, scale, offset);
        if (!job->code->symmetric || !lbq_any_coarse(job->code, scale))
            return LBQ_OK;
    }
    for (ptrdiff_t l = rows.count; l < LBQ_PANEL; l++)
        low[l] = high[l] = 0;
    lbq_kernel.to_lanes_f32(W, job->cols, rows.count, NULL, NULL, count, tile);
    const lbq_groups groups = {
        .w = tile,
        .importance = job->importance ? job->importance + begin * LBQ_PANEL : NULL,
        .count = count,
        .low = low,
        .high = high,
    };
    lbq_code_fit(job->code, job->range, &groups, scale, offset);
    return LBQ_OK;
}

static lbq_status
quantize_panel(void *context, ptrdiff_t panel, int worker)
{
    const quantization *const job = context;
    const panel_rows rows = rows_of(job, panel);
    if (job->fixed)
        LBQ_TRY(check_panel(job, rows));
    for (ptrdiff_t g = 0; g < job->groups; g++) {
        const ptrdiff_t begin = g * job->group;
        const ptrdiff_t count = lbq_smaller(job->group, job->cols - begin);
        float scale[LBQ_PANEL], offset[LBQ_PANEL];
        if (!job->fixed)
            LBQ_TRY(fit_rows(job, rows, begin, count, worker, scale, offset));
        for (ptrdiff_t l = 0; l < rows.count; l++) {
            const ptrdiff_t row = rows.first + l;
            const ptrdiff_t at = row * job->groups + g, from = row * job->cols + begin;
            if (!job->fixed) {
                job->scale[at] = scale[l];
                job->offset[at] = offset[l];
            }
            encode_row(job->code,
                       count,
                       job->W + from,
                       job->scale[at],
                       job->offset[at],
                       job->codes + from);
        }
    }
    return LBQ_OK;
}

/* Of the group from step `step` on; what further rows have is 0. */
static lbq_status
store_scales(const quantization *job, panel_rows rows, ptrdiff_t step, const float *grid,
             uint8_t *panel)
{
    const lbq_packed *const packed = job->packed;
    const float *const offset = grid + LBQ_PANEL;
    uint8_t *const to = panel + job->geometry.scale_at + step * job->geometry.scale_stride;
    if (packed->scale_bits != 16) {
        memset(to, 0, (size_t)(packed->scale_bits * LBQ_PANEL / 8));
        for (ptrdiff_t l = 0; l < rows.count; l++)
            LBQ_TRY(lbq_scale_pack(packed, rows.first + l, step, grid[l], offset[l], to));
        return LBQ_OK;
    }
    uint16_t half[2 * LBQ_PANEL];
    lbq_kernel.narrow_f16(grid, 2 * LBQ_PANEL, half);
    for (ptrdiff_t l = rows.count; l < LBQ_PANEL; l++)
        half[l] = half[LBQ_PANEL + l] = 0;
    memcpy(to, half, sizeof half / 2);
    if (packed->has_offset)
        memcpy(to + sizeof half / 2, half + LBQ_PANEL, sizeof half / 2);
    return LBQ_OK;
}

/* Codes of the step from column `begin` on, as lbq_step_pack takes them; 0 behind `count`. */
static void
encode_step(const quantization *job, panel_rows rows, ptrdiff_t begin, ptrdiff_t count,
            const float *grid, uint8_t *codes)
{
    const float *const W = job->W + rows.first * job->cols + begin;
    if (count < job->geometry.step || job->code->levels)
        memset(codes, 0, LBQ_MAX_STEP * LBQ_PANEL);
    if (!job->code->levels) {
        /* Where a row has one scale, its range has brought it to the caches; next come others. */
        const ptrdiff_t ahead = job->geometry.scale_stride ? 0 : LBQ_PANEL * job->cols;
        const int top = job->code->count - 1;
        lbq_kernel.encode_f32(W, job->cols, rows.count, count, grid, top, ahead, codes);
        return;
    }
    for (ptrdiff_t l = 0; l < rows.count; l++) {
        uint8_t row[LBQ_MAX_STEP] = {0};
        encode_row(job->code, count, W + l * job->cols, grid[l], grid[LBQ_PANEL + l], row);
        for (ptrdiff_t k = 0; k < count; k += 4)
            memcpy(codes + k * LBQ_PANEL + 4 * l, row + k, 4);
    }
}

/* Whether a packed step is finished: none of its scales is the smallest float16 there is, where
 * zeros may fit better. */
static bool
finished(const quantization *job, ptrdiff_t step, const uint8_t *panel)
{
    uint16_t half[LBQ_PANEL];
    memcpy(half, panel + job->geometry.scale_at + step * job->geometry.scale_stride, sizeof half);
    bool coarse = false;
    for (int l = 0; l < LBQ_PANEL; l++)
        coarse |= half[l] <= 1;
    return !(coarse && job->code->symmetric);
}

/* Rounds by the range, which for grids of float16 one kernel does: how many steps, and whether all
 * their weights fit. */
static ptrdiff_t
pack_whole_steps(const quantization *job, panel_rows rows, uint8_t *panel, bool *fit)
{
    const lbq_code *const code = job->code;
    const ptrdiff_t step = job->geometry.step, steps = job->cols / step;
    if (rows.count < LBQ_PANEL || !job->geometry.scale_stride || code->scale_bits != 16 ||
        code->levels || job->range->method != LBQ_RANGE_MINMAX)
        return 0;
    const lbq_cover cover = lbq_cover_of(code, job->range->clip);
    *fit = lbq_kernel.round_panel(job->W + rows.first * job->cols,
                                  job->cols,
                                  steps,
                                  step,
                                  largest_weight(code->scale_bits),
                                  &cover,
                                  code->count - 1,
                                  job->packed->bits,
                                  panel);
    return steps;
}

static lbq_status
pack_panel(void *context, ptrdiff_t panel, int worker)
{
    const quantization *const job = context;
    const lbq_packed_geometry *const to = &job->geometry;
    const panel_rows rows = rows_of(job, panel);
    uint8_t *const out = job->panels + panel * to->panel_bytes;
    float grid[2 * LBQ_PANEL];
    for (int l = 0; l < LBQ_PANEL; l++) {
        grid[l] = job->packed->gamma;
        grid[LBQ_PANEL + l] = -job->packed->zero * job->packed->gamma;
    }
    bool fit = !job->fixed;
    const ptrdiff_t done = pack_whole_steps(job, rows, out, &fit);
    if (!fit)
        LBQ_TRY(check_panel(job, rows));
    for (ptrdiff_t s = 0; s < to->steps; s++) {
        if (s < done && finished(job, s, out))
            continue;
        const ptrdiff_t begin = s * to->step, left = job->cols - begin;
        if (!job->fixed && (s == 0 || to->scale_stride)) {
            const ptrdiff_t width = lbq_smaller(job->group, left);
            LBQ_TRY(fit_rows(job, rows, begin, width, worker, grid, grid + LBQ_PANEL));
            LBQ_TRY(store_scales(job, rows, s, grid, out));
        }
        uint8_t codes[LBQ_MAX_STEP * LBQ_PANEL];
        encode_step(job, rows, begin, lbq_smaller(to->step, left), grid, codes);
        lbq_step_pack(job->packed->bits, codes, to->step, out + s * to->step_bytes);
    }
    return LBQ_OK;
}

lbq_status
lbq_code_check(const lbq_code *code)
{
    const int most = code->levels ? LBQ_MAX_LEVELS : 256;
    LBQ_REQUIRE(code->count >= 2 && code->count <= most,
                LBQ_BAD_VALUE,
                "count is %d, expected 2 to %d",
                code->count,
                most);
    LBQ_REQUIRE(code->scale_bits == 0 || code->scale_bits == 4 || code->scale_bits == 8 ||
                    code->scale_bits == 16,
                LBQ_BAD_VALUE,
                "scale_bits is %d, expected 16, 8, 4 or 0",
                code->scale_bits);
    for (int i = 1; code->levels && i < code->count; i++)
        LBQ_REQUIRE(code->levels[i - 1] <= code->levels[i],
                    LBQ_BAD_VALUE,
                    "levels[%d] is %g, expected ascending levels",
                    i,
                    code->levels[i]);
    return LBQ_OK;
}

/* Checks what is common, makes room, and runs the task for every panel. */
static lbq_status
over_panels(quantization *job, const float *importance, lbq_task task)
{
    LBQ_TRY(lbq_code_check(job->code));
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
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(
        &arena, lbq_padded(tile_bytes) + lbq_padded(wide_bytes) + lbq_padded(share_bytes)));
    job->tiles = lbq_arena_take(&arena, tile_bytes);
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
        status = lbq_parallel(lbq_pieces(rows, LBQ_PANEL), task, job);
    lbq_arena_close(&arena);
    return status;
}

lbq_status
lbq_quantize(const lbq_code *code, const lbq_range *range, ptrdiff_t rows, ptrdiff_t cols,
             ptrdiff_t group, bool fixed, const float *W, const float *importance, uint8_t *codes,
             float *scale, float *offset)
{
    quantization job = {
        .code = code,
        .range = range,
        .rows = rows,
        .cols = cols,
        .group = group,
        .fixed = fixed,
        .W = W,
        .codes = codes,
        .scale = scale,
        .offset = offset,
    };
    return over_panels(&job, importance, quantize_panel);
}

lbq_status
lbq_quantize_packed(const lbq_code *code, const lbq_range *range, const lbq_packed *packed,
                    const float *W, const float *importance, uint8_t *panels)
{
    assert(code->scale_bits == packed->scale_bits && code->symmetric == !packed->has_offset);
    LBQ_REQUIRE(code->count <= 1 << packed->bits,
                LBQ_BAD_VALUE,
                "%d levels need more than %d bits",
                code->count,
                packed->bits);
    quantization job = {
        .code = code,
        .range = range,
        .rows = packed->rows,
        .cols = packed->cols,
        .group = packed->group,
        .fixed = packed->scale_bits == 0,
        .W = W,
        .packed = packed,
        .panels = panels,
    };
    LBQ_TRY(lbq_packed_geometry_of(packed, &job.geometry));
    return over_panels(&job, importance, pack_panel);
}
