/* exp and 2^x of sixteen numbers. */
#ifndef LBQ_EXP_AVX512_H
#define LBQ_EXP_AVX512_H

#include <immintrin.h>

#include "kernels/exp.h"

/* For arguments already bounded by LBQ_EXP_HIGH. */
static inline __m512
lbq_exp_bounded_avx512(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(LBQ_EXP_LOW), x); /* a NaN in x stays */
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(LBQ_EXP_LOG2E)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LBQ_EXP_LN2_HIGH), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LBQ_EXP_LN2_LOW), r);
    __m512 p = _mm512_set1_ps(LBQ_EXP_C6);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(LBQ_EXP_C5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(LBQ_EXP_C4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(LBQ_EXP_C3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(LBQ_EXP_C2));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
    return _mm512_scalef_ps(_mm512_add_ps(p, _mm512_set1_ps(1.0f)), n);
}

static inline __m512
lbq_exp_avx512(__m512 x)
{
    return lbq_exp_bounded_avx512(_mm512_min_ps(_mm512_set1_ps(LBQ_EXP_HIGH), x));
}

/* Any x: for -infinity, vreduceps gives 0 and vscalefps 2^-infinity. */
static inline __m512
lbq_exp2_avx512(__m512 x)
{
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(LBQ_EXP2_C6);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(LBQ_EXP2_C5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(LBQ_EXP2_C4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(LBQ_EXP2_C3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(LBQ_EXP2_C2));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(LBQ_EXP2_C1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, _mm512_sub_ps(x, r));
}

#endif
