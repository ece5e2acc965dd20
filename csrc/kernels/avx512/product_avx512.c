/* A small matrix product, of floats or of floats and bytes: tiles of up to six rows and four
 * vectors stay in 24 registers, where each step takes ten loads for its 24 products. */
#include <immintrin.h>
#include <stdbool.h>

#include "kernels/avx512/avx512.h"

enum {
    ROWS = 6,
    VECTORS = 4,
    AHEAD = 4096 /* bytes: the hardware prefetcher stops at page ends */
};

static inline __attribute__((always_inline)) __m512
load(const bool bytes, const void *B, ptrdiff_t at)
{
    if (!bytes)
        return _mm512_loadu_ps((const float *)B + at);
    const __m128i sixteen = _mm_loadu_si128((const __m128i *)(const void *)((const char *)B + at));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
}

static inline __attribute__((always_inline)) void
prefetch(const bool bytes, const void *B, ptrdiff_t at)
{
    _mm_prefetch((const char *)B + (bytes ? 1 : (ptrdiff_t)sizeof(float)) * at + AHEAD,
                 _MM_HINT_T0);
}

/* Fewer rows than a tile mostly belong to one token, which reads keys and values once, straight
 * from memory. */
static inline __attribute__((always_inline)) void
tile(const int rows, const int vectors, const bool bytes, ptrdiff_t k, const float *A,
     ptrdiff_t lda, const void *B, ptrdiff_t at, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[r][v] = add ? _mm512_loadu_ps(C + r * ldc + 16 * v) : _mm512_setzero_ps();
    for (ptrdiff_t i = 0; i < k; i++, at += ldb) {
        __m512 b[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            b[v] = load(bytes, B, at + 16 * v);
            if (rows < ROWS && (v == 0 || !bytes))
                prefetch(bytes, B, at + 16 * v);
        }
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
columns(const int vectors, const bool bytes, ptrdiff_t m, ptrdiff_t k, const float *A,
        ptrdiff_t lda, const void *B, ptrdiff_t at, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    ptrdiff_t r = 0;
    for (; r + ROWS <= m; r += ROWS)
        tile(ROWS, vectors, bytes, k, A + r * lda, lda, B, at, ldb, add, C + r * ldc, ldc);
    const float *const rest = A + r * lda;
    float *const to = C + r * ldc;
    switch (m - r) { /* groups of heads are small: the rest makes one pass over B */
    case 5:
        tile(5, vectors, bytes, k, rest, lda, B, at, ldb, add, to, ldc);
        break;
    case 4:
        tile(4, vectors, bytes, k, rest, lda, B, at, ldb, add, to, ldc);
        break;
    case 3:
        tile(3, vectors, bytes, k, rest, lda, B, at, ldb, add, to, ldc);
        break;
    case 2:
        tile(2, vectors, bytes, k, rest, lda, B, at, ldb, add, to, ldc);
        break;
    case 1:
        tile(1, vectors, bytes, k, rest, lda, B, at, ldb, add, to, ldc);
        break;
    }
}

static inline __attribute__((always_inline)) void
product(const bool bytes, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
        const void *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    ptrdiff_t c = 0;
    for (; c + 16 * VECTORS <= n; c += 16 * VECTORS)
        columns(VECTORS, bytes, m, k, A, lda, B, c, ldb, add, C + c, ldc);
    for (; c < n; c += 16)
        columns(1, bytes, m, k, A, lda, B, c, ldb, add, C + c, ldc);
}

void
lbq_product_f32_avx512(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
                       const float *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    product(false, m, n, k, A, lda, B, ldb, add, C, ldc);
}

void
lbq_product_i8_f32_avx512(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda,
                          const int8_t *B, ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc)
{
    product(true, m, n, k, A, lda, B, ldb, add, C, ldc);
}

void
lbq_widen_i8_avx512(const int8_t *x, ptrdiff_t count, float *y)
{
    for (ptrdiff_t i = 0; i < count; i += 16)
        _mm512_storeu_ps(y + i, load(true, x, i));
}
