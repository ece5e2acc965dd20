/* A row of Viterbi's algorithm, sixteen states at a time.
 *
 * States whose numbers are equal modulo count / 2^bits have the same ones before them. So the sums
 * of sixteen times 2^bits states before are loaded once, sorted by word, and used 2^bits times. */
#include <immintrin.h>

#include "kernels/avx512/avx512.h"

enum { LANES = 16, MOST_WORDS = 16 };

#define INLINE static inline __attribute__((always_inline))

/* Sorts 2^bits vectors of numbers by their places modulo 2^bits, halving bit by bit. Loops end at
 * constants: gcc does not unroll others without optimisation, and says so. */
INLINE void
sort_by_word(const int bits, const float *from, __m512 *sorted)
{
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
#pragma GCC unroll 16
    for (int i = 0; i < MOST_WORDS; i++)
        if (i < 1 << bits)
            sorted[i] = _mm512_loadu_ps(from + i * LANES);
#pragma GCC unroll 4
    for (int done = 0; done < bits; done++) {
        const int half = 1 << (bits - 1 - done);
        __m512 next[MOST_WORDS];
#pragma GCC unroll 8
        for (int i = 0; i < MOST_WORDS / 2; i++) {
            if (i >= 1 << (bits - 1))
                break;
            const __m512 a = sorted[2 * i], b = sorted[2 * i + 1];
            next[i] = _mm512_permutex2var_ps(a, even, b);
            next[i + (1 << done) * half] = _mm512_permutex2var_ps(a, odd, b);
        }
#pragma GCC unroll 16
        for (int i = 0; i < MOST_WORDS; i++)
            if (i < 1 << bits)
                sorted[i] = next[i];
    }
}

INLINE __m512
squared_error(const float *level, __m512 scale, __m512 target)
{
    const __m512 e = _mm512_sub_ps(target, _mm512_mul_ps(scale, _mm512_loadu_ps(level)));
    return _mm512_mul_ps(e, e);
}

INLINE void
advance(const int bits, const int cols, ptrdiff_t count, const float *levels, float scale,
        const float *target, const float *before, float *after)
{
    const ptrdiff_t words = (ptrdiff_t)1 << bits, part = count >> bits;
    const __m512 s = _mm512_set1_ps(scale), first = _mm512_set1_ps(target[0]);
    const __m512 second = _mm512_set1_ps(target[cols - 1]);
    for (ptrdiff_t i = 0; i < part; i += LANES) {
        __m512 from[MOST_WORDS];
        sort_by_word(bits, before + i * words, from);
#pragma GCC unroll 1
        for (ptrdiff_t at = i; at < count; at += part) {
            __m512 least = _mm512_setzero_ps();
#pragma GCC unroll 16
            for (int word = 0; word < words; word++) {
                const float *const level = levels + word * count + at;
                __m512 error = squared_error(level, s, first);
                if (cols > 1)
                    error = _mm512_add_ps(error, squared_error(level + words * count, s, second));
                error = _mm512_add_ps(error, from[word]);
                least = word == 0 ? error : _mm512_min_ps(error, least);
            }
            _mm512_storeu_ps(after + at, least);
        }
    }
}

void
lbq_viterbi_f32_avx512(int bits, int cols, ptrdiff_t count, const float *levels, float scale,
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
