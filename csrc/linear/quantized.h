/* Product of a packed matrix and quantized activations. */
#ifndef LBQ_QUANTIZED_H
#define LBQ_QUANTIZED_H

#include <stddef.h>
#include <stdint.h>

#include "core/packed.h"
#include "core/status.h"

/* y (tokens, rows) = W act(x) + bias for x (tokens, cols), act rounding each step of a token to
 * integers of activation_bits, 8 or 4, and a table of levels to bytes (linear/levels.h); bias
 * (rows) may be NULL. */
lbq_status lbq_multiply_quantized(const lbq_packed *packed, int activation_bits, const float *bias,
                                  ptrdiff_t tokens, const float *x, float *y);

/* lbq_step_unpack by the kernels in use. */
void lbq_step_unpack_fast(int bits, const uint8_t *codes, ptrdiff_t columns, uint8_t *out);

#endif
