/* Bindings of csrc/codes, and of the packed layout. */
#include <float.h>
#include <string.h>

#include "codes/importance.h"
#include "codes/quantize.h"
#include "core/memory.h"
#include "python/code_args.h"
#include "python/module.h"

LBQ_BINDING(code)
{
    lbq_array levels;
    const char *name;
    int symmetric;
    Py_ssize_t scale_bits;
    double unit, zero;
    const lbq_arg spec[] = {
        LBQ_IN_OR_NONE("levels", &levels, NPY_FLOAT32, "l"),
        LBQ_TEXT("name", &name),
        LBQ_BOOL("symmetric", &symmetric),
        LBQ_INT("scale_bits", &scale_bits, 0, 16),
        LBQ_FLOAT("unit", &unit, -FLT_MAX, FLT_MAX),
        LBQ_FLOAT("zero", &zero, -FLT_MAX, FLT_MAX),
    };
    LBQ_PARSE("code", spec);
    lbq_code code, *block = NULL;
    lbq_status status = lbq_code_find(name, &code);
    if (status == LBQ_OK)
        status = lbq_code_set(&code,
                              levels.data,
                              levels.dims[0],
                              symmetric,
                              (float)zero,
                              (int)scale_bits,
                              (float)unit);
    if (status == LBQ_OK)
        status = lbq_allocate(sizeof *block, &block);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    *block = code;
    return lbq_handle_new("lowbitq.code", block, args);
}

LBQ_BINDING(codes)
{
    static const char *const tables[] = {"none", "fixed", "learned"};
    (void)module;
    if (lbq_parse("codes", NULL, 0, args, kwargs) < 0)
        return NULL;
    PyObject *const all = PyDict_New();
    char name[LBQ_NAME];
    for (int i = 0; all && lbq_code_name(i, name); i++) {
        lbq_code code;
        if (lbq_code_find(name, &code) != LBQ_OK)
            break;
        const lbq_code_kind *const kind = code.kind;
        const lbq_packed layout = lbq_code_layout(&code, 1, 1, 1);
        PyObject *const one = Py_BuildValue("{s:s,s:i,s:i,s:d,s:i,s:i,s:i,s:i,s:N,s:N,s:s}",
                                            "kind",
                                            kind->name,
                                            "bits",
                                            code.bits,
                                            "level_count",
                                            lbq_level_count(&code),
                                            "zero",
                                            (double)lbq_code_zero(&code),
                                            "rows",
                                            kind->rows,
                                            "cols",
                                            kind->cols,
                                            "word_cols",
                                            layout.word_cols,
                                            "multiple",
                                            (int)lbq_packed_multiple(&layout),
                                            "ordered",
                                            PyBool_FromLong(kind->ordered),
                                            "offsets",
                                            PyBool_FromLong(kind->offsets),
                                            "table",
                                            tables[kind->table]);
        const int failed = !one || PyDict_SetItemString(all, name, one) < 0;
        Py_XDECREF(one);
        if (failed) {
            Py_DECREF(all);
            return NULL;
        }
    }
    return all;
}

static lbq_status
check_weight(int scale_bits, const lbq_array *W, const lbq_array *importance)
{
    LBQ_TRY(lbq_check_weights(scale_bits, W->dims[0], W->dims[1], W->data));
    return importance->data ? lbq_check_importance(W->dims[1], importance->data) : LBQ_OK;
}

LBQ_BINDING(check_weight)
{
    lbq_array W, importance;
    Py_ssize_t scale_bits;
    const lbq_arg spec[] = {
        LBQ_IN("weight", &W, NPY_FLOAT32, "rk"),
        LBQ_IN_OR_NONE("importance", &importance, NPY_FLOAT32, "k"),
        LBQ_INT("scale_bits", &scale_bits, 0, 16),
    };
    LBQ_PARSE("check_weight", spec);
    LBQ_RUN(check_weight((int)scale_bits, &W, &importance));
}

static lbq_status
quantize(const lbq_code *code, const lbq_search_args *found, const lbq_array *W,
         const lbq_array *importance, ptrdiff_t group, bool fixed, const lbq_array *codes,
         const lbq_array *scale, const lbq_array *offset)
{
    lbq_search search;
    const ptrdiff_t rows = W->dims[0], cols = W->dims[1];
    const lbq_packed layout = lbq_code_layout(code, rows, cols, group);
    LBQ_TRY(lbq_search_from_args(found, &search));
    LBQ_TRY(lbq_check_parts(&layout, codes, scale, offset));
    return lbq_quantize(code,
                        &search,
                        rows,
                        cols,
                        group,
                        fixed,
                        W->data,
                        importance->data,
                        codes->data,
                        scale->data,
                        offset->data);
}

