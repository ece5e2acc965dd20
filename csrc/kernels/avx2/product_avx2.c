/* A small matrix product: tiles of six rows and two vectors stay in 12 registers. */
#include <immintrin.h>

#include "kernels/avx2/avx2.h"

enum { ROWS = 6, VECTORS = 2, COLUMNS = 8 * VECTORS };

static inline __attribute__((always_inline)) void
tile(const int rows, ptrdiff_t k, const float *A, ptrdiff_t lda, const float *B, ptrdiff_t ldb,
     int add, float *C, ptrdiff_t ldc)
{
    __m256 sum[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = add ? _mm256_loadu_ps(C + r * ldc + 8 * v) : _mm256_setzero_ps();
    for (ptrdiff_t i = 0; i < k; i++) {
        const __m256 left = _mm256_loadu_ps(B + i * ldb), right = _mm256_loadu_ps(B + i * ldb + 8);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const __m256 a = _mm256_broadcast_ss(A + r * lda + i);
            sum[r][0] = _mm256_fmadd_ps(a, left, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(a, right, sum[r][1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++)
            _mm256_storeu_ps(C + r * ldc + 8 * v, sum[r][v]);
}

void
lbq_product_f32_avx2(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
                     const float *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    for (ptrdiff_t c = 0; c < n; c += COLUMNS) {
        ptrdiff_t r = 0;
        for (; r + ROWS <= m; r += ROWS)
            tile(ROWS, k, A + r * lda, lda, B + c, ldb, add, C + r * ldc + c, ldc);
        if (r + 3 <= m) {
            tile(3, k, A + r * lda, lda, B + c, ldb, add, C + r * ldc + c, ldc);
            r += 3;
        }
        for (; r < m; r++)
            tile(1, k, A + r * lda, lda, B + c, ldb, add, C + r * ldc + c, ldc);
    }
}
