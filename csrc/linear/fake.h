/* Fake quantization: inputs rounded as packed weights round them, but kept in float32, with a way
 * back. In a basis T of their own, T x is rounded and rotated back. For each step of the packed
 * weights
 *
 *     y = scale * q + zero,   q = round(v) clipped to +-limit,   v = (x - zero) / scale
 *
 * as in linear/activation.h. The way back takes the error of rounding, q - v, as a constant where
 * |v| < limit, so that for g = dL/dy
 *
 *     dL/dx      =  g  where |v| < limit,  else 0
 *     dL/dscale  =  sum of  g (q - v)  where |v| < limit,  g q  else
 *     dL/dzero   =  sum of  0  where |v| < limit,  g  else
 *
 * A scale by the formula hands its gradient on to the clip and to the largest |x - zero|, the
 * middle of a token's range to its ends. With clip = 1 the largest counts as clipped: a smaller
 * clip is the only other one.
 *
 * S. Esser, J. McKinstry, D. Bablani, R. Appuswamy, D. Modha, "Learned Step Size Quantization",
 * 2020, equation 3; J. Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural
 * Networks", 2018 (the clip); Y. Bhalgat et al., "LSQ+: Improving low-bit quantization through
 * learnable offsets and better initialization", 2020 (the zero). */
#ifndef LBQ_FAKE_H
#define LBQ_FAKE_H

#include <stdbool.h>
#include <stddef.h>

#include "core/status.h"
#include "rotate/rotation.h"

enum { LBQ_FAKE_VALUES = 3 };

typedef struct {
    int bits;            /* 8 or 4 */
    ptrdiff_t step;      /* columns that share a scale: 16, 32, 64 or 128 */
    const float *values; /* clip, scale and zero as in lbq_activation (0: no zero point), read by
                            each call; NULL: x stays as it is */
    const lbq_rotation *basis; /* T, of order cols; NULL: the identity */
} lbq_fake;

/* LBQ_BAD_VALUE unless `bits`, `step` and the values are such. */
lbq_status lbq_fake_check(const lbq_fake *fake);

/* Whether both round in the same way, by value. */
bool lbq_same_fake(const lbq_fake *a, const lbq_fake *b);

/* y for x, both (tokens, cols), which may be the same array. LBQ_NO_MEMORY. */
lbq_status lbq_fake_forward(const lbq_fake *fake, ptrdiff_t tokens, ptrdiff_t cols, const float *x,
                            float *y);

/* g = dL/dy (tokens, cols) becomes dL/dx; the gradients of the values are added to `gradient`
 * unless it is NULL. LBQ_NO_MEMORY. */
lbq_status lbq_fake_backward(const lbq_fake *fake, ptrdiff_t tokens, ptrdiff_t cols, const float *x,
                             float *g, float *gradient);

#endif
