/* Products of float32 activations with dense or decoded weights. */
#ifndef LBQ_DECODED_H
#define LBQ_DECODED_H

#include <stddef.h>

#include "core/status.h"
#include "linear/linear.h"

/* y = W x + beta y for x (tokens, cols), y (tokens, rows), beta 0 or 1, without the copy's
 * rotations and weight. LBQ_NO_MEMORY. */
lbq_status lbq_multiply_float(const lbq_copy *copy, ptrdiff_t tokens, const float *x, float beta,
                              float *y);

#endif