LBQ_BINDING(quantize)
{
    const lbq_code *code;
    lbq_array W, importance, codes, scale, offset;
    lbq_search_args search;
    Py_ssize_t group;
    int fixed;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("weight", &W, NPY_FLOAT32, "rk"),
        LBQ_IN_OR_NONE("importance", &importance, NPY_FLOAT32, "k"),
        LBQ_OUT_OR_NONE("codes", &codes, NPY_UINT8, "RK"),
        LBQ_INOUT("scale", &scale, NPY_FLOAT32, "rg"),
        LBQ_INOUT("offset", &offset, NPY_FLOAT32, "rg"),
        LBQ_GROUP(&group),
        LBQ_BOOL("fixed", &fixed),
        LBQ_SEARCH_ARGS(search),
    };
    LBQ_PARSE("quantize", spec);
    LBQ_RUN(quantize(code, &search, &W, &importance, group, fixed, &codes, &scale, &offset));
}

static lbq_status
quantize_packed(const lbq_code *code, const lbq_search_args *found, ptrdiff_t group,
                const lbq_array *W, const lbq_array *importance, const lbq_array *panels)
{
    lbq_search search;
    lbq_matrix matrix;
    LBQ_TRY(lbq_search_from_args(found, &search));
    LBQ_TRY(lbq_matrix_of(code, W->dims[0], W->dims[1], group, panels, &matrix));
    return lbq_quantize_packed(
        code, &search, &matrix.packed, W->data, importance->data, panels->data);
}

LBQ_BINDING(quantize_packed)
{
    const lbq_code *code;
    lbq_array W, importance, panels;
    lbq_search_args search;
    Py_ssize_t group;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("weight", &W, NPY_FLOAT32, "rk"),
        LBQ_IN_OR_NONE("importance", &importance, NPY_FLOAT32, "k"),
        LBQ_OUT("panels", &panels, NPY_UINT8, "b"),
        LBQ_GROUP(&group),
        LBQ_SEARCH_ARGS(search),
    };
    LBQ_PARSE("quantize_packed", spec);
    LBQ_RUN(quantize_packed(code, &search, group, &W, &importance, &panels));
}

LBQ_BINDING(packed_bytes)
{
    const char *name;
    Py_ssize_t rows, cols, group, scale_bits;
    int symmetric;
    const lbq_arg spec[] = {
        LBQ_TEXT("code", &name),
        LBQ_INT("rows", &rows, 1, INT32_MAX),
        LBQ_INT("cols", &cols, 1, INT32_MAX),
        LBQ_GROUP(&group),
        LBQ_INT("scale_bits", &scale_bits, 0, 16),
        LBQ_BOOL("symmetric", &symmetric),
    };
    LBQ_PARSE("packed_bytes", spec);
    lbq_code code;
    lbq_packed_geometry geometry;
    lbq_status status = lbq_code_find(name, &code);
    if (status == LBQ_OK) {
        lbq_packed layout = lbq_code_layout(&code, rows, cols, group);
        layout.scale_bits = (int)scale_bits;
        layout.has_offset = !symmetric && scale_bits == 16;
        status = lbq_packed_geometry_of(&layout, &geometry);
    }
    return status == LBQ_OK ? PyLong_FromSsize_t(geometry.bytes) : lbq_result(module, status);
}

static lbq_status
pack(const lbq_matrix *matrix, const lbq_array *codes, const lbq_array *scale,
     const lbq_array *offset, const lbq_array *panels)
{
    const lbq_packed *const packed = &matrix->packed;
    LBQ_TRY(lbq_check_parts(packed, codes, scale, offset));
    LBQ_REQUIRE(scale->data || packed->scale_bits == 0,
                LBQ_BAD_VALUE,
                "scale is None, but scale_bits is %d",
                packed->scale_bits);
    LBQ_REQUIRE(offset->data || !packed->has_offset,
                LBQ_BAD_VALUE,
                "offset is None, but the code stores offsets");
    return lbq_pack(packed, codes->data, scale->data, offset->data, panels->data);
}

/* Sizes of a packed matrix. */
#define LAYOUT_ARGS                                                                                \
    LBQ_INT("rows", &rows, 1, INT32_MAX), LBQ_INT("cols", &cols, 1, INT32_MAX), LBQ_GROUP(&group)

LBQ_BINDING(pack)
{
    const lbq_code *code;
    lbq_array codes, scale, offset, panels;
    Py_ssize_t rows, cols, group;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("codes", &codes, NPY_UINT8, "RK"),
        LBQ_IN_OR_NONE("scale", &scale, NPY_FLOAT32, "rg"),
        LBQ_IN_OR_NONE("offset", &offset, NPY_FLOAT32, "rg"),
        LBQ_OUT("panels", &panels, NPY_UINT8, "b"),
        LAYOUT_ARGS,
    };
    LBQ_PARSE("pack", spec);
    lbq_matrix matrix;
    const lbq_status status = lbq_matrix_of(code, rows, cols, group, &panels, &matrix);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    LBQ_RUN(pack(&matrix, &codes, &scale, &offset, &panels));
}

