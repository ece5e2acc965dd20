/* AdaRound: which of its two neighbours each weight is rounded to, chosen by the layer's outputs.
 *
 * M. Nagel et al., "Up or down? Adaptive rounding for post-training quantization", 2020. With the
 * Gram matrix H of the inputs no data is replayed: for rows w of W,
 *
 *     minimise (w - q) H (w - q)^T + strength * sum_k (1 - |2 h_k - 1|^beta),
 *     q_k = lower_k + h_k (upper_k - lower_k),    h = clip(1.2 sigmoid(V) - 0.1, 0, 1)
 *
 * over V by Adam, beta falling from 20 to 2, after which h is 0 or 1 and changes of single codes
 * and of pairs finish the descent. */
#ifndef LBQ_ADAROUND_H
#define LBQ_ADAROUND_H

#include "codes/code.h"

typedef struct {
    int steps;       /* of Adam; 0: only the descent by single codes and pairs, from rounding */
    double rate;     /* of Adam, in units of V */
    double strength; /* of the penalty, where the error of rounding to nearest, without
                        correlations, is 1 per weight */
} lbq_adaround_options;

/* codes (rows, cols) for W (rows, cols), scale and offset (rows, groups) given, by the upper
 * triangle of H (cols, cols). Never worse on any row than rounding to nearest. `softness`: the
 * largest min(h, 1 - h) that Adam left. LBQ_BAD_VALUE as lbq_quantize, and for a NaN or infinity in
 * H. */
lbq_status lbq_adaround(const lbq_code *code, const lbq_adaround_options *options, ptrdiff_t rows,
                        ptrdiff_t cols, ptrdiff_t group, const float *W, const double *H,
                        const float *scale, const float *offset, uint8_t *codes, double *softness);

#endif
