/* Arguments that several bindings share: the search of scales, a packed matrix. */
#ifndef LBQ_CODE_ARGS_H
#define LBQ_CODE_ARGS_H

#include "codes/matrix.h"
#include "python/args.h"

#define LBQ_CODE(to) LBQ_HANDLE("code", to, "lowbitq.code")

/* How scales are found. */
typedef struct {
    const char *method;
    double clip, percentile, shrink, norm;
    Py_ssize_t candidates;
} lbq_search_args;

#define LBQ_SEARCH_ARGS(to)                                                                        \
    LBQ_TEXT("method", &(to).method), LBQ_FLOAT("clip", &(to).clip, 1e-3, 1),                      \
        LBQ_FLOAT("percentile", &(to).percentile, 50, 100),                                        \
        LBQ_INT("candidates", &(to).candidates, 1, 100000),                                        \
        LBQ_FLOAT("shrink", &(to).shrink, 0, 1), LBQ_FLOAT("norm", &(to).norm, 0.1, 10)
#define LBQ_SEARCH_TEXT "method, clip, percentile, candidates, shrink, norm"

lbq_status lbq_search_from_args(const lbq_search_args *args, lbq_search *search);

#define LBQ_GROUP(to) LBQ_INT("group", to, 1, PY_SSIZE_T_MAX)

/* LBQ_BAD_SHAPE unless codes (if given), scale and offset (of equal shapes) fit the layout. */
lbq_status lbq_check_parts(const lbq_packed *layout, const lbq_array *codes, const lbq_array *scale,
                           const lbq_array *offset);

/* The matrix of a code in panels of the right size. */
lbq_status lbq_matrix_of(const lbq_code *code, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t group,
                         const lbq_array *panels, lbq_matrix *matrix);

#endif
