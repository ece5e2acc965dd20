/* Scales and offsets of LBQ_PANEL groups in stored form: float16, float32, or multiples of unit. */
#ifndef LBQ_STORED_H
#define LBQ_STORED_H

#include "codes/code.h"
#include "kernels/kernels.h"

/* Rounding direction. */
enum { LBQ_DOWN = -1, LBQ_NEAREST, LBQ_UP };

/* Stored scales up to this one are coarse: rounding may have made the grid worse than zeros. The
 * smallest scale; with float16 offsets, which are rounded too, the eighth smallest. */
float lbq_coarse_scale(const lbq_code *code);

/* Whether any of LBQ_PANEL scales is coarse. */
bool lbq_any_coarse(const lbq_code *code, const float *scale);

/* Round to stored form, in place. A float32 offset is stored as the zero of the matrix: -zero *
 * scale. */
void lbq_store_scales(const lbq_code *code, int direction, double *scale);
void lbq_store_offsets(const lbq_code *code, const double *scale, int direction, double *offset);

/* Scales a code whose levels have standard deviation `deviation` to that of the groups, about
 * zero. A float16 scale may be 0. */
void lbq_fit_deviation(const lbq_code *code, const lbq_groups *groups, double deviation,
                       float *scale, float *offset);

/* How float16 grids of the code cover ranges times `clip`. */
lbq_cover lbq_cover_of(const lbq_code *code, double clip);

/* The finest grids over [low, high], unrounded. */
void lbq_grids_over(const lbq_code *code, const double *low, const double *high, double *scale,
                    double *offset);

#endif
