/* Sums that say how sensitive a layer is to quantization: over its weights, and over its inputs.
 *
 * Every sum runs in float64 over pieces whose size depends on the shape only, and pieces are added
 * in the order of their index: equal bits for any number of threads. Finite float32 numbers cannot
 * overflow them, so a NaN or infinity in a sum is one in the arrays. */
#ifndef LBQ_SENSITIVITY_H
#define LBQ_SENSITIVITY_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

typedef struct {
    double error;           /* sum (W - Q)^2 */
    double weight;          /* sum W^2 */
    double weighted_error;  /* sum h_k (W - Q)^2; 0 without h */
    double weighted_weight; /* sum h_k W^2; 0 without h */
    double gradient;        /* sum G^2; 0 without G */
    double fisher;          /* sum G^2 (W - Q)^2; 0 without G */
} lbq_weight_sums;

/* Sums over W, Q and G (rows, cols) with column weights h (cols). LBQ_BAD_VALUE for a negative h,
 * and for a NaN or infinity anywhere. */
lbq_status lbq_weights_sum(ptrdiff_t rows, ptrdiff_t cols, const float *W, const float *Q,
                           const float *h /* or NULL */, const float *G /* or NULL */,
                           lbq_weight_sums *sums);

typedef struct {
    ptrdiff_t above;      /* how many |x| > tau */
    double magnitude;     /* sum |x| */
    double squares;       /* sum x^2 */
    double squares_above; /* sum x^2 where |x| > tau */
    double largest;       /* maximum |x|; 0 if there is none */
} lbq_input_sums;

/* Sums over x (tokens, cols). LBQ_BAD_VALUE for a NaN or infinity. */
lbq_status lbq_inputs_sum(ptrdiff_t tokens, ptrdiff_t cols, const float *x, double tau,
                          lbq_input_sums *sums);

/* One bin for each magnitude of bfloat16: bin i has the |x| whose upper 16 bits are i. */
enum { LBQ_MAGNITUDES = 1 << 15 };

/* counts[i] += how many x (tokens, cols) lie in bin i. LBQ_BAD_VALUE for a NaN or infinity (counts
 * are then spoilt). */
lbq_status lbq_magnitudes_count(ptrdiff_t tokens, ptrdiff_t cols, const float *x,
                                int64_t *counts /* (LBQ_MAGNITUDES) */);

#endif
