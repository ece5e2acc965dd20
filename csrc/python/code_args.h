/* Arguments of the bindings that round to a code: the code, its scales and how these are found. */
#ifndef LBQ_CODE_ARGS_H
#define LBQ_CODE_ARGS_H

#include "codes/code.h"
#include "python/args.h"

typedef struct {
    lbq_array importance, levels, codes, scale, offset;
    Py_ssize_t count, scale_bits, group, candidates;
    double zero, gamma, clip, percentile, shrink, norm;
    int symmetric, fixed;
    const char *method;
} lbq_code_args;

/* Rows of a table; a weight of shape "rk" stands before them. */
#define LBQ_CODE_ARRAYS(to)                                                                        \
    LBQ_IN_OR_NONE("importance", &(to).importance, NPY_FLOAT32, "k"),                              \
        LBQ_IN_OR_NONE("levels", &(to).levels, NPY_FLOAT32, "l"),                                  \
        LBQ_OUT("codes", &(to).codes, NPY_UINT8, "rk"),                                            \
        LBQ_INOUT("scale", &(to).scale, NPY_FLOAT32, "rg"),                                        \
        LBQ_INOUT("offset", &(to).offset, NPY_FLOAT32, "rg")
#define LBQ_CODE_OPTIONS(to)                                                                       \
    LBQ_INT("count", &(to).count, 2, 256), LBQ_BOOL("symmetric", &(to).symmetric),                 \
        LBQ_FLOAT("zero", &(to).zero, -256, 256), LBQ_INT("scale_bits", &(to).scale_bits, 0, 16),  \
        LBQ_FLOAT("gamma", &(to).gamma, 0, 3e38),                                                  \
        LBQ_INT("group", &(to).group, 1, PY_SSIZE_T_MAX), LBQ_BOOL("fixed", &(to).fixed),          \
        LBQ_TEXT("method", &(to).method), LBQ_FLOAT("clip", &(to).clip, 1e-3, 1),                  \
        LBQ_FLOAT("percentile", &(to).percentile, 50, 100),                                        \
        LBQ_INT("candidates", &(to).candidates, 1, 100000),                                        \
        LBQ_FLOAT("shrink", &(to).shrink, 0, 1), LBQ_FLOAT("norm", &(to).norm, 0.1, 10)

/* The code and the range that they stand for, in which nothing outlives them. */
lbq_status lbq_code_from_args(const lbq_code_args *args, ptrdiff_t cols, lbq_code *code,
                              lbq_range *range);

/* That there are as many levels as codes, and scales for all groups of the columns. */
lbq_status lbq_check_groups(const lbq_array *levels, Py_ssize_t count, const lbq_array *scale,
                            ptrdiff_t cols, Py_ssize_t group);

#endif
