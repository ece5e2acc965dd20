/* A row of Viterbi's algorithm, eight states at a time.
 *
 * States whose numbers are equal modulo count / 2^bits have the same ones before them. So the sums
 * of eight times 2^bits states before are loaded once, sorted by word, and used 2^bits times. */
#include <immintrin.h>

#include "kernels/avx2/avx2.h"

enum { LANES = 8, MOST_WORDS = 16 };

#define INLINE static inline __attribute__((always_inline))

/* Puts the pairs of a vector into the order 0, 2, 1, 3. */
INLINE __m256
in_order(__m256 pairs)
{
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xD8));
}

/* Sorts 2^bits vectors of numbers by their places modulo 2^bits, halving bit by bit. Loops end at
 * constants: gcc does not unroll others without optimisation, and says so. */
INLINE void
sort_by_word(const int bits, const float *from, __m256 *sorted)
{
#pragma GCC unroll 16
    for (int i = 0; i < MOST_WORDS; i++)
        if (i < 1 << bits)
            sorted[i] = _mm256_loadu_ps(from + i * LANES);
#pragma GCC unroll 4
    for (int done = 0; done < bits; done++) {
        const int half = 1 << (bits - 1 - done);
        __m256 next[MOST_WORDS];
#pragma GCC unroll 8
        for (int i = 0; i < MOST_WORDS / 2; i++) {
            if (i >= 1 << (bits - 1))
                break;
            const __m256 a = sorted[2 * i], b = sorted[2 * i + 1];
            next[i] = in_order(_mm256_shuffle_ps(a, b, 0x88));
            next[i + (1 << done) * half] = in_order(_mm256_shuffle_ps(a, b, 0xDD));
        }
#pragma GCC unroll 16
        for (int i = 0; i < MOST_WORDS; i++)
            if (i < 1 << bits)
                sorted[i] = next[i];
    }
}

INLINE __m256
squared_error(const float *level, __m256 scale, __m256 target)
{
    const __m256 e = _mm256_sub_ps(target, _mm256_mul_ps(scale, _mm256_loadu_ps(level)));
    return _mm256_mul_ps(e, e);
}

INLINE void
advance(const int bits, const int cols, ptrdiff_t count, const float *levels, float scale,
        const float *target, const float *before, float *after)
{
    const ptrdiff_t words = (ptrdiff_t)1 << bits, part = count >> bits;
    const __m256 s = _mm256_set1_ps(scale), first = _mm256_set1_ps(target[0]);
    const __m256 second = _mm256_set1_ps(target[cols - 1]);
    for (ptrdiff_t i = 0; i < part; i += LANES) {
        __m256 from[MOST_WORDS];
        sort_by_word(bits, before + i * words, from);
#pragma GCC unroll 1
        for (ptrdiff_t at = i; at < count; at += part) {
            __m256 least = _mm256_setzero_ps();
#pragma GCC unroll 16
            for (int word = 0; word < words; word++) {
                const float *const level = levels + word * count + at;
                __m256 error = squared_error(level, s, first);
                if (cols > 1)
                    error = _mm256_add_ps(error, squared_error(level + words * count, s, second));
                error = _mm256_add_ps(error, from[word]);
                least = word == 0 ? error : _mm256_min_ps(error, least);
            }
            _mm256_storeu_ps(after + at, least);
        }
    }
}

void
lbq_viterbi_f32_avx2(int bits, int cols, ptrdiff_t count, const float *levels, float scale,
                     const float *target, const float *before, float *after)
{
    if (cols == 2)
        advance(3, 2, count, levels, scale, target, before, after);
    else if (bits == 1)
        advance(1, 1, count, levels, scale, target, before, after);
    else if (bits == 2)
        advance(2, 1, count, levels, scale, target, before, after);
    else if (bits == 3)
        advance(3, 1, count, levels, scale, target, before, after);
    else
        advance(4, 1, count, levels, scale, target, before, after);
}
