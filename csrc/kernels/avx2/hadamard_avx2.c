/* Hadamard transforms, eight numbers at a time.
 *
 * A block of up to 64 numbers stays in registers for six stages. Within a register a stage is one
 * shuffle and one exact fma, partner + sign * x. Longer transforms first do the parts that fit in
 * the first-level cache, then passes of radix up to 8. */
#include <immintrin.h>

#include "kernels/avx2/avx2.h"

#define INLINE static inline __attribute__((always_inline))

enum { WIDTH = 8, BLOCK = 8 * WIDTH, CACHED = 4096 };

/* The stages between registers of transforms of `span` registers; v holds count / span of them. */
INLINE void
between(const int count, const ptrdiff_t span, __m256 *v)
{
#pragma GCC unroll 3
    for (int log = 0; log < 3; log++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            if (1 << log < span && !(i >> log & 1)) {
                const __m256 a = v[i], b = v[i + (1 << log)];
                v[i] = _mm256_add_ps(a, b);
                v[i + (1 << log)] = _mm256_sub_ps(a, b);
            }
}

/* The stages within a register, for a transform of length n. */
INLINE __m256
within(const ptrdiff_t n, __m256 x)
{
    static const _Alignas(32) float sign[3][WIDTH] = {
        {1, -1, 1, -1, 1, -1, 1, -1},
        {1, 1, -1, -1, 1, 1, -1, -1},
        {1, 1, 1, 1, -1, -1, -1, -1},
    };
    if (n > 1)
        x = _mm256_fmadd_ps(_mm256_load_ps(sign[0]), x, _mm256_permute_ps(x, 0xb1));
    if (n > 2)
        x = _mm256_fmadd_ps(_mm256_load_ps(sign[1]), x, _mm256_permute_ps(x, 0x4e));
    if (n > 4)
        x = _mm256_fmadd_ps(_mm256_load_ps(sign[2]), x, _mm256_permute2f128_ps(x, x, 1));
    return x;
}

/* x <- after o (H (before o x)) for the transforms of length n in `count` registers. */
INLINE void
block(const int count, const ptrdiff_t n, const float *before, const float *after, float *x)
{
    __m256 v[8];
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
        v[i] = _mm256_loadu_ps(x + i * WIDTH);
    if (before)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            v[i] = _mm256_mul_ps(v[i], _mm256_loadu_ps(before + i * WIDTH));
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
        v[i] = within(n, v[i]);
    between(count, n / WIDTH, v);
    if (after)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            v[i] = _mm256_mul_ps(v[i], _mm256_loadu_ps(after + i * WIDTH));
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
        _mm256_storeu_ps(x + i * WIDTH, v[i]);
}

/* The stages of distance, 2 distance, ..., radix distance / 2 of x (n). */
INLINE void
pass(const int radix, ptrdiff_t n, ptrdiff_t distance, const float *after, float *x)
{
    for (ptrdiff_t from = 0; from < n; from += radix * distance)
        for (ptrdiff_t at = from; at < from + distance; at += WIDTH) {
            __m256 v[8];
#pragma GCC unroll 8
            for (int i = 0; i < radix; i++)
                v[i] = _mm256_loadu_ps(x + at + i * distance);
            between(radix, radix, v);
            if (after)
#pragma GCC unroll 8
                for (int i = 0; i < radix; i++)
                    v[i] = _mm256_mul_ps(v[i], _mm256_loadu_ps(after + at + i * distance));
#pragma GCC unroll 8
            for (int i = 0; i < radix; i++)
                _mm256_storeu_ps(x + at + i * distance, v[i]);
        }
}

/* All stages from `distance` to n / 2, in as few passes as radix 8 allows. */
static void
passes(ptrdiff_t n, ptrdiff_t distance, const float *after, float *x)
{
    int stages = 0;
    for (ptrdiff_t ratio = n / distance; ratio > 1; ratio /= 2)
        stages++;
    for (int left = (stages + 2) / 3; left > 0; left--) {
        const int log = (stages + left - 1) / left;
        const float *const then = left == 1 ? after : NULL;
        switch (log) {
        case 1:
            pass(2, n, distance, then, x);
            break;
        case 2:
            pass(4, n, distance, then, x);
            break;
        default:
            pass(8, n, distance, then, x);
        }
        stages -= log;
        distance <<= log;
    }
}

/* The first `count` lanes of a register, or all of them. */
INLINE __m256i
first_lanes(ptrdiff_t count)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count < WIDTH ? (int)count : WIDTH), lane);
}

/* All transforms of length n <= BLOCK in x (total), as many at a time as fill the registers. */
INLINE void
blocks(const ptrdiff_t n, ptrdiff_t total, const float *before, const float *after, float *x)
{
    const int least = n < WIDTH ? 1 : (int)(n / WIDTH);
    ptrdiff_t at = 0;
    for (; at + BLOCK <= total; at += BLOCK)
        block(BLOCK / WIDTH, n, before ? before + at : NULL, after ? after + at : NULL, x + at);
    for (; at + least * WIDTH <= total; at += least * WIDTH)
        block(least, n, before ? before + at : NULL, after ? after + at : NULL, x + at);
    if (at < total) {
        const __m256i mask = first_lanes(total - at);
        __m256 v = _mm256_maskload_ps(x + at, mask);
        if (before)
            v = _mm256_mul_ps(v, _mm256_maskload_ps(before + at, mask));
        v = within(n, v);
        if (after)
            v = _mm256_mul_ps(v, _mm256_maskload_ps(after + at, mask));
        _mm256_maskstore_ps(x + at, mask, v);
    }
}

