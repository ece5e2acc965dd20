/* Packing and unpacking, strip by strip, four codes of a row at a time.
 *
 * The four bytes of a 32-bit lane never exchange bits, so four consecutive codes are shifted and
 * combined as one word, on machines of either byte order. */
#include "core/packed.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "core/half.h"
#include "core/pack.h"
#include "core/ring.h"
#include "core/threads.h"

enum { WORKSET = 1 << 16 /* weights per task: some 20 us */ };

lbq_status
lbq_packed_geometry_of(const lbq_packed *packed, lbq_packed_geometry *geometry)
{
    const ptrdiff_t rows = packed->rows, cols = packed->cols, group = packed->group;
    const int bits = packed->bits, scale_bits = packed->scale_bits;
    LBQ_REQUIRE(rows >= 1 && rows <= INT32_MAX && cols >= 1 && cols <= INT32_MAX,
                LBQ_BAD_SHAPE,
                "a matrix of %td x %td cannot be packed, expected sizes of 1 to 2^31 - 1",
                rows,
                cols);
    LBQ_REQUIRE((bits >= 1 && bits <= 4) || bits == 8,
                LBQ_BAD_VALUE,
                "bits is %d, expected 1, 2, 3, 4 or 8",
                bits);
    LBQ_REQUIRE(scale_bits == 0 || scale_bits == 4 || scale_bits == 8 || scale_bits == 16,
                LBQ_BAD_VALUE,
                "scale_bits is %d, expected 0, 4, 8 or 16",
                scale_bits);
    LBQ_REQUIRE(group >= cols || group == 16 || group == 32 || group == 64 || group == 128,
                LBQ_BAD_VALUE,
                "group is %td, expected 16, 32, 64, 128 or at least the %td columns",
                group,
                cols);
    LBQ_REQUIRE(group >= cols || scale_bits != 0,
                LBQ_BAD_VALUE,
                "groups of %td columns need stored scales, but scale_bits is 0",
                group);
    LBQ_REQUIRE(group >= cols || group % lbq_packed_multiple(packed) == 0,
                LBQ_BAD_VALUE,
                "codes of %g bits need groups of a multiple of %td columns, got %td",
                (double)bits / packed->word_cols,
                lbq_packed_multiple(packed),
                group);
    LBQ_REQUIRE(!packed->has_offset || scale_bits == 16,
                LBQ_BAD_VALUE,
                "offsets need scale_bits = 16, got %d",
                scale_bits);
    LBQ_REQUIRE(isfinite(packed->unit) && isfinite(packed->zero),
                LBQ_BAD_VALUE,
                "unit is %g and zero is %g, expected finite numbers",
                (double)packed->unit,
                (double)packed->zero);
    assert(packed->block_rows == 1 || packed->block_rows == LBQ_STRIP);
    assert(packed->block_rows == LBQ_STRIP ? bits <= 4 : packed->word_cols == 1);
    assert(16 % packed->block_cols == 0 && packed->block_cols % packed->word_cols == 0);

    const bool per_step = group < cols;
    lbq_packed_geometry g = {.step = lbq_packed_step(packed)};
    g.steps = lbq_pieces(cols, g.step);
    g.strip = lbq_pieces(packed->block_rows, LBQ_PANEL);
    g.panels = lbq_pieces(rows, LBQ_PANEL * g.strip) * g.strip;
    g.code_bytes = g.step / packed->word_cols * bits * LBQ_PANEL / 8;
    const ptrdiff_t scale_bytes = scale_bits * LBQ_PANEL / 8;
    const ptrdiff_t offset_bytes = packed->has_offset ? LBQ_PANEL * 2 : 0;
    g.step_bytes = g.code_bytes + (per_step ? scale_bytes + offset_bytes : 0);
    g.scale_at = per_step ? g.code_bytes : g.steps * g.step_bytes;
    g.scale_stride = per_step ? g.step_bytes : 0;
    g.panel_bytes = g.steps * g.step_bytes + (per_step ? 0 : scale_bytes + offset_bytes);
    g.bytes = g.panels * g.panel_bytes;
    *geometry = g;
    return LBQ_OK;
}

