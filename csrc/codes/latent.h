/* Latent weights: float32 numbers x that training moves, and that are rounded at each step.
 *
 *     v = (unit x - offset) / scale,   q = the level nearest to v,   w = scale q + offset
 *
 * The way back takes rounding for the identity (Y. Bengio, N. Leonard, A. Courville, "Estimating or
 * propagating gradients through stochastic neurons for conditional computation", 2013), except
 * where it clips: v beyond the outer levels by more than half a step. With i = 1 inside and 0
 * where it clips,
 *
 *     dw/dx = unit i,   dw/dscale = q - i v,   dw/doffset = 1 - i,   dw/dq = scale
 *
 * S. Esser et al., "Learned Step Size Quantization", 2020, equation 3; Y. Bhalgat et al., "LSQ+",
 * 2020, for offsets; M. Chen et al., "EfficientQAT", 2024, which clips after rounding, as here. */
#ifndef LBQ_LATENT_H
#define LBQ_LATENT_H

#include "codes/groups.h"

typedef struct {
    float share;  /* of the rounded weight in w, the rest is unit x: 1, or less while rounding is
                     introduced */
    bool clipped; /* false: dw/dx = unit everywhere */
} lbq_latent;

/* weight (rows, cols) from x (rows, cols) and unit (rows, groups). Ties of a grid go to the even
 * level, of a table to the lower one. */
lbq_status lbq_latent_compose(const lbq_grids *grids, const lbq_latent *how, const float *x,
                              const float *unit, float *weight);

/* The words (rows, cols) of the levels in lbq_latent_compose. */
lbq_status lbq_latent_words(const lbq_grids *grids, const float *x, const float *unit,
                            uint8_t *words);

/* From dW (rows, cols), the gradient by what lbq_latent_compose writes: adds to dx (rows, cols),
 * and sets the others. */
lbq_status lbq_latent_gradient(const lbq_grids *grids, const lbq_latent *how, const float *x,
                               const float *unit, const float *dW, float *dx,
                               const lbq_grid_gradients *gradients);

/* x for float weights W (rows, cols) that were given the words (rows, cols): W / unit, moved to
 * between the ends of lbq_code_start. 0 where unit is 0. */
lbq_status lbq_latent_start(const lbq_grids *grids, const float *W, const uint8_t *words,
                            const float *unit, float *x);

/* Where training may start with a word, as [2]: the positions v within 0.4 of the way to the
 * neighbouring levels, so that it takes some steps in one direction until a word changes. Outer
 * levels have as much outside as inside; equal levels count as one. */
void lbq_code_start(const lbq_code *code, int word, float ends[2]);

#endif
