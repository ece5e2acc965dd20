/* Importance of columns: the weight of each one's squared error when scales are fitted. Only ratios
 * within a group matter; a group whose columns all have none counts them all the same.
 *
 * Where a few columns matter a million times more than the others, a grid can meet them exactly,
 * and what is left to choose is decided by the others, whose share float32 sums would lose. Such
 * groups are dominated, and judged in float64. */
#ifndef LBQ_IMPORTANCE_H
#define LBQ_IMPORTANCE_H

#include "codes/code.h"

/* LBQ_BAD_VALUE for a negative number, a NaN or an infinity, naming the column. */
lbq_status lbq_check_importance(ptrdiff_t cols, const float *importance);

/* Importance (cols) to shares (cols): in each group of `group` columns times one factor that brings
 * the largest to between 1/2 and 1. LBQ_BAD_VALUE as lbq_check_importance has it. */
lbq_status lbq_importance_shares(ptrdiff_t cols, ptrdiff_t group, const float *importance,
                                 float *shares);

/* Whether a few columns dominate the groups; `total`: sum of the shares of one of them. */
bool lbq_dominated(const lbq_groups *groups, const float *shares, double total);

/* What follows from grids (LBQ_PANEL) of groups, in float64. */
typedef struct {
    double error[LBQ_PANEL];                    /* sum share |w - q|^norm */
    double scale[LBQ_PANEL], offset[LBQ_PANEL]; /* least squares refit; scale 0: there is none */
    double level[LBQ_PANEL];                    /* mean level, weighted by the shares */
} lbq_judgement;

/* `shares` as lbq_groups.importance, or NULL: all 1. */
void lbq_judge_grid(const lbq_code *code, const lbq_groups *groups, const float *shares,
                    double norm, const double *scale, const double *offset,
                    lbq_judgement *judgement);

/* error (LBQ_PANEL) = sum share |w - value|^norm. */
void lbq_judge_value(const lbq_groups *groups, const float *shares, double norm,
                     const double *value, double *error);

#endif