lbq_panel
lbq_packed_panel(const lbq_packed *packed, const lbq_packed_geometry *geometry, ptrdiff_t panel)
{
    const uint8_t *const at = packed->panels + panel * geometry->panel_bytes;
    return (lbq_panel){
        .codes = at,
        .scale = at + geometry->scale_at,
        .step = geometry->step,
        .steps = geometry->steps,
        .step_bytes = geometry->step_bytes,
        .scale_stride = geometry->scale_stride,
        .scale_bits = packed->scale_bits,
        .has_offset = packed->has_offset,
        .unit = packed->unit,
        .zero = packed->zero,
        .panel_bytes = geometry->panel_bytes,
    };
}

static float
half_at(const uint8_t *bytes, int index)
{
    uint16_t half;
    memcpy(&half, bytes + 2 * index, sizeof half);
    return lbq_half_widen(half);
}

static float
scale_of(const lbq_panel *panel, ptrdiff_t step, int row)
{
    const uint8_t *const at = panel->scale + step * panel->scale_stride;
    switch (panel->scale_bits) {
    case 16:
        return half_at(at, row);
    case 8:
        return panel->unit * (float)at[row];
    case 4:
        return panel->unit * (float)(at[row / 2] >> row % 2 * 4 & 15);
    default:
        return panel->unit;
    }
}

static float
offset_of(const lbq_panel *panel, ptrdiff_t step, int row)
{
    if (panel->has_offset)
        return half_at(panel->scale + step * panel->scale_stride, LBQ_PANEL + row);
    return -panel->zero * scale_of(panel, step, row);
}

void
lbq_panel_scale(const lbq_panel *panel, ptrdiff_t step, float scale[LBQ_PANEL])
{
    for (int r = 0; r < LBQ_PANEL; r++)
        scale[r] = scale_of(panel, step, r);
}

void
lbq_panel_offset(const lbq_panel *panel, ptrdiff_t step, float offset[LBQ_PANEL])
{
    for (int r = 0; r < LBQ_PANEL; r++)
        offset[r] = offset_of(panel, step, r);
}

/* A row's word in a block: four adjacent bytes, or bytes 16 apart if `spread`. */
static inline uint32_t
load_lane(const uint8_t *block, int row, bool spread)
{
    if (!spread)
        return lbq_load_word(block + 4 * row);
    block += row;
    const uint8_t bytes[] = {
        block[0], block[LBQ_PANEL], block[2 * LBQ_PANEL], block[3 * LBQ_PANEL]};
    return lbq_load_word(bytes);
}

/* Adds the codes of a row's lanes, shifted left by `shift`, to words `stride` bytes apart. */
static inline void
unpack_lanes(int bits, const uint8_t *blocks, int shift, ptrdiff_t columns, int row, bool spread,
             uint8_t *out, ptrdiff_t stride)
{
    const int planes = 8 / bits;
    for (ptrdiff_t b = 0; b < columns / (4 * planes); b++) {
        const uint32_t lane = load_lane(blocks + b * LBQ_BLOCK, row, spread);
        for (int p = 0; p < planes; p++) {
            uint8_t *const to = out + (b * planes + p) * stride;
            const uint32_t before = shift ? lbq_load_word(to) : 0;
            lbq_store_word(to, before | (lane >> p * bits & lbq_low_bits(bits)) << shift);
        }
    }
}

static void
unpack_row(int bits, const uint8_t *blocks, ptrdiff_t columns, int row, uint8_t *out,
           ptrdiff_t stride)
{
    if (bits != 3) {
        unpack_lanes(bits, blocks, 0, columns, row, bits == 1, out, stride);
        return;
    }
    for (ptrdiff_t k = 0; k < columns; k += 32, blocks += 3 * LBQ_BLOCK) {
        unpack_lanes(2, blocks, 0, 32, row, false, out + k / 4 * stride, stride);
        unpack_lanes(1, blocks + 2 * LBQ_BLOCK, 2, 32, row, false, out + k / 4 * stride, stride);
    }
}

