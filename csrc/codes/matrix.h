/* A packed matrix: where its words lie (core/packed.h) and what they stand for (codes/code.h). */
#ifndef LBQ_MATRIX_H
#define LBQ_MATRIX_H

#include "codes/code.h"

typedef struct {
    lbq_packed packed;
    const lbq_code *code;
} lbq_matrix;

/* Of the strip that begins with panel `panel`, over the steps from `first` to `end`: its words, as
 * [panel][step - first][k / 4][r][k % 4]; and alike the bytes that stand for levels. */
void lbq_matrix_words(const lbq_matrix *matrix, const lbq_packed_geometry *geometry,
                      ptrdiff_t panel, ptrdiff_t first, ptrdiff_t end, uint8_t *words);
void lbq_matrix_bytes(const lbq_matrix *matrix, const lbq_packed_geometry *geometry,
                      ptrdiff_t panel, ptrdiff_t first, ptrdiff_t end, uint8_t *bytes);

/* Its values in the columns of step `step` that the matrix has: w[k * stride + r]. */
void lbq_matrix_values(const lbq_matrix *matrix, const lbq_packed_geometry *geometry,
                       ptrdiff_t panel, ptrdiff_t step, ptrdiff_t stride, float *w);

/* The same with scales and offsets, as [2][rows of the strip], instead of those stored. */
void lbq_matrix_decode(const lbq_matrix *matrix, const lbq_packed_geometry *geometry,
                       ptrdiff_t panel, ptrdiff_t step, const float *lanes, ptrdiff_t stride,
                       float *w);

/* Scales in a row: one for each group of columns; 1 where a row or the matrix has one. */
static inline ptrdiff_t
lbq_matrix_groups(const lbq_matrix *matrix)
{
    return (matrix->packed.cols - 1) / matrix->packed.group + 1;
}

/* The group that the columns of a step belong to. */
static inline ptrdiff_t
lbq_matrix_group_of(const lbq_matrix *matrix, ptrdiff_t step)
{
    return matrix->packed.group < matrix->packed.cols ? step : 0;
}

/* W (rows, cols), each weight fma(scale, level, offset) rounded once. */
lbq_status lbq_matrix_dequantize(const lbq_matrix *matrix, float *weight);

/* The same with scale and offset (rows, groups) instead of those stored, which need not be values
 * that can be stored; offset NULL: -zero * scale. */
lbq_status lbq_matrix_compose(const lbq_matrix *matrix, const float *scale, const float *offset,
                              float *weight);

/* weight (count, cols): rows row[0], row[1], ... of W, each from 0 to rows - 1, with the same bits.
 */
lbq_status lbq_matrix_rows(const lbq_matrix *matrix, ptrdiff_t count, const int32_t *row,
                           float *weight);

#endif
