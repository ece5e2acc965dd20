/* Visits the groups of a dense matrix, rows in parallel, and sums the gradients of their scales,
 * offsets and levels. Used where each training step chooses the words again; codes/gradient.h does
 * the same for packed words, which stay. */
#ifndef LBQ_GROUPS_H
#define LBQ_GROUPS_H

#include "codes/code.h"

/* The grids of a matrix of a code whose words are levels (`ordered`). */
typedef struct {
    const lbq_code *code;
    ptrdiff_t rows, cols, group;
    const float *scale, *offset; /* (rows, groups); offset NULL: -zero * scale */
} lbq_grids;

/* A group: `count` weights of a row from index `first` of the matrix on; `at`: its index in (rows,
 * groups). A visitor adds derivatives of the loss to the sums. */
typedef struct {
    ptrdiff_t first, count, at;
    float scale, offset;
    double by_scale, by_offset; /* with offset and scale independent */
    double *by_level;           /* (LBQ_MAX_LEVELS), or NULL: not wanted */
} lbq_group;

typedef void (*lbq_visitor)(const void *context, lbq_group *group);

/* Sums over a matrix; each may be NULL. dscale and doffset (rows, groups), dlevels as the table. */
typedef struct {
    float *dscale, *doffset, *dlevels;
} lbq_grid_gradients;

/* Visits all groups. Without offsets, dscale includes -zero times what the offset would get. Sums
 * are accumulated in float64 and in an order that depends on the sizes alone. LBQ_BAD_VALUE for a
 * kind that is not ordered, and for dlevels of a code without a table. */
lbq_status lbq_visit_groups(const lbq_grids *grids, lbq_visitor visit, const void *context,
                            const lbq_grid_gradients *gradients);

/* LBQ_BAD_VALUE, naming row and column, for words (rows, cols) above `top`; `name` is theirs. */
lbq_status lbq_check_words(const lbq_grids *grids, const uint8_t *words, const char *name, int top);

#endif
