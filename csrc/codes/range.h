/* The ranges of LBQ_PANEL groups, and their quantiles. */
#ifndef LBQ_RANGE_H
#define LBQ_RANGE_H

#include "codes/code.h"

/* Minimum and maximum (LBQ_PANEL) of each group, copied if the group comes with them. */
void lbq_groups_range(const lbq_groups *groups, float *low, float *high);

/* Quantiles by NumPy's method "linear"; low and high are the ranges. */
void lbq_groups_quantile(const lbq_groups *groups, const float *low, const float *high,
                         double percent, float *found);

#endif
