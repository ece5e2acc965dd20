/* Hadamard transforms, sixteen numbers at a time.
 *
 * A block of up to 256 numbers stays in registers for eight stages. Within a register a stage is
 * one shuffle and one exact fma, partner + sign * x; transposing 16 x 16 instead costs the same
 * shuffles. Longer transforms first do the parts that fit in the first-level cache, then passes of
 * radix up to 16. */
#include <immintrin.h>

#include "kernels/avx512/avx512.h"
#include "kernels/avx512/lanes_avx512.h"

#define INLINE static inline __attribute__((always_inline))

enum { WIDTH = 16, BLOCK = 16 * WIDTH, CACHED = 4096 };

/* The stages between registers of transforms of `span` registers; v holds count / span of them. */
INLINE void
between(const int count, const ptrdiff_t span, __m512 *v)
{
#pragma GCC unroll 4
    for (int log = 0; log < 4; log++)
#pragma GCC unroll 16
        for (int i = 0; i < count; i++)
            if (1 << log < span && !(i >> log & 1)) {
                const __m512 a = v[i], b = v[i + (1 << log)];
                v[i] = _mm512_add_ps(a, b);
                v[i + (1 << log)] = _mm512_sub_ps(a, b);
            }
}

/* The stages within a register, for a transform of length n. */
INLINE __m512
within(const ptrdiff_t n, __m512 x)
{
    static const _Alignas(64) float sign[4][WIDTH] = {
        {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
        {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
        {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
        {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
    };
    if (n > 1)
        x = _mm512_fmadd_ps(_mm512_load_ps(sign[0]), x, _mm512_permute_ps(x, 0xb1));
    if (n > 2)
        x = _mm512_fmadd_ps(_mm512_load_ps(sign[1]), x, _mm512_permute_ps(x, 0x4e));
    if (n > 4)
        x = _mm512_fmadd_ps(_mm512_load_ps(sign[2]), x, _mm512_shuffle_f32x4(x, x, 0xb1));
    if (n > 8)
        x = _mm512_fmadd_ps(_mm512_load_ps(sign[3]), x, _mm512_shuffle_f32x4(x, x, 0x4e));
    return x;
}

/* x <- after o (H (before o x)) for the transforms of length n in `count` registers. */
INLINE void
block(const int count, const ptrdiff_t n, const float *before, const float *after, float *x)
{
    __m512 v[16];
#pragma GCC unroll 16
    for (int i = 0; i < count; i++)
        v[i] = _mm512_loadu_ps(x + i * WIDTH);
    if (before)
#pragma GCC unroll 16
        for (int i = 0; i < count; i++)
            v[i] = _mm512_mul_ps(v[i], _mm512_loadu_ps(before + i * WIDTH));
#pragma GCC unroll 16
    for (int i = 0; i < count; i++)
        v[i] = within(n, v[i]);
    between(count, n / WIDTH, v);
    if (after)
#pragma GCC unroll 16
        for (int i = 0; i < count; i++)
            v[i] = _mm512_mul_ps(v[i], _mm512_loadu_ps(after + i * WIDTH));
#pragma GCC unroll 16
    for (int i = 0; i < count; i++)
        _mm512_storeu_ps(x + i * WIDTH, v[i]);
}

/* The stages of distance, 2 distance, ..., radix distance / 2 of x (n). */
INLINE void
pass(const int radix, ptrdiff_t n, ptrdiff_t distance, const float *after, float *x)
{
    for (ptrdiff_t from = 0; from < n; from += radix * distance)
        for (ptrdiff_t at = from; at < from + distance; at += WIDTH) {
            __m512 v[16];
#pragma GCC unroll 16
            for (int i = 0; i < radix; i++)
                v[i] = _mm512_loadu_ps(x + at + i * distance);
            between(radix, radix, v);
            if (after)
#pragma GCC unroll 16
                for (int i = 0; i < radix; i++)
                    v[i] = _mm512_mul_ps(v[i], _mm512_loadu_ps(after + at + i * distance));
#pragma GCC unroll 16
            for (int i = 0; i < radix; i++)
                _mm512_storeu_ps(x + at + i * distance, v[i]);
        }
}

/* All stages from `distance` to n / 2, in as few passes as radix 16 allows. */
static void
passes(ptrdiff_t n, ptrdiff_t distance, const float *after, float *x)
{
    int stages = 0;
    for (ptrdiff_t ratio = n / distance; ratio > 1; ratio /= 2)
        stages++;
    for (int left = (stages + 3) / 4; left > 0; left--) {
        const int log = (stages + left - 1) / left;
        const float *const then = left == 1 ? after : NULL;
        switch (log) {
        case 1:
            pass(2, n, distance, then, x);
            break;
        case 2:
            pass(4, n, distance, then, x);
            break;
        case 3:
            pass(8, n, distance, then, x);
            break;
        default:
            pass(16, n, distance, then, x);
        }
        stages -= log;
        distance <<= log;
    }
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
        const __mmask16 mask = lbq_lanes_avx512(total - at);
        __m512 v = _mm512_maskz_loadu_ps(mask, x + at);
        if (before)
            v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, before + at));
        v = within(n, v);
        if (after)
            v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, after + at));
        _mm512_mask_storeu_ps(x + at, mask, v);
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
lbq_hadamard_sylvester_avx512(ptrdiff_t n, ptrdiff_t count, const float *before, const float *after,
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
    case 128:
        blocks(128, total, before, after, x);
        break;
    case 256:
        blocks(256, total, before, after, x);
        break;
    default:
        for (ptrdiff_t at = 0; at < total; at += n)
            transform(n, before ? before + at : NULL, after ? after + at : NULL, x + at);
    }
}

