/* A small matrix product, of floats or of floats and bytes: tiles of up to six rows and two vectors
 * stay in 12 registers. */
#include <immintrin.h>
#include <stdbool.h>

#include "kernels/avx2/avx2.h"

enum {
    ROWS = 6,
    VECTORS = 2,
    COLUMNS = 8 * VECTORS,
    AHEAD = 4096, /* bytes, as in the AVX-512 kernel */
};

static inline __attribute__((always_inline)) __m256
load(const bool bytes, const void *B, ptrdiff_t at)
{
    if (!bytes)
        return _mm256_loadu_ps((const float *)B + at);
    const __m128i eight = _mm_loadl_epi64((const __m128i *)(const void *)((const char *)B + at));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
}

static inline __attribute__((always_inline)) void
tile(const int rows, const bool bytes, ptrdiff_t k, const float *A, ptrdiff_t lda, const void *B,
     ptrdiff_t at, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    __m256 sum[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = add ? _mm256_loadu_ps(C + r * ldc + 8 * v) : _mm256_setzero_ps();
    for (ptrdiff_t i = 0; i < k; i++, at += ldb) {
        const __m256 left = load(bytes, B, at), right = load(bytes, B, at + 8);
        if (rows < ROWS)
            _mm_prefetch((const char *)B + (bytes ? at : 4 * at) + AHEAD, _MM_HINT_T0);
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

static inline __attribute__((always_inline)) void
product(const bool bytes, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
        const void *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    for (ptrdiff_t c = 0; c < n; c += COLUMNS) {
        ptrdiff_t r = 0;
        for (; r + ROWS <= m; r += ROWS)
            tile(ROWS, bytes, k, A + r * lda, lda, B, c, ldb, add, C + r * ldc + c, ldc);
        const float *const rest = A + r * lda;
        float *const to = C + r * ldc + c;
        switch (m - r) { /* groups of heads are small: the rest makes one pass over B */
        case 5:
            tile(5, bytes, k, rest, lda, B, c, ldb, add, to, ldc);
            break;
        case 4:
            tile(4, bytes, k, rest, lda, B, c, ldb, add, to, ldc);
            break;
        case 3:
            tile(3, bytes, k, rest, lda, B, c, ldb, add, to, ldc);
            break;
        case 2:
            tile(2, bytes, k, rest, lda, B, c, ldb, add, to, ldc);
            break;
        case 1:
            tile(1, bytes, k, rest, lda, B, c, ldb, add, to, ldc);
            break;
        }
    }
}

void
lbq_product_f32_avx2(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
                     const float *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    product(false, m, n, k, A, lda, B, ldb, add, C, ldc);
}

void
lbq_product_i8_f32_avx2(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
                        const int8_t *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    product(true, m, n, k, A, lda, B, ldb, add, C, ldc);
}

void
lbq_widen_i8_avx2(const int8_t *x, ptrdiff_t count, float *y)
{
    for (ptrdiff_t i = 0; i < count; i += 8)
        _mm256_storeu_ps(y + i, load(true, x, i));
}
