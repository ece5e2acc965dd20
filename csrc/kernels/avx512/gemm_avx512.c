/* Two unpacked panels times a tile of eight tokens: sixteen sums in registers.
 *
 * Each broadcast activation word serves both panels, so loads stay below the two per cycle that
 * the core can do while vpdpbusd runs at its two. The float sums live in y, in the L1 cache. */
#include "kernels/avx512/avx512.h"
#include "kernels/avx512/panel_avx512.h"

/* Word t of the tile times both panels' codes; `k` counts words of k since the top of the loop. */
#define TOKEN(k, t, first, second)                                                                 \
    "vpbroadcastd 32*" #k "+4*" #t "(%[q]), %%zmm18\n\t"                                           \
    "vpdpbusd %%zmm18, %%zmm16, %%zmm" #first "\n\t"                                               \
    "vpdpbusd %%zmm18, %%zmm17, %%zmm" #second "\n\t"
#define COLUMNS(k)                                                                                 \
    "vmovdqu64 64*" #k "(%[codes]), %%zmm16\n\t"                                                   \
    "vmovdqu64 64*" #k "(%[codes],%[other]), %%zmm17\n\t" /* clang-format off */                   \
    TOKEN(k, 0, 0, 8) TOKEN(k, 1, 1, 9) TOKEN(k, 2, 2, 10) TOKEN(k, 3, 3, 11)                      \
    TOKEN(k, 4, 4, 12) TOKEN(k, 5, 5, 13) TOKEN(k, 6, 6, 14) TOKEN(k, 7, 7, 15)
#define CLEAR(sum) "vpxord %%zmm" #sum ", %%zmm" #sum ", %%zmm" #sum "\n\t"
#define STORE(sum) "vmovdqa64 %%zmm" #sum ", 64*" #sum "(%[sum])\n\t"
#define EACH(DO)                                                                                   \
    DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15)
/* clang-format on */

/* Integer sums of a step, [panel][token][row], the second panel `other` bytes behind the first. In
 * assembly, because gcc 12 copies half of the sums from register to register on every turn. */
LBQ_INLINE void
sum_step(const uint8_t *codes, ptrdiff_t other, const int8_t *q, ptrdiff_t columns,
         __m512i sum[2 * LBQ_TILE])
{
    __asm__ volatile(EACH(CLEAR) "1:\n\t" COLUMNS(0) COLUMNS(1) COLUMNS(2)
                         COLUMNS(3) "add $256, %[codes]\n\t"
                                    "add $128, %[q]\n\t"
                                    "sub $16, %[columns]\n\t"
                                    "jnz 1b\n\t" EACH(STORE)
                     : [codes] "+r"(codes), [q] "+r"(q), [columns] "+r"(columns)
                     : [other] "r"(other), [sum] "r"(sum)
                     : "memory",
                       "cc",
                       "xmm0",
                       "xmm1",
                       "xmm2",
                       "xmm3",
                       "xmm4",
                       "xmm5",
                       "xmm6",
                       "xmm7",
                       "xmm8",
                       "xmm9",
                       "xmm10",
                       "xmm11",
                       "xmm12",
                       "xmm13",
                       "xmm14",
                       "xmm15",
                       "xmm16",
                       "xmm17",
                       "xmm18");
}

void
lbq_gemm_u8_i8_avx512(const lbq_panel *panel, ptrdiff_t count, int bits, const uint8_t *codes,
                      ptrdiff_t first, ptrdiff_t end, const lbq_activations *x, float *y)
{
    (void)bits;
    const ptrdiff_t step = panel->step;
    const ptrdiff_t other = count == 2 ? (end - first) * step * LBQ_PANEL : 0;
    for (ptrdiff_t s = first; s < end; s++, codes += step * LBQ_PANEL) {
        __m512i sum[2 * LBQ_TILE];
        sum_step(codes, other, x->values + s * step * LBQ_TILE, step, sum);
        const float *const factors = x->factors + 3 * s * LBQ_TILE;
        for (ptrdiff_t p = 0; p < count; p++) {
            const uint8_t *const scale_at = panel[p].scale + s * panel[p].scale_stride;
            const __m512 scale = load_scale(&panel[p], scale_at);
            __m512 *const to = (__m512 *)(y + p * LBQ_TILE * LBQ_PANEL);
#pragma GCC unroll 8
            for (int t = 0; t < LBQ_TILE; t++) {
                const __m512 before = s == 0 ? _mm512_setzero_ps() : to[t];
                to[t] = add_step(factors + t, LBQ_TILE, scale, sum[p * LBQ_TILE + t], before);
            }
            if (panel->has_offset) {
                const __m512 offset = load_half(scale_at + 2 * LBQ_PANEL);
#pragma GCC unroll 8
                for (int t = 0; t < LBQ_TILE; t++)
                    to[t] = add_offset(factors + t, LBQ_TILE, offset, to[t]);
            }
        }
    }
}
