/* Rounds a matrix to nearest, strip by strip, with any code. */
#ifndef LBQ_QUANTIZE_H
#define LBQ_QUANTIZE_H

#include "codes/code.h"

/* Rounds W (rows, cols) group by group, rows in parallel, to codes (padded to whole blocks), scale
 * and offset (rows, groups) with groups = ceil(cols / group). `fixed`: scale and offset are given,
 * not fitted. codes NULL: only scale and offset are computed. LBQ_BAD_VALUE as for
 * lbq_check_weights and lbq_check_importance. */
lbq_status lbq_quantize(const lbq_code *code, const lbq_search *search, ptrdiff_t rows,
                        ptrdiff_t cols, ptrdiff_t group, bool fixed, const float *W,
                        const float *importance /* (cols) or NULL */, uint8_t *codes, float *scale,
                        float *offset);

/* The same in the packed layout, bit for bit lbq_pack of the result of lbq_quantize; `panels` has
 * lbq_packed_geometry_of(packed) bytes. `packed` is a layout of the code; if the whole matrix has
 * one scale, its unit and zero are given, not fitted. */
lbq_status lbq_quantize_packed(const lbq_code *code, const lbq_search *search,
                               const lbq_packed *packed, const float *W,
                               const float *importance /* (cols) or NULL */, uint8_t *panels);

#endif
