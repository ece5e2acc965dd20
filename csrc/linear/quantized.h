/* Products of packed matrices and the quantized activations that they share. */
#ifndef LBQ_QUANTIZED_H
#define LBQ_QUANTIZED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "linear/linear.h"
#include "rotate/hadamard.h"

enum { LBQ_SHARED = 4 /* layers that one product takes at most */ };

/* Whether both layers, of the same input, see the same quantized activations: those of one step,
 * of so many bits, after one rotation. */
bool lbq_same_activations(const lbq_linear *a, const lbq_linear *b);

/* y[i] (tokens, rows) = W_i act(R x) + b_i for each of `count` layers with the same activations,
 * which are rotated and quantized once, each step to integers of activation_bits, 8 or 4; levels
 * are bytes (lbq_byte_levels). `hadamard` is R, or NULL for 1, whatever the
 * layers say. */
lbq_status lbq_multiply_quantized(ptrdiff_t count, const lbq_linear *const *layers,
                                  const lbq_hadamard *hadamard, ptrdiff_t tokens, const float *x,
                                  float *const *y);

#endif
