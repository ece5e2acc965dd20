/* A small matrix product: tiles of six rows and four vectors stay in 24 registers, where each
 * step takes ten loads for its 24 products. */
#include <immintrin.h>

#include "kernels/avx512/avx512.h"

enum { ROWS = 6, VECTORS = 4 };

static inline __attribute__((always_inline)) void
tile(const int rows, const int vectors, ptrdiff_t k, const float *A, ptrdiff_t lda, const float *B,
     ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[r][v] = add ? _mm512_loadu_ps(C + r * ldc + 16 * v) : _mm512_setzero_ps();
    for (ptrdiff_t i = 0; i < k; i++) {
        __m512 b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            b[v] = _mm512_loadu_ps(B + i * ldb + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const __m512 a = _mm512_set1_ps(A[r * lda + i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sum[r][v] = _mm512_fmadd_ps(a, b[v], sum[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(C + r * ldc + 16 * v, sum[r][v]);
}

static inline __attribute__((always_inline)) void
columns(const int vectors, ptrdiff_t m, ptrdiff_t k, const float *A, ptrdiff_t lda, const float *B,
        ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    ptrdiff_t r = 0;
    for (; r + ROWS <= m; r += ROWS)
        tile(ROWS, vectors, k, A + r * lda, lda, B, ldb, add, C + r * ldc, ldc);
    if (r + 3 <= m) {
        tile(3, vectors, k, A + r * lda, lda, B, ldb, add, C + r * ldc, ldc);
        r += 3;
    }
    for (; r < m; r++)
        tile(1, vectors, k, A + r * lda, lda, B, ldb, add, C + r * ldc, ldc);
}

void
lbq_product_f32_avx512(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
                       const float *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    ptrdiff_t c = 0;
    for (; c + 16 * VECTORS <= n; c += 16 * VECTORS)
        columns(VECTORS, m, k, A, lda, B + c, ldb, add, C + c, ldc);
    for (; c < n; c += 16)
        columns(1, m, k, A, lda, B + c, ldb, add, C + c, ldc);
}
