/* Soft rounding: each weight lies between two neighbouring levels, and V says where.
 *
 *     w = scale (level[lower] + h (level[lower + 1] - level[lower])) + offset,   0 <= h <= 1
 *
 * h is AdaRound's rectified sigmoid, clip(1.2 sigmoid(V) - 0.1, 0, 1), which a penalty drives to 0
 * or 1 (M. Nagel et al., "Up or down? Adaptive rounding for post-training quantization", 2020,
 * equations 23 and 24), or a sample of the relaxed Bernoulli distribution, sigmoid((V + noise) /
 * temperature) with logistic noise, which is Gumbel-softmax over the two levels (E. Jang, S. Gu,
 * B. Poole, "Categorical reparameterization with Gumbel-softmax"; C. Maddison, A. Mnih, Y. W. Teh,
 * "The concrete distribution", 2017, appendix B). In the end a word is lower + 1 if V > 0, else
 * lower. */
#ifndef LBQ_SOFT_H
#define LBQ_SOFT_H

#include <math.h>

#include "codes/groups.h"

/* h of V, rectified; *slope its derivative. */
static inline double
lbq_soft_bit(double V, double *slope)
{
    const double sigmoid = 1 / (1 + exp(-V)), h = 1.2 * sigmoid - 0.1;
    *slope = h > 0 && h < 1 ? 1.2 * sigmoid * (1 - sigmoid) : 0;
    return h < 0 ? 0 : h > 1 ? 1 : h;
}

/* Its inverse: V for 0 <= h <= 1. */
static inline double
lbq_soft_start(double h)
{
    const double sigmoid = (h + 0.1) / 1.2;
    return log(sigmoid / (1 - sigmoid));
}

/* Derivative by h of the penalty 1 - |2 h - 1|^beta. */
static inline double
lbq_soft_penalty_slope(double h, double beta)
{
    const double centred = 2 * h - 1;
    return -2 * beta * pow(fabs(centred), beta - 1) * copysign(1, centred);
}

typedef struct {
    bool sampled;          /* the relaxed Bernoulli distribution instead of the rectified sigmoid */
    double temperature;    /* sampled: above 0 */
    double noise;          /* sampled: factor of the logistic noise; 1, or 0 for none */
    uint64_t seed, stream; /* sampled: of the noise; weight number i has random number i */
} lbq_softness;

/* weight (rows, cols) from V and lower (rows, cols). lower < count - 1. */
lbq_status lbq_soft_compose(const lbq_grids *grids, const lbq_softness *how, const float *V,
                            const uint8_t *lower, float *weight);

/* From dW (rows, cols), the gradient by what lbq_soft_compose writes: adds to dV (rows, cols), and
 * sets the others. */
lbq_status lbq_soft_gradient(const lbq_grids *grids, const lbq_softness *how, const float *V,
                             const uint8_t *lower, const float *dW, float *dV,
                             const lbq_grid_gradients *gradients);

/* The two levels around float weights W (rows, cols) that were given the words (rows, cols), and V
 * for their position in between, from 0.01 to 0.99, moved to between the ends of lbq_code_start:
 * the final words are those given. */
lbq_status lbq_soft_bracket(const lbq_grids *grids, const lbq_softness *how, const float *W,
                            const uint8_t *words, float *V, uint8_t *lower);

/* The final words (rows, cols): lower + 1 where V > 0, else lower. */
lbq_status lbq_soft_words(ptrdiff_t count, const float *V, const uint8_t *lower, uint8_t *words);

/* Adds to dV (count) the derivatives of strength * rms * sum (1 - |2 h - 1|^beta), h the rectified
 * sigmoid of V (count) and rms the root mean square of dV: the gradient of a loss of any unit. */
lbq_status lbq_soft_penalty(ptrdiff_t count, const float *V, double strength, double beta,
                            float *dV);

#endif
