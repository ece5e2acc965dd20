/* A matrix rounded to nearest, strip by strip, with any code. */
#ifndef LBQ_QUANTIZE_H
#define LBQ_QUANTIZE_H

#include "codes/code.h"

/* Rounds W (rows, cols) group by group, rows in parallel: codes, padded to whole blocks, scale and
 * offset (rows, groups) with groups = ceil(cols / group). `fixed`: scale and offset are given, not
 * fitted; codes NULL: only they are wanted. LBQ_BAD_VALUE for a NaN or infinity in W, naming row
 * and column, and for a weight that no float16 scale reaches. */
lbq_status lbq_quantize(const lbq_code *code, const lbq_search *search, ptrdiff_t rows,
                        ptrdiff_t cols, ptrdiff_t group, bool fixed, const float *W,
                        const float *importance /* (cols) or NULL */, uint8_t *codes, float *scale,
                        float *offset);

/* The same into the packed layout, `panels` of lbq_packed_geometry_of(packed) bytes: bit for bit
 * lbq_pack of what lbq_quantize gives. `packed` is a layout of the code; where the whole matrix has
 * one scale, it is given, unit and zero. */
lbq_status lbq_quantize_packed(const lbq_code *code, const lbq_search *search,
                               const lbq_packed *packed, const float *W,
                               const float *importance /* (cols) or NULL */, uint8_t *panels);

#endif
