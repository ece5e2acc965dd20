/* Scales and offsets of LBQ_PANEL groups as they are stored: float16, float32, or multiples of
 * unit. */
#ifndef LBQ_STORED_H
#define LBQ_STORED_H

#include "codes/code.h"
#include "kernels/kernels.h"

/* Where to round: not above x, next to x, not below x. */
enum { LBQ_DOWN = -1, LBQ_NEAREST, LBQ_UP };

/* Stored scales up to this one are coarse: rounding may have made a grid worse than zeros. The
 * smallest that can be stored; with float16 offsets, which are rounded too, the first eight. */
float lbq_coarse_scale(const lbq_code *code);

/* Whether any of LBQ_PANEL scales is. */
bool lbq_any_coarse(const lbq_code *code, const float *scale);

/* In place. A lone float32 offset is kept as the zero of the matrix, -zero * scale. */
void lbq_store_scales(const lbq_code *code, int direction, double *scale);
void lbq_store_offsets(const lbq_code *code, const double *scale, int direction, double *offset);

/* Fits a code whose levels have this standard deviation to that of groups about zero. */
void lbq_fit_deviation(const lbq_code *code, const lbq_groups *groups, double deviation,
                       float *scale, float *offset);

/* How float16 grids of the code cover a part `clip` of ranges. */
lbq_cover lbq_cover_of(const lbq_code *code, double clip);

/* The finest grids over [low, high], not rounded. */
void lbq_grids_over(const lbq_code *code, const double *low, const double *high, double *scale,
                    double *offset);

#endif
