/* Activations to int8, sixteen steps at a time, so that one number per step fills a vector. */
#include <math.h>
#include <string.h>

#include "kernels/avx512/avx512.h"
#include "kernels/avx512/panel_avx512.h"

enum { LANES = 16, STEPS = 16 };

typedef __m512i (*operation)(__m512i, __m512i);

LBQ_INLINE __m512i
larger(__m512i a, __m512i b)
{
    return _mm512_max_epi32(a, b);
}

LBQ_INLINE __m512i
plus(__m512i a, __m512i b)
{
    return _mm512_add_epi32(a, b);
}

/* Lane s of the result combines all lanes of v[s]: four steps per quarter, then the quarters. */
LBQ_INLINE __m512i
join(operation op, const __m512i v[STEPS])
{
    __m512i fours[4];
    for (int i = 0; i < 4; i++) {
        const __m512i *const of = v + 4 * i;
        const __m512i a =
            op(_mm512_unpacklo_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[0], of[1]));
        const __m512i b =
            op(_mm512_unpacklo_epi32(of[2], of[3]), _mm512_unpackhi_epi32(of[2], of[3]));
        fours[i] = op(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    __m512i halves[2];
    for (int i = 0; i < 2; i++)
        halves[i] = op(_mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                       _mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
    return op(_mm512_shuffle_i32x4(halves[0], halves[1], 0x88),
              _mm512_shuffle_i32x4(halves[0], halves[1], 0xdd));
}

/* At most 16 whole steps of `vectors` vectors each. */
LBQ_INLINE void
quantize_steps(const float *x, ptrdiff_t steps, const int vectors, int limit, int8_t *q,
               float *scale, float *total)
{
    __m512i top[STEPS], sum[STEPS];
    for (int s = 0; s < STEPS; s++)
        top[s] = sum[s] = _mm512_setzero_si512();
    for (ptrdiff_t s = 0; s < steps; s++)
        for (int v = 0; v < vectors; v++) {
            const __m512 value = _mm512_loadu_ps(x + (s * vectors + v) * LANES);
            top[s] = larger(top[s], _mm512_castps_si512(_mm512_abs_ps(value)));
        }
    const __m512i bits = join(larger, top);
    const __m512 largest = _mm512_castsi512_ps(bits), limits = _mm512_set1_ps((float)limit);
    const __mmask16 usable = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(0x1p-100f), _CMP_GE_OQ) &
                             _mm512_cmp_ps_mask(largest, _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
    float inverse[STEPS];
    _mm512_storeu_ps(inverse, _mm512_maskz_div_ps(usable, limits, largest));
    for (ptrdiff_t s = 0; s < steps; s++)
        for (int v = 0; v < vectors; v++) {
            const ptrdiff_t at = (s * vectors + v) * LANES;
            const __m512 times = _mm512_mul_ps(_mm512_loadu_ps(x + at), _mm512_set1_ps(inverse[s]));
            /* Infinity * 0 becomes INT_MIN, whose low byte is 0, as required. */
            const __m512i code =
                _mm512_cvt_roundps_epi32(times, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            sum[s] = plus(sum[s], code);
            _mm_storeu_si128((__m128i *)(q + at), _mm512_cvtepi32_epi8(code));
        }
    const __mmask16 broken =
        _mm512_cmp_epi32_mask(bits, _mm512_set1_epi32(0x7f800000), _MM_CMPINT_NLT);
    const __m512 none = _mm512_maskz_mov_ps(broken, _mm512_set1_ps(NAN));
    const __m512 scales = _mm512_mask_div_ps(none, usable, largest, limits);
    const __m512 sums = _mm512_cvtepi32_ps(join(plus, sum));
    const __mmask16 stored = (__mmask16)((1u << steps) - 1);
    _mm512_mask_storeu_ps(scale, stored, scales);
    _mm512_mask_storeu_ps(total, stored, _mm512_mask_mul_ps(none, usable, scales, sums));
}

LBQ_INLINE void
quantize_row(const float *x, ptrdiff_t cols, const int vectors, int limit, int8_t *q, float *scale,
             float *total)
{
    const ptrdiff_t step = vectors * LANES, whole = cols / step, rest = cols % step;
    for (ptrdiff_t s = 0; s < whole; s += STEPS) {
        const ptrdiff_t steps = whole - s < STEPS ? whole - s : STEPS;
        quantize_steps(x + s * step, steps, vectors, limit, q + s * step, scale + s, total + s);
    }
    if (rest == 0)
        return;
    float padded[LBQ_MAX_STEP] = {0};
    memcpy(padded, x + whole * step, sizeof(float) * (size_t)rest);
    quantize_steps(padded, 1, vectors, limit, q + whole * step, scale + whole, total + whole);
}

void
lbq_quantize_i8_avx512(const float *x, ptrdiff_t cols, ptrdiff_t step, int limit, int8_t *q,
                       float *scale, float *total)
{
    switch (step / LANES) {
    case 1:
        quantize_row(x, cols, 1, limit, q, scale, total);
        break;
    case 2:
        quantize_row(x, cols, 2, limit, q, scale, total);
        break;
    case 4:
        quantize_row(x, cols, 4, limit, q, scale, total);
        break;
    default:
        quantize_row(x, cols, 8, limit, q, scale, total);
    }
}
