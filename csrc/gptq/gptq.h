/* GPTQ: rounding with feedback, so that later columns absorb the error of earlier ones.
 *
 * Minimises tr(E H E^T), E = W - Q, one column, or the columns of a word, after another. With H = R
 * D R^T, R unit upper triangular, the objective is sum_j D_j |W_j + sum_{i<j} E_i R_ij - Q_j|^2, so
 * column j is rounded from W_j + sum_{i<j} E_i R_ij. That is the published algorithm (E. Frantar,
 * S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
 * Pre-trained Transformers", 2023), which takes the upper Cholesky factor of H^-1, without the
 * inverse (J. Chee, Y. Cai, V. Kuleshov, C. De Sa, "QuIP", 2023, theorem 6): a quarter of the work.
 *
 * `order` (cols) is the order in which columns are rounded, a permutation; NULL: as they stand.
 * Results are equal bit for bit for any number of threads. */
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
    const void *R;           /* from there, double if `float64`, else float */
    const float *importance; /* (cols) of squared errors when scales are fitted, or NULL */
    bool fixed;              /* scale and offset are given, not fitted */
    bool float64;            /* arithmetic; else float32 */
    ptrdiff_t block;         /* columns between matrix products, rounded up to whole groups */
} lbq_gptq_problem;

/* Rounds W (rows, cols): codes (rows in whole blocks, cols), scale and offset (rows, groups),
 * groups = ceil(cols / group). A group is fitted when its first column's turn comes, to the weights
 * as the feedback has moved them until then; so unless `fixed`, or a row is one group, the order
 * keeps the columns of a group together (else LBQ_BAD_VALUE). cols and group are whole words of the
 * code, and the order keeps their columns together and ascending; inside a word the feedback is
 * that of earlier words. W is zero in dead columns. A group of zeros stays so: it absorbs no
 * errors, nor does one too small for its scale to follow them. LBQ_BAD_VALUE as lbq_check_weights
 * and lbq_check_importance have it, and for a group to which so much is fed that its scale does not
 * fit, naming row and columns. */
lbq_status lbq_gptq(const lbq_gptq_problem *problem, const float *W, uint8_t *codes, float *scale,
                    float *offset);

#endif
