/* Coordinate descent on codes: the gains left after GPTQ's single pass over the columns.
 *
 * P. Nair, A. Suggala, "CDQuant: Greedy Coordinate Descent for Accurate LLM Quantization", 2024.
 * Sweeps over the columns and moves a code one level up or down if that lowers (w - q) H (w - q)^T,
 * until no move helps or the sweeps are used up. Results do not depend on the number of threads. */
#ifndef LBQ_REFINE_H
#define LBQ_REFINE_H

#include "codes/code.h"

/* Improves codes (rows, cols) in place, for W (rows, cols), given scale and offset (rows, groups),
 * and the upper triangle of H (cols, cols) with `damping` added to its diagonal. No row gets worse.
 * *moved: number of moves. LBQ_BAD_VALUE for a NaN or infinity in W or H, and for a code out of
 * range. */
lbq_status lbq_refine(const lbq_code *code, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t group,
                      const float *W, const double *H, double damping, int sweeps,
                      const float *scale, const float *offset, uint8_t *codes, ptrdiff_t *moved);

#endif
