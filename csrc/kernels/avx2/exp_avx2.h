/* exp and 2^x of eight numbers. */
#ifndef LBQ_EXP_AVX2_H
#define LBQ_EXP_AVX2_H

#include <immintrin.h>

#include "kernels/exp.h"

static inline __m256
lbq_power_of_two_avx2(__m256i exponent)
{
    const __m256i biased = _mm256_add_epi32(exponent, _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

/* p 2^n */
static inline __m256
lbq_scaled_avx2(__m256 p, __m256 n)
{
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    p = _mm256_mul_ps(p, lbq_power_of_two_avx2(half));
    return _mm256_mul_ps(p, lbq_power_of_two_avx2(_mm256_sub_epi32(whole, half)));
}

static inline __m256
lbq_exp_avx2(__m256 x)
{
    x = _mm256_max_ps(_mm256_set1_ps(LBQ_EXP_LOW), x); /* a NaN in x stays */
    x = _mm256_min_ps(_mm256_set1_ps(LBQ_EXP_HIGH), x);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(LBQ_EXP_LOG2E)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LBQ_EXP_LN2_HIGH), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LBQ_EXP_LN2_LOW), r);
    __m256 p = _mm256_set1_ps(LBQ_EXP_C6);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(LBQ_EXP_C5));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(LBQ_EXP_C4));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(LBQ_EXP_C3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(LBQ_EXP_C2));
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r);
    return lbq_scaled_avx2(_mm256_add_ps(p, _mm256_set1_ps(1.0f)), n);
}

/* For x <= 0. */
static inline __m256
lbq_exp2_avx2(__m256 x)
{
    x = _mm256_max_ps(_mm256_set1_ps(LBQ_EXP2_LOW), x); /* a NaN in x stays */
    const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 r = _mm256_sub_ps(x, n);
    __m256 p = _mm256_set1_ps(LBQ_EXP2_C6);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(LBQ_EXP2_C5));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(LBQ_EXP2_C4));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(LBQ_EXP2_C3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(LBQ_EXP2_C2));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(LBQ_EXP2_C1));
    return lbq_scaled_avx2(_mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f)), n);
}

#endif
