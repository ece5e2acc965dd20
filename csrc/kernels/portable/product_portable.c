/* A small matrix product, four rows and sixteen columns at a time. */
#include "kernels/portable/portable.h"

enum { ROWS = 4, COLUMNS = 16 };

static inline void
tile(int rows, ptrdiff_t k, const float *A, ptrdiff_t lda, const float *B, ptrdiff_t ldb, int add,
     float *C, ptrdiff_t ldc)
{
    float sum[ROWS][COLUMNS] = {0};
    for (ptrdiff_t i = 0; i < k; i++)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < COLUMNS; c++)
                sum[r][c] += A[r * lda + i] * B[i * ldb + c];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < COLUMNS; c++)
            C[r * ldc + c] = add ? C[r * ldc + c] + sum[r][c] : sum[r][c];
}

void
lbq_product_f32_portable(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
                         const float *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    for (ptrdiff_t c = 0; c < n; c += COLUMNS) {
        ptrdiff_t r = 0;
        for (; r + ROWS <= m; r += ROWS)
            tile(ROWS, k, A + r * lda, lda, B + c, ldb, add, C + r * ldc + c, ldc);
        for (; r < m; r++)
            tile(1, k, A + r * lda, lda, B + c, ldb, add, C + r * ldc + c, ldc);
    }
}
