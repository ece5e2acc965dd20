/* A packed matrix: where its words lie (core/packed.h) and what they stand for (codes/code.h). */
#ifndef LBQ_MATRIX_H
#define LBQ_MATRIX_H

#include "codes/code.h"

typedef struct {
    lbq_packed packed;
    const lbq_code *code;
} lbq_matrix;

/* Of the strip that begins with panel `panel`, over the steps from `first` to `end`: the bytes that
 * stand for levels, as [panel][step - first][k / 4][r][k % 4]. */
void lbq_matrix_bytes(const lbq_matrix *matrix, const lbq_packed_geometry *geometry,
                      ptrdiff_t panel, ptrdiff_t first, ptrdiff_t end, uint8_t *bytes);

/* Its values in the columns of step `step` that the matrix has: w[k * stride + r]. */
void lbq_matrix_values(const lbq_matrix *matrix, const lbq_packed_geometry *geometry,
                       ptrdiff_t panel, ptrdiff_t step, ptrdiff_t stride, float *w);

/* W (rows, cols), each weight fma(scale, level, offset) rounded once. */
lbq_status lbq_matrix_dequantize(const lbq_matrix *matrix, float *weight);

/* weight (count, cols): rows row[0], row[1], ... of W, each from 0 to rows - 1, with the same bits.
 */
lbq_status lbq_matrix_rows(const lbq_matrix *matrix, ptrdiff_t count, const int32_t *row,
                           float *weight);

#endif
