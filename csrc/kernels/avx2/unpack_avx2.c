/* Codes to bytes, half a block at a time; bytes to the bytes of a table, and to float32 values. */
#include <immintrin.h>

#include "kernels/avx2/avx2.h"

#define MASK(bits) _mm256_set1_epi8(bits)

static inline __m256i
load(const uint8_t *at)
{
    return _mm256_loadu_si256((const __m256i *)at);
}

/* A panel's codes are unpacked a few kilobytes at a time, with long products in between, so the
 * hardware does not prefetch. Prefetching here saves 5 % for 8 tokens of a 4096 x 4096 layer. */
static inline __m256i
load_codes(const uint8_t *at)
{
    _mm_prefetch((const char *)at + 4096, _MM_HINT_T1);
    return load(at);
}

static inline void
store(uint8_t *out, __m256i plane)
{
    _mm256_storeu_si256((__m256i *)out, plane);
}

void
lbq_unpack_u1_avx2(const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    for (ptrdiff_t k = 0; k < columns; k += 32, codes += 64, out += 512) {
        __m128i row[4], pair[4];
        for (int i = 0; i < 4; i++)
            row[i] = _mm_loadu_si128((const __m128i *)(codes + 16 * i));
        for (int i = 0; i < 4; i += 2) {
            pair[i / 2] = _mm_unpacklo_epi8(row[i], row[i + 1]);
            pair[i / 2 + 2] = _mm_unpackhi_epi8(row[i], row[i + 1]);
        }
        for (int half = 0; half < 2; half++) {
            __m256i planes =
                _mm256_set_m128i(_mm_unpackhi_epi16(pair[2 * half], pair[2 * half + 1]),
                                 _mm_unpacklo_epi16(pair[2 * half], pair[2 * half + 1]));
            for (int p = 0; p < 8; p++) {
                store(out + 64 * p + 32 * half, _mm256_and_si256(planes, MASK(1)));
                planes = _mm256_srli_epi16(planes, 1);
            }
        }
    }
}

void
lbq_unpack_u2_avx2(const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    for (ptrdiff_t i = 0; i < 4 * columns; i += 32) {
        __m256i planes = load_codes(codes + i);
        for (int p = 0; p < 4; p++) {
            store(out + i / 64 * 256 + i % 64 + 64 * p, _mm256_and_si256(planes, MASK(3)));
            planes = _mm256_srli_epi16(planes, 2);
        }
    }
}

void
lbq_unpack_u3_avx2(const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    for (ptrdiff_t k = 0; k < columns; k += 32, codes += 192, out += 512)
        for (int i = 0; i < 64; i += 32) {
            const __m256i twos[2] = {load_codes(codes + i), load_codes(codes + 64 + i)};
            const __m256i high = load_codes(codes + 128 + i);
            for (int p = 0; p < 8; p++) {
                const __m256i planes = _mm256_srli_epi16(twos[p / 4], p % 4 * 2);
                const __m256i low = _mm256_and_si256(planes, MASK(3));
                const __m256i one =
                    p < 2 ? _mm256_slli_epi16(high, 2 - p) : _mm256_srli_epi16(high, p - 2);
                store(out + 64 * p + i, _mm256_or_si256(low, _mm256_and_si256(one, MASK(4))));
            }
        }
}

void
lbq_unpack_u4_avx2(const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    for (ptrdiff_t i = 0; i < 8 * columns; i += 32) {
        const __m256i planes = load_codes(codes + i);
        uint8_t *const to = out + i / 64 * 128 + i % 64;
        store(to, _mm256_and_si256(planes, MASK(15)));
        store(to + 64, _mm256_and_si256(_mm256_srli_epi16(planes, 4), MASK(15)));
    }
}

void
lbq_lookup_u8_avx2(const uint8_t bytes[16], ptrdiff_t count, uint8_t *codes)
{
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    for (ptrdiff_t i = 0; i < count; i += 32)
        store(codes + i, _mm256_shuffle_epi8(table, load(codes + i)));
}

void
lbq_decode_f32_avx2(const uint8_t *codes, ptrdiff_t columns, const float *levels,
                    const float *scale, const float *offset, ptrdiff_t stride, float *w)
{
    for (int r = 0; r < LBQ_PANEL; r += 8) {
        const __m256 scales = _mm256_loadu_ps(scale + r), offsets = _mm256_loadu_ps(offset + r);
        for (ptrdiff_t k = 0; k < columns; k++) {
            const __m256i word = load(codes + k / 4 * 64 + 4 * r);
            const __m256i code =
                _mm256_and_si256(_mm256_srl_epi32(word, _mm_cvtsi32_si128((int)(k % 4 * 8))),
                                 _mm256_set1_epi32(255));
            const __m256 level =
                levels ? _mm256_i32gather_ps(levels, code, 4) : _mm256_cvtepi32_ps(code);
            _mm256_storeu_ps(w + k * stride + r, _mm256_fmadd_ps(scales, level, offsets));
        }
    }
}
