/* One step of a product: unpacked codes times activations. */
#ifndef LBQ_GEMV_PORTABLE_H
#define LBQ_GEMV_PORTABLE_H

#include "kernels/kernels.h"

/* Adds the product of step `step`, codes as [k / 4][row][k % 4], to y [token][row]. */
void lbq_add_step_portable(const lbq_panel *panel, ptrdiff_t step, const uint8_t *codes,
                           const lbq_activations *x, float *y);

#endif
