/* A small matrix product, four rows and sixteen columns at a time, of floats or of floats and
 * bytes. */
#include <stdbool.h>

#include "kernels/portable/portable.h"

enum { ROWS = 4, COLUMNS = 16 };

static inline __attribute__((always_inline)) void
tile(int rows, bool bytes, ptrdiff_t k, const float *A, ptrdiff_t lda, const void *B, ptrdiff_t at,
     ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    float sum[ROWS][COLUMNS] = {0};
    for (ptrdiff_t i = 0; i < k; i++, at += ldb) {
        float b[COLUMNS];
        for (int c = 0; c < COLUMNS; c++)
            b[c] = bytes ? (float)((const int8_t *)B)[at + c] : ((const float *)B)[at + c];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < COLUMNS; c++)
                sum[r][c] += A[r * lda + i] * b[c];
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < COLUMNS; c++)
            C[r * ldc + c] = add ? C[r * ldc + c] + sum[r][c] : sum[r][c];
}

static inline __attribute__((always_inline)) void
product(bool bytes, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
        const void *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    for (ptrdiff_t c = 0; c < n; c += COLUMNS) {
        ptrdiff_t r = 0;
        for (; r + ROWS <= m; r += ROWS)
            tile(ROWS, bytes, k, A + r * lda, lda, B, c, ldb, add, C + r * ldc + c, ldc);
        for (; r < m; r++)
            tile(1, bytes, k, A + r * lda, lda, B, c, ldb, add, C + r * ldc + c, ldc);
    }
}

void
lbq_product_f32_portable(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
                         const float *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    product(false, m, n, k, A, lda, B, ldb, add, C, ldc);
}

void
lbq_product_i8_f32_portable(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
                            const int8_t *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    product(true, m, n, k, A, lda, B, ldb, add, C, ldc);
}

void
lbq_widen_i8_portable(const int8_t *x, ptrdiff_t count, float *y)
{
    for (ptrdiff_t i = 0; i < count; i++)
        y[i] = x[i];
}
