/* Losses of a model's predictions, their gradients with respect to the logits, and tokens drawn
 * from predictions: what training by distillation asks of the last layer.
 *
 *     q = softmax(z / temperature), p = softmax(teacher / temperature), m = (p + q) / 2
 *     loss[t] = temperature^2 (forward KL(p || q) + reverse KL(q || p)
 *                              + jensen_shannon (KL(p || m) + KL(q || m)) / 2)
 *               - cross_entropy log softmax(z)[target]
 *     KL(p || q) = sum_v p[v] (log p[v] - log q[v])
 *
 * temperature^2 makes gradients of equal size at every temperature: G. Hinton, O. Vinyals, J. Dean,
 * "Distilling the Knowledge in a Neural Network", 2015, section 2. The reverse divergence is that
 * of Y. Gu, L. Dong, F. Wei, M. Huang, "MiniLLM: Knowledge Distillation of Large Language Models",
 * 2024; the mixture that of R. Agarwal et al., "On-Policy Distillation of Language Models", 2024.
 */
#ifndef LBQ_LOSS_H
#define LBQ_LOSS_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

typedef struct {
    double forward, reverse, jensen_shannon, cross_entropy; /* weights, finite and >= 0 */
    double temperature;                                     /* > 0 */
} lbq_loss;

/* loss (tokens), and logits z (tokens, vocab) become dL/dz of L = sum_t weight[t] loss[t]. weight
 * NULL: ones. teacher (tokens, vocab) may be NULL if no divergence has a weight, target (tokens) if
 * cross_entropy has none; target[t] = -1: no cross entropy at t. Sums are accumulated in float64.
 * LBQ_BAD_VALUE for what does not fit together and for a row with a NaN or an infinity, or whose
 * loss leaves float32; logits are undefined then. */
lbq_status lbq_loss_gradient(const lbq_loss *how, ptrdiff_t tokens, ptrdiff_t vocab, float *logits,
                             const float *teacher, const int32_t *target, const float *weight,
                             double *loss);

/* target[t] is drawn from softmax(logits[t]): the first v at which the sum of probabilities up to
 * and including v exceeds uniform[t]. LBQ_BAD_VALUE if uniform[t] is outside [0, 1), or if a logit
 * of the row is a NaN or +infinity. */
lbq_status lbq_draw(ptrdiff_t tokens, ptrdiff_t vocab, const float *logits, const double *uniform,
                    int32_t *target);

#endif
