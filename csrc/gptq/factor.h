/* The unit triangular factor of H by which GPTQ feeds errors forward, and the column order. */
#ifndef LBQ_FACTOR_H
#define LBQ_FACTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

/* What it took to factor H. */
typedef struct {
    double damping; /* added to the diagonal of H */
    int retries;    /* times it was raised tenfold */
    ptrdiff_t dead; /* columns with H_jj = 0: their input is always zero */
    bool float64;   /* factored in float64 */
} lbq_gptq_report;

/* R (cols, cols) with R D R^T = P (H + damping I) P^T, P the permutation; R has ones on its
 * diagonal and is undefined below it. Its entries are double if `float64`, else float, computed in
 * float32 if that is accurate enough, otherwise in float64. H (cols, cols) is read on and above the
 * diagonal; its scale does not matter. The first damping tried is `damping` times the mean, or the
 * median, of the positive diagonal entries; the diagonal of a dead column is set to about the
 * largest of them. LBQ_BAD_VALUE for a NaN or infinity in H, a negative diagonal or an order that
 * is not a permutation; LBQ_NOT_POSITIVE_DEFINITE if damping by ten times that mean does not
 * help. */
lbq_status lbq_gptq_factor(ptrdiff_t cols, const double *H, const int64_t *order, double damping,
                           bool median, bool float64, void *R, lbq_gptq_report *report);

/* A checked copy of `order`; the identity for NULL. LBQ_BAD_VALUE unless it is a permutation. */
lbq_status lbq_order_copy(ptrdiff_t cols, const int64_t *order, int64_t *copy);

#endif
