/* GPTQ: rounding with feedback, so that later columns absorb the error of earlier ones.
 *
 * Minimises tr(E H E^T), E = W - Q, one column (or the columns of one word) at a time. With H = R D
 * R^T, R unit upper triangular, the objective is sum_j D_j |W_j + sum_{i<j} E_i R_ij - Q_j|^2, so
 * column j is rounded from W_j + sum_{i<j} E_i R_ij. This is the published algorithm (E. Frantar,
 * S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
 * Pre-trained Transformers", 2023) without its Cholesky factor of H^-1 (J. Chee, Y. Cai, V.
 * Kuleshov, C. De Sa, "QuIP", 2023, theorem 6): a quarter of the work.
 *
 * A sweep of coordinate descent is the same pass: column j, rounded for all others as they are, is
 * rounded from W_j + sum_{i<j} E_i H_ij / H_jj + sum_{i>j} E_i H_ij / H_jj, where the first sum has
 * the errors of this pass, so that R_ij = H_ij / H_jj, and the second, `start`, those before it.
 *
 * `order` (cols), a permutation, is the order in which columns are rounded; NULL: ascending.
 * Results are bit-identical for any number of threads. */
#ifndef LBQ_GPTQ_H
#define LBQ_GPTQ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "codes/code.h"
#include "core/status.h"

typedef struct {
    const lbq_code *code;
    const lbq_search *search;
    ptrdiff_t rows, cols;
    ptrdiff_t group;         /* columns k with the same k / group share scale and offset */
    const int64_t *order;    /* as given to lbq_gptq_factor, gptq/factor.h */
    const void *R;           /* its result: double if `float64`, else float */
    const void *start;       /* (cols in that order, rows): feedback besides E R, or NULL */
    const float *importance; /* (cols), for fitting scales (codes/importance.h), or NULL */
    bool fixed;              /* scale and offset are given, not fitted */
    bool float64;            /* arithmetic; else float32 */
    ptrdiff_t block;         /* columns between matrix products, rounded up to whole groups */
} lbq_gptq_problem;

/* Rounds W (rows, cols) to codes (rows padded to whole blocks, cols), scale and offset (rows,
 * groups), groups = ceil(cols / group). A group is fitted when its first column is reached, to its
 * weights with the feedback so far. So the order must keep the columns of a group together (else
 * LBQ_BAD_VALUE), unless `fixed` or a row is one group. cols and group are multiples of the columns
 * of a word, which the order keeps together and ascending; within a word, feedback comes from
 * earlier words only. W is zero in dead columns. A group of zeros stays zero and absorbs no errors,
 * nor does a group too small for its scale to follow them. LBQ_BAD_VALUE as for lbq_check_weights
 * and lbq_check_importance, and, naming row and columns, for a group that grows too large for any
 * scale by feedback. */
lbq_status lbq_gptq(const lbq_gptq_problem *problem, const float *W, uint8_t *codes, float *scale,
                    float *offset);

#endif