void
lbq_step_unpack(int bits, const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    for (int r = 0; r < LBQ_PANEL; r++)
        unpack_row(bits, codes, columns, r, out + 4 * r, 4 * LBQ_PANEL);
}

void
lbq_strip_pack(const lbq_packed *packed, const lbq_packed_geometry *geometry, const uint8_t *words,
               uint8_t *codes)
{
    if (geometry->strip > 1)
        lbq_ring_pack(
            packed->bits, geometry->step, packed->word_cols, words, geometry->panel_bytes, codes);
    else
        lbq_step_pack(packed->bits, words, geometry->step, codes);
}

void
lbq_strip_unpack(const lbq_packed *packed, const lbq_packed_geometry *geometry,
                 const uint8_t *codes, uint8_t *words)
{
    lbq_ring_unpack(
        packed->bits, geometry->step, packed->word_cols, codes, geometry->panel_bytes, words);
}

/* One call's work, cut into runs of strips. */
typedef struct {
    const lbq_packed *packed;
    lbq_packed_geometry geometry;
    ptrdiff_t groups, strips_per_task;
    const uint8_t *codes_in;
    const float *scale_in, *offset_in;
    uint8_t *panels_out;
    uint8_t *codes_out;
    float *scale_out, *offset_out;
} strip_work;

typedef lbq_status (*strip_function)(const strip_work *work, ptrdiff_t strip);

typedef struct {
    const strip_work *work;
    strip_function function;
} strip_run;

static ptrdiff_t
strips_of(const strip_work *work)
{
    return work->geometry.panels / work->geometry.strip;
}

static lbq_status
strip_run_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const strip_run *const run = context;
    const ptrdiff_t begin = index * run->work->strips_per_task;
    for (ptrdiff_t i = begin; i < begin + run->work->strips_per_task; i++)
        if (i < strips_of(run->work))
            LBQ_TRY(run->function(run->work, i));
    return LBQ_OK;
}

static lbq_status
over_strips(strip_work *work, strip_function function)
{
    LBQ_TRY(lbq_packed_geometry_of(work->packed, &work->geometry));
    const ptrdiff_t cols = work->packed->cols;
    work->groups = work->geometry.scale_stride ? work->geometry.steps : 1;
    work->strips_per_task = WORKSET / (work->geometry.strip * LBQ_PANEL) / cols + 1;
    strip_run run = {work, function};
    const ptrdiff_t tasks = lbq_pieces(strips_of(work), work->strips_per_task);
    return lbq_parallel(tasks, strip_run_task, &run);
}

static lbq_status
pack_half(float value, const char *name, ptrdiff_t row, ptrdiff_t group, uint8_t *to)
{
    const uint16_t half = lbq_half_narrow(value);
    LBQ_REQUIRE(isfinite(value) && lbq_half_widen(half) == value,
                LBQ_BAD_VALUE,
                "%s of row %td, group %td is %.9g, which is not a float16",
                name,
                row,
                group,
                (double)value);
    memcpy(to, &half, sizeof half);
    return LBQ_OK;
}

static lbq_status
pack_multiple(const lbq_packed *packed, float value, ptrdiff_t row, ptrdiff_t group, uint8_t *to)
{
    const int r = (int)(row % LBQ_PANEL), largest = (1 << packed->scale_bits) - 1;
    const float multiple = packed->unit != 0 ? rintf(value / packed->unit) : 0;
    LBQ_REQUIRE(multiple >= 0 && multiple <= (float)largest && packed->unit * multiple == value,
                LBQ_BAD_VALUE,
                "scale of row %td, group %td is %.9g, not 0 to %d times unit = %.9g",
                row,
                group,
                (double)value,
                largest,
                (double)packed->unit);
    if (packed->scale_bits == 8)
        to[r] = (uint8_t)multiple;
    else
        to[r / 2] |= (uint8_t)((int)multiple << r % 2 * 4);
    return LBQ_OK;
}