static lbq_status
unpack(const lbq_packed *packed, const lbq_array *codes, const lbq_array *scale,
       const lbq_array *offset)
{
    LBQ_TRY(lbq_check_parts(packed, codes, scale, offset));
    return lbq_unpack(packed, codes->data, scale->data, offset->data);
}

LBQ_BINDING(unpack)
{
    const lbq_code *code;
    lbq_array panels, codes, scale, offset;
    Py_ssize_t rows, cols, group;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("panels", &panels, NPY_UINT8, "b"),
        LBQ_OUT_OR_NONE("codes", &codes, NPY_UINT8, "RK"),
        LBQ_OUT_OR_NONE("scale", &scale, NPY_FLOAT32, "rg"),
        LBQ_OUT_OR_NONE("offset", &offset, NPY_FLOAT32, "rg"),
        LAYOUT_ARGS,
    };
    LBQ_PARSE("unpack", spec);
    lbq_matrix matrix;
    const lbq_status status = lbq_matrix_of(code, rows, cols, group, &panels, &matrix);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    LBQ_RUN(unpack(&matrix.packed, &codes, &scale, &offset));
}

LBQ_BINDING(packed_dequantize)
{
    const lbq_code *code;
    lbq_array panels, weight;
    Py_ssize_t group;
    const lbq_arg spec[] = {
        LBQ_CODE(&code),
        LBQ_IN("panels", &panels, NPY_UINT8, "b"),
        LBQ_OUT("weight", &weight, NPY_FLOAT32, "rk"),
        LBQ_GROUP(&group),
    };
    LBQ_PARSE("packed_dequantize", spec);
    lbq_matrix matrix;
    const lbq_status status =
        lbq_matrix_of(code, weight.dims[0], weight.dims[1], group, &panels, &matrix);
    if (status != LBQ_OK)
        return lbq_result(module, status);
    LBQ_RUN(lbq_matrix_dequantize(&matrix, weight.data));
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

PyMethodDef lbq_methods_codes[] = {
    LBQ_METHOD(
        code,
        "code(levels, /, *, name, symmetric, scale_bits, unit, zero)\n--\n\n"
        "A handle of the code called name, such as 'int4', and of the storage of its scales."),
    LBQ_METHOD(codes, "codes()\n--\n\n"
                      "Properties of each code, by name."),
    LBQ_METHOD(
        quantize,
        "quantize(code, weight, importance, codes, scale, offset, /, *, group, "
        "fixed, " LBQ_SEARCH_TEXT ")\n--\n\n"
        "Round weight (r, k) to codes (whole blocks) group by group, fitting scale and offset "
        "(r, g) by method 'minmax', 'percentile' or 'mse', or with those given."),
    LBQ_METHOD(
        check_weight,
        "check_weight(weight, importance, /, *, scale_bits)\n--\n\n"
        "Raise unless scales of scale_bits reach all of weight (r, k), and importance (k) is "
        "finite and not negative."),
    LBQ_METHOD(quantize_packed,
               "quantize_packed(code, weight, importance, panels, /, *, group, " LBQ_SEARCH_TEXT
               ")\n--\n\n"
               "Round weight (r, k) into panels (b) that hold what quantize and pack would give."),
    LBQ_METHOD(packed_bytes,
               "packed_bytes(*, code, rows, cols, group, scale_bits, symmetric)\n--\n\n"
               "Size of the panels of a packed matrix."),
    LBQ_METHOD(
        pack, "pack(code, codes, scale, offset, panels, /, *, rows, cols, group)\n--\n\n"
              "Codes (whole blocks), scale and offset (rows, groups) into panels; inexact ones are "
              "refused."),
    LBQ_METHOD(unpack, "unpack(code, panels, codes, scale, offset, /, *, rows, cols, group)\n--\n\n"
                       "The inverse of pack; outputs may be None."),
    LBQ_METHOD(packed_dequantize, "packed_dequantize(code, panels, weight, /, *, group)\n--\n\n"
                                  "Values (rows, cols) of a packed matrix."),
    LBQ_METHOD(kmeans, "kmeans(values, weights, levels, /)\n--\n\n"
                       "Fill levels (l) with the cluster centres of values (n), ascending."),
    LBQ_METHOD(fixed_levels, "fixed_levels(levels, /, *, kind)\n--\n\n"
                             "Fill levels (l) with the table 'nf' (16 levels) or 'log'."),
    LBQ_METHOD(
        entropy_range,
        "entropy_range(counts, kept, /, *, levels)\n--\n\n"
        "Set kept (1) to how many bins of a histogram (b) of |x| equal levels should cover."),
    LBQ_METHODS_END,
};
