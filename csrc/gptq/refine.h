/* Coordinate descent on codes: what is left to gain after GPTQ has passed each column once.
 *
 * P. Nair, A. Suggala, "CDQuant: Greedy Coordinate Descent for Accurate LLM Quantization", 2024.
 * Sweeps over the columns; moves a code to the level below or above where that lowers
 * (w - q) H (w - q)^T, until no move does or the sweeps are spent. Equal for any number of threads.
 */
#ifndef LBQ_REFINE_H
#define LBQ_REFINE_H

#include "codes/code.h"

/* codes (rows, cols) for W (rows, cols), scale and offset (rows, groups) given, improved in place
 * by the upper triangle of H (cols, cols) plus `damping` on its diagonal. No row gets worse.
 * *moved: how many moves were made. LBQ_BAD_VALUE for a NaN or infinity in W or H, and for a code
 * that does not exist. */
lbq_status lbq_refine(const lbq_code *code, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t group,
                      const float *W, const double *H, double damping, int sweeps,
                      const float *scale, const float *offset, uint8_t *codes, ptrdiff_t *moved);

#endif
