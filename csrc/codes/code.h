/* Scalar codes: how integers stand for weights, and how a group's scale and offset are found.
 *
 *     w ~ scale * level[code] + offset
 *
 * A uniform code has the levels 0, 1, ..., count - 1; the others have a table. A symmetric code
 * stores no offset: it is -zero * scale. Binary (-1, +1) and ternary (-1, 0, +1) are the uniform
 * codes with count 2 and zero 1/2, count 3 and zero 1: the search below finds the mean of |w|
 * for the first, threshold and mean of what exceeds it for the second. */
#ifndef LBQ_CODE_H
#define LBQ_CODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/packed.h"
#include "core/status.h"

enum { LBQ_MAX_LEVELS = 16 }; /* of a table */

typedef struct {
    int count;      /* number of levels, 2 to 256 */
    bool symmetric; /* offset = -zero * scale, not fitted */
    float zero;
    const float *levels; /* count <= 16 ascending values; NULL: uniform */
    int scale_bits;      /* what scales and offsets are rounded to. 16: float16. 8 or 4: whole
                            multiples of gamma from 1 to 2^scale_bits - 1. 0: float32 */
    float gamma;         /* 0: not chosen yet, scales stay float32 */
} lbq_code;

/* How the range of a group is chosen. */
typedef enum {
    LBQ_RANGE_MINMAX,     /* the smallest range that clips nothing, times `clip` */
    LBQ_RANGE_PERCENTILE, /* the same for the values between two percentiles */
    LBQ_RANGE_MSE,        /* of `candidates` shrunken ranges the one with the least
                             sum importance |w - q|^norm, then scale and offset refitted by least
                             squares while that lowers it; never worse than minmax */
} lbq_range_method;

/* "minmax", "percentile", "mse"; LBQ_BAD_VALUE for another name. */
lbq_status lbq_range_method_find(const char *name, lbq_range_method *method);

typedef struct {
    lbq_range_method method;
    double clip;       /* MINMAX, PERCENTILE: the part of the range that is kept, usually 1 */
    double percentile; /* PERCENTILE: 50 to 100, clips this tail on both sides */
    int candidates;    /* MSE: shrink factors 1, 1 - shrink / candidates, ... */
    double shrink;     /* MSE: the smallest factor is just above 1 - shrink */
    double norm;       /* MSE: the exponent; 2 is fast, GPTQ's code uses 2.4 */
} lbq_range;

/* LBQ_BAD_VALUE unless the fields of a code fit together. */
lbq_status lbq_code_check(const lbq_code *code);

/* LBQ_PANEL groups of weights, one in each lane, or one long group spread over all lanes. */
typedef struct {
    float *w;                /* (count, LBQ_PANEL), finite; overwritten by the search */
    const float *importance; /* alike, shares as in codes/importance.h, or NULL */
    ptrdiff_t count;
    bool together; /* the lanes are parts of one group */
    int rest;      /* together: the first `rest` lanes hold one extra weight, stored after the
                      others; in the other lanes w is finite there and importance 0 */
    const float *low, *high; /* minimum and maximum of each group, or NULL */
} lbq_groups;

/* Scales and offsets (LBQ_PANEL) of groups, rounded to what is stored. MINMAX and PERCENTILE round
 * outwards, so that rounding clips nothing. A scale is at least the smallest that can be stored; a
 * symmetric code to which zeros are nearer than that grid, as it has no level of 0, gets scale 0.
 * MSE gives other codes to which zeros are nearer the smallest scale and offset 0. float16 ends at
 * 65504, where scale and offset saturate. */
void lbq_code_fit(const lbq_code *code, const lbq_range *range, const lbq_groups *groups,
                  float *scale, float *offset);

/* Grids over given ranges [low, high], `clip` of which is kept, as MINMAX fits them before it is
 * compared with zeros. */
void lbq_range_fit(const lbq_code *code, double clip, const float *low, const float *high,
                   float *scale, float *offset);

/* The code of the nearest value; ties go to the even code. 0 if scale is 0. */
uint8_t lbq_code_encode(const lbq_code *code, double w, double scale, double offset);

/* scale * level + offset. */
double lbq_code_decode(const lbq_code *code, uint8_t value, double scale, double offset);

/* LBQ_BAD_VALUE for a NaN or infinity in W, and for a weight that no scale of `scale_bits` reaches,
 * naming row and column. */
lbq_status lbq_check_weights(int scale_bits, ptrdiff_t rows, ptrdiff_t cols, const float *W);

/* Rounds W (rows, cols) group by group, rows in parallel: codes (rows, cols), scale and offset
 * (rows, groups) with groups = ceil(cols / group). `fixed`: scale and offset are given, not
 * fitted. LBQ_BAD_VALUE as lbq_check_weights and lbq_importance_shares have it, and for a code
 * whose fields do not fit together. */
lbq_status lbq_quantize(const lbq_code *code, const lbq_range *range, ptrdiff_t rows,
                        ptrdiff_t cols, ptrdiff_t group, bool fixed, const float *W,
                        const float *importance /* (cols) or NULL */, uint8_t *codes, float *scale,
                        float *offset);

/* The same into the packed layout, `panels` of lbq_packed_geometry_of(packed) bytes: bit for bit
 * lbq_pack of what lbq_quantize gives. rows, cols, group and how scales and offsets are stored are
 * those of `packed`, which fit those of `code`; where the whole matrix has one scale, it is given,
 * gamma and zero. */
lbq_status lbq_quantize_packed(const lbq_code *code, const lbq_range *range,
                               const lbq_packed *packed, const float *W,
                               const float *importance /* (cols) or NULL */, uint8_t *panels);

/* The table of NF4 (count 16), or `count` = 2^b signed powers of two: 0, +-1, +-1/2, ...; as many
 * negative as positive ones, but for one more, the smallest, above zero. */
void lbq_levels_nf4(float *levels);
void lbq_levels_log(int count, float *levels);

/* How many of the `bins` bins of a histogram of |x| to keep so that `levels` equal steps over them
 * lose the least information (Kullback-Leibler divergence of the quantized histogram from the
 * clipped one); of equals the most. LBQ_BAD_VALUE for an empty histogram. */
lbq_status lbq_entropy_range(const double *counts, int bins, int levels, int *kept);

/* The `count` levels, ascending, with the least sum weights (values - nearest level)^2. Exact up
 * to 2048 values; above, exact for as many bins of equal population and then refined by Lloyd's
 * iteration on all values. weights (n), positive, or NULL. LBQ_BAD_VALUE for a NaN. */
lbq_status lbq_kmeans(ptrdiff_t n, const double *values, const double *weights, int count,
                      double *levels);

#endif
