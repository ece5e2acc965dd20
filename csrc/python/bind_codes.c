/* Bindings of csrc/codes. */
#include <string.h>

#include "codes/code.h"
#include "python/code_args.h"
#include "python/module.h"

LBQ_BINDING(quantize)
{
    lbq_array W;
    lbq_code_args to;
    const lbq_arg spec[] = {
        LBQ_IN("weight", &W, NPY_FLOAT32, "rk"),
        LBQ_CODE_ARGS(to),
    };
    LBQ_PARSE("quantize", spec);
    lbq_code code;
    lbq_range range;
    const lbq_status status = lbq_code_from_args(&to, W.dims[1], &code, &range);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    LBQ_RUN(lbq_quantize(&code,
                         &range,
                         W.dims[0],
                         W.dims[1],
                         to.group,
                         to.fixed,
                         W.data,
                         to.importance.data,
                         to.codes.data,
                         to.scale.data,
                         to.offset.data));
}

static lbq_status
quantize_packed(const lbq_range_args *found, Py_ssize_t count, lbq_packed *packed,
                const lbq_array *W, const lbq_array *importance, const lbq_array *levels,
                const lbq_array *panels)
{
    const lbq_code code = {
        .count = (int)count,
        .symmetric = !packed->has_offset,
        .zero = packed->zero,
        .levels = levels->data,
        .scale_bits = packed->scale_bits,
        .gamma = packed->gamma,
    };
    lbq_range range;
    LBQ_TRY(lbq_range_from_args(found, &range));
    LBQ_TRY(lbq_check_levels(levels, count));
    LBQ_TRY(lbq_check_fit(levels, packed->has_offset, packed->scale_bits == 0));
    LBQ_TRY(lbq_check_axis(W, "weight", 0, "rows", packed->rows));
    LBQ_TRY(lbq_check_axis(W, "weight", 1, "cols", packed->cols));
    LBQ_TRY(lbq_packed_attach(packed, panels));
    return lbq_quantize_packed(&code, &range, packed, W->data, importance->data, panels->data);
}

LBQ_BINDING(quantize_packed)
{
    lbq_array W, importance, levels, panels;
    Py_ssize_t count;
    lbq_range_args range;
    lbq_packed_args to;
    const lbq_arg spec[] = {
        LBQ_IN("weight", &W, NPY_FLOAT32, "rk"),
        LBQ_IN_OR_NONE("importance", &importance, NPY_FLOAT32, "k"),
        LBQ_IN_OR_NONE("levels", &levels, NPY_FLOAT32, "l"),
        LBQ_OUT("panels", &panels, NPY_UINT8, "b"),
        LBQ_INT("count", &count, 2, 256),
        LBQ_RANGE_ARGS(range),
        LBQ_PACKED_ARGS(to),
    };
    LBQ_PARSE("quantize_packed", spec);
    lbq_packed packed = lbq_packed_from_args(&to);
    LBQ_RUN(quantize_packed(&range, count, &packed, &W, &importance, &levels, &panels));
}

LBQ_BINDING(kmeans)
{
    lbq_array values, weights, levels;
    const lbq_arg spec[] = {
        LBQ_IN("values", &values, NPY_FLOAT64, "n*"),
        LBQ_IN_OR_NONE("weights", &weights, NPY_FLOAT64, "n*"),
        LBQ_OUT("levels", &levels, NPY_FLOAT64, "l"),
    };
    LBQ_PARSE("kmeans", spec);
    LBQ_RUN(
        lbq_kmeans(values.dims[0], values.data, weights.data, (int)levels.dims[0], levels.data));
}

static lbq_status
fill_levels(const char *kind, int count, float *levels)
{
    const int nf4 = strcmp(kind, "nf") == 0 && count == 16;
    LBQ_REQUIRE(nf4 || (strcmp(kind, "log") == 0 && count >= 2 && count <= LBQ_MAX_LEVELS),
                LBQ_BAD_VALUE,
                "no table of %d levels is called '%s'",
                count,
                kind);
    if (nf4)
        lbq_levels_nf4(levels);
    else
        lbq_levels_log(count, levels);
    return LBQ_OK;
}

LBQ_BINDING(fixed_levels)
{
    lbq_array levels;
    const char *kind;
    const lbq_arg spec[] = {
        LBQ_OUT("levels", &levels, NPY_FLOAT32, "l"),
        LBQ_TEXT("kind", &kind),
    };
    LBQ_PARSE("fixed_levels", spec);
    LBQ_RUN(fill_levels(kind, (int)levels.dims[0], levels.data));
}

static lbq_status
entropy_range(const double *counts, int bins, int levels, int64_t *kept)
{
    int found = bins;
    const lbq_status status = lbq_entropy_range(counts, bins, levels, &found);
    *kept = found;
    return status;
}

LBQ_BINDING(entropy_range)
{
    lbq_array counts, kept;
    Py_ssize_t levels;
    const lbq_arg spec[] = {
        LBQ_IN("counts", &counts, NPY_FLOAT64, "b"),
        LBQ_OUT("kept", &kept, NPY_INT64, "1"),
        LBQ_INT("levels", &levels, 1, 1 << 20),
    };
    LBQ_PARSE("entropy_range", spec);
    if (counts.dims[0] > 1 << 20)
        return lbq_result(module,
                          lbq_fail(LBQ_BAD_SHAPE, "%td bins, at most 2^20", counts.dims[0]));
    LBQ_RUN(entropy_range(counts.data, (int)counts.dims[0], (int)levels, kept.data));
}

/* clang-format off */
PyMethodDef lbq_methods_codes[] = {
    LBQ_METHOD(quantize,
               "quantize(weight, importance, levels, codes, scale, offset, /, *, count, symmetric, "
               "zero, scale_bits, gamma, group, fixed, method, clip, percentile, candidates, "
               "shrink, norm)\n--\n\n"
               "Round weight (r, k) to codes (r, k) group by group, fitting scale and offset "
               "(r, g) by method 'minmax', 'percentile' or 'mse', or with those given.")
    LBQ_METHOD(quantize_packed,
               "quantize_packed(weight, importance, levels, panels, /, *, count, method, clip, "
               "percentile, candidates, shrink, norm, " LBQ_PACKED_TEXT ")\n--\n\n"
               "Round weight (r, k) into panels (b) that hold what quantize and pack would give.")
    LBQ_METHOD(kmeans,
               "kmeans(values, weights, levels, /)\n--\n\n"
               "Fill levels (l) with the ascending numbers next to which values (n) lie.")
    LBQ_METHOD(fixed_levels,
               "fixed_levels(levels, /, *, kind)\n--\n\n"
               "Fill levels (l) with the table 'nf' (16 levels) or 'log'.")
    LBQ_METHOD(entropy_range,
               "entropy_range(counts, kept, /, *, levels)\n--\n\n"
               "Set kept (1) to how many bins of a histogram (b) of |x| to cover by equal levels.")
    LBQ_METHODS_END,
};
/* clang-format on */
