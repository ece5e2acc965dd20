/* Encoding and decoding by a scalar code, one number or a matrix at a time. */
#include "codes/code.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "core/threads.h"

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
    const double x = (w - offset) / scale;
    const int top = code->count - 1;
    if (!code->levels)
        return (uint8_t)(x > 0 ? x < top ? rint(x) : top : 0);
    int value = 0;
    for (; value < top; value++) {
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
    const float inverse = 1 / scale, top = (float)(code->count - 1);
    for (ptrdiff_t k = 0; k < count; k++) {
        float x = (w[k] - offset) * inverse;
        x = x > 0 ? x : 0;
        x = x < top ? x : top;
        codes[k] = (uint8_t)(int32_t)((x + 0x1.8p23f) - 0x1.8p23f); /* ties to even */
    }
}

typedef struct {
    const lbq_code *code;
    const lbq_range *range;
    ptrdiff_t rows, cols, group, groups;
    bool fixed;
    const float *W;
    const float *importance; /* (cols, LBQ_PANEL); together (cols) */
    float *tiles;            /* (threads, tile) */
    ptrdiff_t tile;
    bool together; /* the matrix is one row and one group */
    uint8_t *codes;
    float *scale, *offset;
} quantization;

static lbq_status
check_row(const quantization *job, ptrdiff_t row)
{
    const float *const W = job->W + row * job->cols;
    /* A group of +-largest has a scale of twice that if it is binary. */
    const float largest = job->code->scale_bits == 16 ? 65504.0f / 2 : 1e30f;
    bool fit = true;
    for (ptrdiff_t k = 0; k < job->cols; k++)
        fit &= fabsf(W[k]) <= largest;
    for (ptrdiff_t k = 0; k < job->cols && !fit; k++) {
        LBQ_REQUIRE(isfinite(W[k]),
                    LBQ_BAD_VALUE,
                    "weight[%td, %td] is %g, expected finite numbers",
                    row,
                    k,
                    (double)W[k]);
        LBQ_REQUIRE(fabsf(W[k]) <= largest,
                    LBQ_BAD_VALUE,
                    "weight[%td, %td] is %g, expected at most %g: its scale would not fit",
                    row,
                    k,
                    (double)W[k],
                    (double)largest);
    }
    return LBQ_OK;
}

/* Scales and offsets of one group of the `rows` rows from `row` on. */
static void
fit_panel(const quantization *job, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t begin, ptrdiff_t count,
          float *tile, float *scale, float *offset)
{
    lbq_groups groups = {.w = tile, .count = count};
    if (job->together) {
        groups = (lbq_groups){
            .w = tile,
            .importance = job->importance,
            .count = count / LBQ_PANEL,
            .together = true,
            .rest = (int)(count % LBQ_PANEL),
        };
        memset(tile + count / LBQ_PANEL * LBQ_PANEL, 0, LBQ_PANEL * sizeof *tile);
        memcpy(tile, job->W, (size_t)count * sizeof *tile);
    } else {
        groups.importance = job->importance ? job->importance + begin * LBQ_PANEL : NULL;
        if (rows < LBQ_PANEL)
            memset(tile, 0, (size_t)(count * LBQ_PANEL) * sizeof *tile);
        for (ptrdiff_t l = 0; l < rows; l++)
            for (ptrdiff_t k = 0; k < count; k++)
                tile[k * LBQ_PANEL + l] = job->W[(row + l) * job->cols + begin + k];
    }
    lbq_code_fit(job->code, job->range, &groups, scale, offset);
}

static lbq_status
quantize_panel(void *context, ptrdiff_t panel, int worker)
{
    const quantization *const job = context;
    const ptrdiff_t first = panel * LBQ_PANEL, left = job->rows - first;
    const ptrdiff_t rows = left < LBQ_PANEL ? left : LBQ_PANEL;
    for (ptrdiff_t l = 0; l < rows; l++)
        LBQ_TRY(check_row(job, first + l));
    for (ptrdiff_t g = 0; g < job->groups; g++) {
        const ptrdiff_t begin = g * job->group;
        const ptrdiff_t end = begin + job->group < job->cols ? begin + job->group : job->cols;
        float scale[LBQ_PANEL], offset[LBQ_PANEL];
        if (!job->fixed)
            fit_panel(job,
                      first,
                      rows,
                      begin,
                      end - begin,
                      job->tiles + worker * job->tile,
                      scale,
                      offset);
        for (ptrdiff_t l = 0; l < rows; l++) {
            const ptrdiff_t at = (first + l) * job->groups + g, from = (first + l) * job->cols;
            if (!job->fixed) {
                job->scale[at] = scale[l];
                job->offset[at] = offset[l];
            }
            encode_row(job->code,
                       end - begin,
                       job->W + from + begin,
                       job->scale[at],
                       job->offset[at],
                       job->codes + from + begin);
        }
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

lbq_status
lbq_quantize(const lbq_code *code, const lbq_range *range, ptrdiff_t rows, ptrdiff_t cols,
             ptrdiff_t group, bool fixed, const float *W, const float *importance, uint8_t *codes,
             float *scale, float *offset)
{
    LBQ_TRY(lbq_code_check(code));
    LBQ_REQUIRE(rows > 0 && cols > 0 && group > 0,
                LBQ_BAD_SHAPE,
                "%td rows, %td columns in groups of %td",
                rows,
                cols,
                group);
    float most = 0;
    for (ptrdiff_t k = 0; importance && k < cols; k++) {
        LBQ_REQUIRE(importance[k] >= 0 && isfinite(importance[k]),
                    LBQ_BAD_VALUE,
                    "importance[%td] is %g, expected finite numbers from 0",
                    k,
                    (double)importance[k]);
        most = importance[k] > most ? importance[k] : most;
    }
    quantization job = {
        .code = code,
        .range = range,
        .rows = rows,
        .cols = cols,
        .group = group,
        .groups = lbq_pieces(cols, group),
        .fixed = fixed,
        .W = W,
        .codes = codes,
        .scale = scale,
        .offset = offset,
    };
    job.together = rows == 1 && job.groups == 1;
    const ptrdiff_t width = group < cols ? group : cols;
    job.tile = job.together ? (cols / LBQ_PANEL + 1) * LBQ_PANEL : width * LBQ_PANEL;
    const ptrdiff_t wide = job.together ? job.tile : cols * LBQ_PANEL;
    const size_t tile_bytes = (size_t)(job.tile * lbq_threads()) * sizeof(float);
    const size_t wide_bytes = importance ? (size_t)wide * sizeof(float) : 0;
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded(tile_bytes) + lbq_padded(wide_bytes)));
    job.tiles = lbq_arena_take(&arena, tile_bytes);
    if (importance) {
        float *const shares = lbq_arena_take(&arena, wide_bytes);
        const ptrdiff_t copies = job.together ? 1 : LBQ_PANEL;
        for (ptrdiff_t i = 0; i < wide; i++)
            shares[i] = i < cols * copies && most > 0 ? importance[i / copies] / most : 0;
        job.importance = shares;
    }
    const lbq_status status = lbq_parallel(lbq_pieces(rows, LBQ_PANEL), quantize_panel, &job);
    lbq_arena_close(&arena);
    return status;
}