/* One transform of length n > BLOCK. */
static void
transform(ptrdiff_t n, const float *before, const float *after, float *x)
{
    const ptrdiff_t part = n > CACHED ? CACHED : BLOCK;
    if (part == BLOCK)
        blocks(BLOCK, n, before, NULL, x);
    else
        for (ptrdiff_t at = 0; at < n; at += part)
            transform(part, before ? before + at : NULL, NULL, x + at);
    passes(n, part, after, x);
}

void
lbq_hadamard_sylvester_avx2(ptrdiff_t n, ptrdiff_t count, const float *before, const float *after,
                            float *x)
{
    const ptrdiff_t total = n * count;
    switch (n) {
    case 1:
        blocks(1, total, before, after, x);
        break;
    case 2:
        blocks(2, total, before, after, x);
        break;
    case 4:
        blocks(4, total, before, after, x);
        break;
    case 8:
        blocks(8, total, before, after, x);
        break;
    case 16:
        blocks(16, total, before, after, x);
        break;
    case 32:
        blocks(32, total, before, after, x);
        break;
    case 64:
        blocks(64, total, before, after, x);
        break;
    default:
        for (ptrdiff_t at = 0; at < total; at += n)
            transform(n, before ? before + at : NULL, after ? after + at : NULL, x + at);
    }
}

/* `rows` columns of A times the rows in scratch (order, 8 vectors), the last register masked. */
INLINE void
tile(const int rows, const int vectors, const float *A, ptrdiff_t order, const float *scratch,
     __m256i last, ptrdiff_t lanes, const float *after, float *x)
{
    __m256 sum[6][2];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            sum[i][v] = _mm256_setzero_ps();
    for (ptrdiff_t j = 0; j < order; j++) {
        __m256 column[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            column[v] = _mm256_load_ps(scratch + (j * vectors + v) * WIDTH);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            const __m256 b = _mm256_set1_ps(A[j * order + i]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                sum[i][v] = _mm256_fmadd_ps(b, column[v], sum[i][v]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const __m256i mask = v == vectors - 1 ? last : _mm256_set1_epi32(-1);
            const ptrdiff_t at = i * lanes + v * WIDTH;
            if (after)
                sum[i][v] = _mm256_mul_ps(sum[i][v], _mm256_maskload_ps(after + at, mask));
            _mm256_maskstore_ps(x + at, mask, sum[i][v]);
        }
}

/* Up to `vectors` registers of lanes: copies their columns to scratch, then multiplies by tiles of
 * columns of A. */
INLINE void
lane_block(const int vectors, const float *A, ptrdiff_t order, ptrdiff_t lanes, __m256i last,
           const float *before, const float *after, float *x, float *scratch)
{
    for (ptrdiff_t j = 0; j < order; j++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const __m256i mask = v == vectors - 1 ? last : _mm256_set1_epi32(-1);
            const ptrdiff_t at = j * lanes + v * WIDTH;
            __m256 column = _mm256_maskload_ps(x + at, mask);
            if (before)
                column = _mm256_mul_ps(column, _mm256_maskload_ps(before + at, mask));
            _mm256_store_ps(scratch + (j * vectors + v) * WIDTH, column);
        }
#define TILES(rows)                                                                                \
    for (; i + rows <= order; i += rows)                                                           \
    tile(rows,                                                                                     \
         vectors,                                                                                  \
         A + i,                                                                                    \
         order,                                                                                    \
         scratch,                                                                                  \
         last,                                                                                     \
         lanes,                                                                                    \
         after ? after + i * lanes : NULL,                                                         \
         x + i * lanes)
    ptrdiff_t i = 0;
    TILES(6);
    TILES(2);
    TILES(1);
#undef TILES
}

void
lbq_hadamard_base_avx2(const float *A, ptrdiff_t order, ptrdiff_t lanes, const float *before,
                       const float *after, float *x, float *scratch)
{
#define LANES(vectors, last)                                                                       \
    lane_block(vectors,                                                                            \
               A,                                                                                  \
               order,                                                                              \
               lanes,                                                                              \
               last,                                                                               \
               before ? before + at : NULL,                                                        \
               after ? after + at : NULL,                                                          \
               x + at,                                                                             \
               scratch)
    ptrdiff_t at = 0;
    for (; at + 2 * WIDTH <= lanes; at += 2 * WIDTH)
        LANES(2, _mm256_set1_epi32(-1));
    for (; at < lanes; at += WIDTH)
        LANES(1, first_lanes(lanes - at));
#undef LANES
}
