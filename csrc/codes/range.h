/* The ranges of LBQ_PANEL groups, and their quantiles. */
#ifndef LBQ_RANGE_H
#define LBQ_RANGE_H

#include "codes/code.h"

/* Minimum and maximum (LBQ_PANEL) of each group: those it comes with, if any. */
void lbq_groups_range(const lbq_groups *groups, float *low, float *high);

/* Quantiles between order statistics as NumPy's "linear" has them; low and high are the ranges. */
void lbq_groups_quantile(const lbq_groups *groups, const float *low, const float *high,
                         double percent, float *found);

#endif
