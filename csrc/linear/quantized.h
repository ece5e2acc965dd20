/* Products of packed matrices with the quantized activations that they share. */
#ifndef LBQ_QUANTIZED_H
#define LBQ_QUANTIZED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "linear/linear.h"
#include "rotate/hadamard.h"

enum { LBQ_SHARED = 4 /* terms of one product */ };

/* weight * W act(R x) + bias, written to y or added to it. */
typedef struct {
    const lbq_copy *copy;
    const float *weight, *bias; /* (rows) or NULL */
    float *y;                   /* (tokens, rows) */
    bool add;
} lbq_term;

/* `count` terms whose copies quantize x in the same way: x is rotated and quantized once, to
 * integers of activation.bits. Terms with the same y are adjacent. `hadamard` is R (NULL:
 * identity); the copies' own input rotations are ignored, as are their output rotations. */
lbq_status lbq_multiply_quantized(ptrdiff_t count, const lbq_term *terms,
                                  const lbq_hadamard *hadamard, ptrdiff_t tokens, const float *x);

#endif
