/* Importance of columns: the weights of their squared errors when scales are fitted. Only ratios
 * within a group matter; in a group without any importance all columns count equally.
 *
 * If a few columns matter a million times more than the others, a grid can fit them exactly, and
 * the others decide what is left to choose; float32 sums would lose their shares. Such groups are
 * called dominated and are judged in float64. */
#ifndef LBQ_IMPORTANCE_H
#define LBQ_IMPORTANCE_H

#include "codes/code.h"

/* LBQ_BAD_VALUE for a negative number, a NaN or an infinity, naming the column. */
lbq_status lbq_check_importance(ptrdiff_t cols, const float *importance);

/* Shares (cols): importance (cols) scaled by one factor per group of `group` columns, so that the
 * largest is between 1/2 and 1. LBQ_BAD_VALUE as for lbq_check_importance. */
lbq_status lbq_importance_shares(ptrdiff_t cols, ptrdiff_t group, const float *importance,
                                 float *shares);

/* Whether a few columns dominate the groups; `total`: sum of the shares of one group. */
bool lbq_dominated(const lbq_groups *groups, const float *shares, double total);

/* Errors and refits of grids (LBQ_PANEL), in float64. */
typedef struct {
    double error[LBQ_PANEL];                    /* sum share |w - q|^norm */
    double scale[LBQ_PANEL], offset[LBQ_PANEL]; /* least squares refit; scale 0: none */
    double level[LBQ_PANEL];                    /* mean level, weighted by the shares */
} lbq_judgement;

/* `shares` is as lbq_groups.importance; NULL: all 1. */
void lbq_judge_grid(const lbq_code *code, const lbq_groups *groups, const float *shares,
                    double norm, const double *scale, const double *offset,
                    lbq_judgement *judgement);

/* error (LBQ_PANEL) = sum share |w - value|^norm. */
void lbq_judge_value(const lbq_groups *groups, const float *shares, double norm,
                     const double *value, double *error);

#endif
