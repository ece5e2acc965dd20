/* Arguments that several bindings share: a code, how its scales are found, a packed matrix. */
#ifndef LBQ_CODE_ARGS_H
#define LBQ_CODE_ARGS_H

#include <float.h>

#include "codes/code.h"
#include "core/packed.h"
#include "python/args.h"

/* How scales are found. */
typedef struct {
    const char *method;
    double clip, percentile, shrink, norm;
    Py_ssize_t candidates;
} lbq_range_args;

#define LBQ_RANGE_ARGS(to)                                                                         \
    LBQ_TEXT("method", &(to).method), LBQ_FLOAT("clip", &(to).clip, 1e-3, 1),                      \
        LBQ_FLOAT("percentile", &(to).percentile, 50, 100),                                        \
        LBQ_INT("candidates", &(to).candidates, 1, 100000),                                        \
        LBQ_FLOAT("shrink", &(to).shrink, 0, 1), LBQ_FLOAT("norm", &(to).norm, 0.1, 10)

lbq_status lbq_range_from_args(const lbq_range_args *args, lbq_range *range);

/* What a weight "rk", which stands before them in the table, is rounded to. */
typedef struct {
    lbq_array importance, levels, codes, scale, offset;
    Py_ssize_t count, scale_bits, group;
    double zero, gamma;
    int symmetric, fixed;
    lbq_range_args range;
} lbq_code_args;

#define LBQ_CODE_ARGS(to)                                                                          \
    LBQ_IN_OR_NONE("importance", &(to).importance, NPY_FLOAT32, "k"),                              \
        LBQ_IN_OR_NONE("levels", &(to).levels, NPY_FLOAT32, "l"),                                  \
        LBQ_OUT("codes", &(to).codes, NPY_UINT8, "rk"),                                            \
        LBQ_INOUT("scale", &(to).scale, NPY_FLOAT32, "rg"),                                        \
        LBQ_INOUT("offset", &(to).offset, NPY_FLOAT32, "rg"),                                      \
        LBQ_INT("count", &(to).count, 2, 256), LBQ_BOOL("symmetric", &(to).symmetric),             \
        LBQ_FLOAT("zero", &(to).zero, -256, 256), LBQ_INT("scale_bits", &(to).scale_bits, 0, 16),  \
        LBQ_FLOAT("gamma", &(to).gamma, 0, 3e38),                                                  \
        LBQ_INT("group", &(to).group, 1, PY_SSIZE_T_MAX), LBQ_BOOL("fixed", &(to).fixed),          \
        LBQ_RANGE_ARGS((to).range)

/* `code` borrows the levels. */
lbq_status lbq_code_from_args(const lbq_code_args *args, ptrdiff_t cols, lbq_code *code,
                              lbq_range *range);

/* That no offsets are to be found for a table of levels; that there are as many levels as codes;
 * and scales for all groups of the columns. */
lbq_status lbq_check_fit(const lbq_array *levels, int has_offset, int fixed);
lbq_status lbq_check_levels(const lbq_array *levels, Py_ssize_t count);
lbq_status lbq_check_groups(const lbq_array *levels, Py_ssize_t count, const lbq_array *scale,
                            ptrdiff_t cols, Py_ssize_t group);

/* What describes a packed matrix. */
typedef struct {
    Py_ssize_t rows, cols, bits, group, scale_bits;
    int has_offset;
    double gamma, zero;
} lbq_packed_args;

#define LBQ_PACKED_ARGS(to)                                                                        \
    LBQ_INT("rows", &(to).rows, 1, INT32_MAX), LBQ_INT("cols", &(to).cols, 1, INT32_MAX),          \
        LBQ_INT("bits", &(to).bits, 1, 8), LBQ_INT("group", &(to).group, 1, PY_SSIZE_T_MAX),       \
        LBQ_INT("scale_bits", &(to).scale_bits, 0, 16), LBQ_BOOL("has_offset", &(to).has_offset),  \
        LBQ_FLOAT("gamma", &(to).gamma, -FLT_MAX, FLT_MAX),                                        \
        LBQ_FLOAT("zero", &(to).zero, -FLT_MAX, FLT_MAX)
#define LBQ_PACKED_TEXT "rows, cols, bits, group, scale_bits, has_offset, gamma, zero"

lbq_packed lbq_packed_from_args(const lbq_packed_args *args);

/* Gives the matrix its panels, if they have its size. */
lbq_status lbq_packed_attach(lbq_packed *packed, const lbq_array *panels);

#endif