lbq_status
lbq_scale_pack(const lbq_packed *packed, ptrdiff_t row, ptrdiff_t group, float scale, float offset,
               uint8_t *to)
{
    uint8_t *const half = to + row % LBQ_PANEL * 2;
    if (packed->scale_bits == 16)
        LBQ_TRY(pack_half(scale, "scale", row, group, half));
    else if (packed->scale_bits)
        LBQ_TRY(pack_multiple(packed, scale, row, group, to));
    if (packed->has_offset)
        LBQ_TRY(pack_half(offset, "offset", row, group, half + 2 * LBQ_PANEL));
    return LBQ_OK;
}

static int
largest_code(const lbq_packed *packed, ptrdiff_t column)
{
    return column % packed->word_cols ? 0 : (1 << packed->bits) - 1;
}

static lbq_status
refuse_code(const lbq_packed *packed, const uint8_t *codes, ptrdiff_t row, ptrdiff_t begin)
{
    ptrdiff_t k = 0;
    while (codes[k] <= largest_code(packed, k))
        k++;
    return lbq_fail(LBQ_BAD_VALUE,
                    "code of row %td, column %td is %d, expected at most %d",
                    row,
                    begin + k,
                    codes[k],
                    largest_code(packed, k));
}

/* Loads the words of a panel's step, laid out as by lbq_step_unpack. */
static lbq_status
load_words(const strip_work *work, ptrdiff_t panel, ptrdiff_t step, uint8_t *words)
{
    const lbq_packed *const packed = work->packed;
    const lbq_packed_geometry *const g = &work->geometry;
    const ptrdiff_t first = panel * LBQ_PANEL, cols = lbq_packed_code_cols(packed);
    const ptrdiff_t rows = lbq_smaller(LBQ_PANEL, lbq_packed_code_rows(packed) - first);
    const ptrdiff_t begin = step * g->step, count = lbq_smaller(g->step, cols - begin);
    uint8_t largest[4];
    for (int k = 0; k < 4; k++)
        largest[k] = (uint8_t)largest_code(packed, k);
    memset(words, 0, (size_t)(g->step * LBQ_PANEL));
    for (ptrdiff_t r = 0; r < rows; r++) {
        uint8_t codes[LBQ_MAX_STEP] = {0};
        memcpy(codes, work->codes_in + (first + r) * cols + begin, (size_t)count);
        uint32_t seen = 0;
        for (ptrdiff_t k = 0; k < g->step; k += 4) {
            const uint32_t word = lbq_load_word(codes + k);
            seen |= word;
            lbq_store_word(words + k * LBQ_PANEL + 4 * r, word);
        }
        if (seen & ~lbq_load_word(largest))
            return refuse_code(packed, codes, first + r, begin);
    }
    return LBQ_OK;
}

static lbq_status
pack_strip(const strip_work *work, ptrdiff_t strip)
{
    const lbq_packed *const packed = work->packed;
    const lbq_packed_geometry *const g = &work->geometry;
    uint8_t *const out = work->panels_out + strip * g->strip * g->panel_bytes;
    memset(out, 0, (size_t)(g->strip * g->panel_bytes));
    for (ptrdiff_t s = 0; s < g->steps; s++) {
        uint8_t words[LBQ_MAX_STEP * LBQ_STRIP];
        for (ptrdiff_t p = 0; p < g->strip; p++)
            LBQ_TRY(load_words(work, strip * g->strip + p, s, words + p * g->step * LBQ_PANEL));
        lbq_strip_pack(packed, g, words, out + s * g->step_bytes);
    }
    const ptrdiff_t first = strip * g->strip * LBQ_PANEL;
    const ptrdiff_t rows = lbq_smaller(g->strip * LBQ_PANEL, packed->rows - first);
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t i = 0; i < work->groups; i++) {
            const ptrdiff_t at = (first + r) * work->groups + i;
            uint8_t *const panel = out + r / LBQ_PANEL * g->panel_bytes;
            LBQ_TRY(lbq_scale_pack(packed,
                                   first + r,
                                   i,
                                   packed->scale_bits ? work->scale_in[at] : 0,
                                   packed->has_offset ? work->offset_in[at] : 0,
                                   panel + g->scale_at + i * g->scale_stride));
        }
    return LBQ_OK;
}

