/* The head and the loss behind it, some tokens at a time: no array of tokens x vocabulary is kept.
 */
#ifndef LBQ_HEAD_BACKWARD_H
#define LBQ_HEAD_BACKWARD_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "linear/backward.h"
#include "transformer/decoder.h"
#include "transformer/loss.h"

/* What a prediction is compared with. */
typedef struct {
    lbq_loss loss;
    const int32_t *target;      /* (tokens), or NULL */
    const double *uniform;      /* (tokens) in [0, 1): targets are drawn with these from the model's
                                   own prediction; NULL: they are given */
    const lbq_decoder *teacher; /* of the same vocabulary, or NULL */
    const float *teacher_hidden; /* (tokens, hidden of the teacher): what its head reads */
    const float *weight;         /* (tokens), or NULL: ones */
} lbq_objective;

/* Of y (tokens, hidden), the output of lbq_decoder_finish: the loss of each token, before its
 * weight; dy = dL/dy is written and gradients of the head (the embedding where there is no head)
 * are added. loss and dy may be NULL. */
lbq_status lbq_head_backward(const lbq_decoder *decoder, const lbq_objective *objective,
                             ptrdiff_t tokens, const float *y, const lbq_linear_gradient *gradient,
                             double *loss, float *dy);

#endif
