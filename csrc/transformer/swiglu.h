/* SwiGLU: y = gate / (1 + exp(-gate)) * up.
 *
 * N. Shazeer, "GLU variants improve Transformer", 2020, equation 6, without the matrices. */
#ifndef LBQ_SWIGLU_H
#define LBQ_SWIGLU_H

#include <stddef.h>

#include "core/status.h"

/* Arrays of `count` numbers; y may be gate or up. */
lbq_status lbq_swiglu(ptrdiff_t count, const float *gate, const float *up, float *y);

/* Gradients for g = dL/dy, with s = 1 / (1 + exp(-gate)):
 *
 *     dgate = g up s (1 + gate (1 - s)),     dup = g gate s
 *
 * dgate and dup may lie where any argument does. */
lbq_status lbq_swiglu_backward(ptrdiff_t count, const float *gate, const float *up, const float *g,
                               float *dgate, float *dup);

#endif
