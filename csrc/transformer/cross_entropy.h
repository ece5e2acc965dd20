/* Quality of a prediction, in nats: negative log likelihood of the actual tokens, and KL divergence
 * from another model's prediction.
 *
 *     nll[t] = log(sum_v exp(x[t,v])) - x[t,target[t]]
 *     kl[t]  = sum_v P[t,v] (log P[t,v] - log Q[t,v]),   P = softmax(p), Q = softmax(q) */
#ifndef LBQ_CROSS_ENTROPY_H
#define LBQ_CROSS_ENTROPY_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

/* nll (tokens) of logits (tokens, vocab) at target (tokens); sums are accumulated in float64.
 * LBQ_BAD_VALUE for a target outside 0..vocab - 1, or a NaN or +infinity in the row. */
lbq_status lbq_cross_entropy(ptrdiff_t tokens, ptrdiff_t vocab, const float *logits,
                             const int32_t *target, double *nll);

/* kl (tokens) of logits p, q (tokens, vocab), both finite; same[t] is 1 where both have their
 * maximum at the same index (the first, if there are several). */
lbq_status lbq_kl_divergence(ptrdiff_t tokens, ptrdiff_t vocab, const float *p, const float *q,
                             double *kl, uint8_t *same);

#endif