/* `rows` columns of A times the rows in scratch (order, 16 vectors), the last register masked. */
INLINE void
tile(const int rows, const int vectors, const float *A, ptrdiff_t order, const float *scratch,
     __mmask16 last, ptrdiff_t lanes, const float *after, float *x)
{
    __m512 sum[12][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            sum[i][v] = _mm512_setzero_ps();
    for (ptrdiff_t j = 0; j < order; j++) {
        __m512 column[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            column[v] = _mm512_load_ps(scratch + (j * vectors + v) * WIDTH);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            const __m512 b = _mm512_set1_ps(A[j * order + i]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                sum[i][v] = _mm512_fmadd_ps(b, column[v], sum[i][v]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const __mmask16 mask = v == vectors - 1 ? last : 0xffff;
            const ptrdiff_t at = i * lanes + v * WIDTH;
            if (after)
                sum[i][v] = _mm512_mul_ps(sum[i][v], _mm512_maskz_loadu_ps(mask, after + at));
            _mm512_mask_storeu_ps(x + at, mask, sum[i][v]);
        }
}

/* Up to `vectors` registers of lanes: copies their columns to scratch, then multiplies by tiles of
 * columns of A. */
INLINE void
lane_block(const int vectors, const float *A, ptrdiff_t order, ptrdiff_t lanes, __mmask16 last,
           const float *before, const float *after, float *x, float *scratch)
{
    for (ptrdiff_t j = 0; j < order; j++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            const __mmask16 mask = v == vectors - 1 ? last : 0xffff;
            const ptrdiff_t at = j * lanes + v * WIDTH;
            __m512 column = _mm512_maskz_loadu_ps(mask, x + at);
            if (before)
                column = _mm512_mul_ps(column, _mm512_maskz_loadu_ps(mask, before + at));
            _mm512_store_ps(scratch + (j * vectors + v) * WIDTH, column);
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
    TILES(12);
    TILES(4);
    TILES(1);
#undef TILES
}

void
lbq_hadamard_base_avx512(const float *A, ptrdiff_t order, ptrdiff_t lanes, const float *before,
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
        LANES(2, 0xffff);
    for (; at < lanes; at += WIDTH)
        LANES(1, lbq_lanes_avx512(lanes - at));
#undef LANES
}
