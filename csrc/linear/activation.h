/* How the input of a copy is rounded, in each step of the packed weight:
 *
 *     x ~ scale * q + zero,   |q| <= limit = 2^(bits-1) - 1,   scale = clip * max |x - zero| /
 * limit */
#ifndef LBQ_ACTIVATION_H
#define LBQ_ACTIVATION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

typedef struct {
    int bits;    /* 8 or 4; 0: x stays float32 */
    float clip;  /* fraction of a step's range to keep, 0 < clip <= 1 */
    float scale; /* of every step; 0: by the formula, for each token */
    float zero;  /* read if the copy has `sums`. NaN: the middle of each token's range */
} lbq_activation;

/* LBQ_BAD_VALUE unless its numbers are such. */
lbq_status lbq_activation_check(const lbq_activation *activation);

/* Whether two numbers of activations are equal, NaN to NaN. */
bool lbq_same_float(float a, float b);

/* Subtracts the zero from a token's x (cols); returns it. */
float lbq_activation_centre(const lbq_activation *activation, ptrdiff_t cols, float *x);

/* A token's x (cols), centred, to integers q (whole steps), and scale and total (steps): see
 * quantize_i8 in kernels/list.h. */
void lbq_activation_round(const lbq_activation *activation, ptrdiff_t cols, ptrdiff_t step,
                          const float *x, int8_t *q, float *scale, float *total);

#endif
