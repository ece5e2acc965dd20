/* IEEE float16 and bfloat16 to and from float32; narrowing rounds to nearest, ties to even. */
#ifndef LBQ_HALF_H
#define LBQ_HALF_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

float lbq_half_widen(uint16_t half);
uint16_t lbq_half_narrow(float value); /* infinity from 65520 */

/* `value` rounded to a float16: to the nearest (direction 0), down (-1) or up (1); saturates at
 * +-65504. */
float lbq_half_round(float value, int direction);

/* Arrays of `count` numbers, split among the threads. */
lbq_status lbq_half_to_float(const uint16_t *half, ptrdiff_t count, float *out);
lbq_status lbq_bfloat_to_float(const uint16_t *bfloat, ptrdiff_t count, float *out);
lbq_status lbq_float_to_half(const float *values, ptrdiff_t count, uint16_t *out);

#endif
