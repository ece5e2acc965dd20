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

typedef struct {
    const lbq_code *code;
    const lbq_range *range;
    ptrdiff_t cols, group, groups;
    bool fixed;
    const float *W;
    const double *importance;
    double *rows; /* (threads, cols) */
    uint8_t *codes;
    float *scale, *offset;
} quantization;

static lbq_status
quantize_row(void *context, ptrdiff_t row, int worker)
{
    const quantization *const job = context;
    const lbq_code *const code = job->code;
    const float *const W = job->W + row * job->cols;
    double *const w = job->rows + worker * job->cols;
    /* A group of +-largest has a scale of twice that if it is binary. */
    const double largest = code->scale_bits == 16 ? 65504 / 2 : 1e30;
    for (ptrdiff_t k = 0; k < job->cols; k++) {
        LBQ_REQUIRE(isfinite(W[k]),
                    LBQ_BAD_VALUE,
                    "weight[%td, %td] is %g, expected finite numbers",
                    row,
                    k,
                    W[k]);
        LBQ_REQUIRE(fabsf(W[k]) <= largest,
                    LBQ_BAD_VALUE,
                    "weight[%td, %td] is %g, expected at most %g: its scale would not fit",
                    row,
                    k,
                    W[k],
                    largest);
        w[k] = W[k];
    }
    for (ptrdiff_t g = 0; g < job->groups; g++) {
        const ptrdiff_t begin = g * job->group;
        const ptrdiff_t end = begin + job->group < job->cols ? begin + job->group : job->cols;
        const double *const importance = job->importance ? job->importance + begin : NULL;
        const ptrdiff_t at = row * job->groups + g;
        double scale, offset;
        if (job->fixed) {
            scale = job->scale[at];
            offset = job->offset[at];
        } else {
            lbq_code_fit(code, job->range, end - begin, w + begin, importance, &scale, &offset);
            job->scale[at] = (float)scale;
            job->offset[at] = (float)offset;
        }
        for (ptrdiff_t k = begin; k < end; k++)
            job->codes[row * job->cols + k] = lbq_code_encode(code, w[k], scale, offset);
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
    for (ptrdiff_t k = 0; importance && k < cols; k++)
        LBQ_REQUIRE(importance[k] >= 0 && isfinite(importance[k]),
                    LBQ_BAD_VALUE,
                    "importance[%td] is %g, expected finite numbers from 0",
                    k,
                    importance[k]);
    const size_t row_bytes = lbq_padded((size_t)cols * sizeof(double));
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, row_bytes * ((size_t)lbq_threads() + (importance != NULL))));
    quantization job = {
        .code = code,
        .range = range,
        .cols = cols,
        .group = group,
        .groups = (cols + group - 1) / group,
        .fixed = fixed,
        .W = W,
        .rows = lbq_arena_take(&arena, row_bytes * (size_t)lbq_threads()),
        .codes = codes,
        .scale = scale,
        .offset = offset,
    };
    if (importance) {
        double *const wide = lbq_arena_take(&arena, row_bytes);
        for (ptrdiff_t k = 0; k < cols; k++)
            wide[k] = importance[k];
        job.importance = wide;
    }
    const lbq_status status = lbq_parallel(rows, quantize_row, &job);
    lbq_arena_close(&arena);
    return status;
}
