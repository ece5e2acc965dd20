/* Scalar codes: how integers stand for weights, and how a group's scale and offset are found.
 *
 *     w ~ scale * level[code] + offset
 *
 * A uniform code has the levels 0, 1, ..., count - 1; the others have a table. A symmetric code
 * stores no offset: it is -zero * scale. Binary (levels -1, +1) and ternary (-1, 0, +1) are the
 * uniform codes with count 2 and zero 1/2, count 3 and zero 1, that have their own fits. */
#ifndef LBQ_CODE_H
#define LBQ_CODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

typedef struct {
    int count;      /* number of levels, 2 to 256 */
    bool symmetric; /* offset = -zero * scale, not fitted */
    float zero;
    const float *levels; /* count ascending values; NULL: uniform */
} lbq_code;

/* How the range of a group is chosen. */
typedef enum {
    LBQ_RANGE_MINMAX,     /* the smallest range that clips nothing */
    LBQ_RANGE_PERCENTILE, /* minmax of the values between two percentiles */
    LBQ_RANGE_MSE,        /* of `candidates` shrunken ranges the one with the least
                             sum importance |w - q|^norm, then the scale and offset refitted */
} lbq_range_method;

typedef struct {
    lbq_range_method method;
    double percentile; /* 50 to 100: clips this tail on both sides */
    int candidates;    /* MSE: shrink factors 1, 1 - shrink / candidates, ... */
    double shrink;     /* MSE: the smallest factor is 1 - shrink */
    double norm;       /* MSE: the exponent, 2 or 2.4 */
} lbq_range;

/* Scale and offset of one group of `count` values w, both rounded to float16 (`stored_half`) or
 * left in float32; `importance` (count) or NULL weighs squared errors. Never yields a scale of
 * zero: a group of zeros gets the smallest normal float16, and codes that decode to zero or the
 * nearest level. */
void lbq_code_fit(const lbq_code *code, const lbq_range *range, ptrdiff_t count, const double *w,
                  const double *importance, bool stored_half, double *scale, double *offset);

/* The code of the nearest value; ties go to the even code. */
uint8_t lbq_code_encode(const lbq_code *code, double w, double scale, double offset);

/* scale * level + offset. */
double lbq_code_decode(const lbq_code *code, uint8_t value, double scale, double offset);

/* Rounds W (rows, cols) group by group, rows in parallel: codes (rows, cols), scale and offset
 * (rows, groups) with groups = ceil(cols / group). `fixed`: scale and offset are given, not
 * fitted. LBQ_BAD_VALUE for a NaN or infinity in W, naming row and column. */
lbq_status lbq_quantize(const lbq_code *code, const lbq_range *range, ptrdiff_t rows,
                        ptrdiff_t cols, ptrdiff_t group, bool fixed, bool stored_half,
                        const float *W, const float *importance /* (cols) or NULL */,
                        uint8_t *codes, float *scale, float *offset);

#endif
