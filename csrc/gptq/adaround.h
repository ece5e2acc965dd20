/* AdaRound: rounds each weight up or down so that the layer's outputs change least.
 *
 * M. Nagel et al., "Up or down? Adaptive rounding for post-training quantization", 2020. With the
 * Gram matrix H of the inputs, no data is replayed: for each row w of W,
 *
 *     minimise (w - q) H (w - q)^T + strength * sum_k (1 - |2 h_k - 1|^beta),
 *     q_k = lower_k + h_k (upper_k - lower_k),    h = clip(1.2 sigmoid(V) - 0.1, 0, 1)
 *
 * over V by Adam, beta falling from 20 to 2. Then h is rounded to 0 or 1, and flips of single codes
 * and of pairs finish the descent. */
#ifndef LBQ_ADAROUND_H
#define LBQ_ADAROUND_H

#include "codes/code.h"

typedef struct {
    int steps;       /* of Adam; 0: only the descent, from rounding to nearest */
    double rate;     /* of Adam, in units of V */
    double strength; /* of the penalty, in units of the error per weight of rounding to nearest
                        without correlations */
} lbq_adaround_options;

/* codes (rows, cols) for W (rows, cols) and given scale and offset (rows, groups); reads the upper
 * triangle of H (cols, cols). No row is worse than rounding to nearest. `softness`: the largest
 * min(h, 1 - h) left by Adam. LBQ_BAD_VALUE as for lbq_quantize, and for a NaN or infinity in H. */
lbq_status lbq_adaround(const lbq_code *code, const lbq_adaround_options *options, ptrdiff_t rows,
                        ptrdiff_t cols, ptrdiff_t group, const float *W, const double *H,
                        const float *scale, const float *offset, uint8_t *codes, double *softness);

#endif