/* Stores the codes of one step of a strip. */
static void
store_codes(const strip_work *work, ptrdiff_t strip, ptrdiff_t step)
{
    const lbq_packed *const packed = work->packed;
    const lbq_packed_geometry *const g = &work->geometry;
    const lbq_panel view = lbq_packed_panel(packed, g, strip * g->strip);
    const uint8_t *const at = view.codes + step * g->step_bytes;
    const ptrdiff_t first = strip * g->strip * LBQ_PANEL, cols = lbq_packed_code_cols(packed);
    const ptrdiff_t rows = lbq_smaller(g->strip * LBQ_PANEL, lbq_packed_code_rows(packed) - first);
    const ptrdiff_t begin = step * g->step, count = lbq_smaller(g->step, cols - begin);
    uint8_t words[LBQ_MAX_STEP * LBQ_STRIP];
    if (g->strip > 1)
        lbq_strip_unpack(packed, g, at, words);
    else
        lbq_step_unpack(packed->bits, at, g->step, words);
    for (ptrdiff_t r = 0; r < rows; r++) {
        const uint8_t *const from = words + r / LBQ_PANEL * g->step * LBQ_PANEL;
        uint8_t *const to = work->codes_out + (first + r) * cols + begin;
        for (ptrdiff_t k = 0; k < count; k++)
            to[k] = from[lbq_word_at(k, r % LBQ_PANEL)];
    }
}

static lbq_status
unpack_strip(const strip_work *work, ptrdiff_t strip)
{
    const lbq_packed *const packed = work->packed;
    const lbq_packed_geometry *const g = &work->geometry;
    for (ptrdiff_t p = strip * g->strip; p < (strip + 1) * g->strip; p++) {
        const lbq_panel view = lbq_packed_panel(packed, g, p);
        const ptrdiff_t first = p * LBQ_PANEL, rows = lbq_smaller(LBQ_PANEL, packed->rows - first);
        for (ptrdiff_t i = 0; i < work->groups; i++) {
            float scale[LBQ_PANEL], offset[LBQ_PANEL];
            lbq_panel_scale(&view, i, scale);
            lbq_panel_offset(&view, i, offset);
            for (ptrdiff_t r = 0; r < rows; r++) {
                if (work->scale_out)
                    work->scale_out[(first + r) * work->groups + i] = scale[r];
                if (work->offset_out)
                    work->offset_out[(first + r) * work->groups + i] = offset[r];
            }
        }
    }
    for (ptrdiff_t s = 0; work->codes_out && s < g->steps; s++)
        store_codes(work, strip, s);
    return LBQ_OK;
}

lbq_status
lbq_pack(const lbq_packed *packed, const uint8_t *codes, const float *scale, const float *offset,
         uint8_t *panels)
{
    strip_work work = {
        .packed = packed,
        .codes_in = codes,
        .scale_in = scale,
        .offset_in = offset,
        .panels_out = panels,
    };
    return over_strips(&work, pack_strip);
}

lbq_status
lbq_unpack(const lbq_packed *packed, uint8_t *codes, float *scale, float *offset)
{
    strip_work work = {
        .packed = packed, .codes_out = codes, .scale_out = scale, .offset_out = offset};
    return over_strips(&work, unpack_strip);
}
