/* A row of Viterbi's algorithm, in plain loops that compilers turn into vectors. */
#include <math.h>

#include "kernels/portable/portable.h"

enum { LANES = 16, MOST_WORDS = 16 };

/* The least of `least` and of the sums by way of one word. */
static inline void
try_word(int cols, ptrdiff_t pitch, const float *restrict level, float scale,
         const float *restrict target, const float *restrict from, float *restrict least)
{
    float sum[LANES];
    for (int l = 0; l < LANES; l++) {
        const float e = target[0] - scale * level[l];
        sum[l] = e * e;
    }
    if (cols > 1)
        for (int l = 0; l < LANES; l++) {
            const float e = target[1] - scale * level[pitch + l];
            sum[l] += e * e;
        }
    for (int l = 0; l < LANES; l++)
        sum[l] += from[l];
    for (int l = 0; l < LANES; l++)
        least[l] = sum[l] < least[l] ? sum[l] : least[l];
}

void
lbq_viterbi_f32_portable(int bits, int cols, ptrdiff_t count, const float *levels, float scale,
                         const float *target, const float *before, float *after)
{
    const ptrdiff_t words = (ptrdiff_t)1 << bits, part = count >> bits, pitch = words * count;
    for (ptrdiff_t i = 0; i < part; i += LANES) {
        float from[MOST_WORDS][LANES];
        for (ptrdiff_t word = 0; word < words; word++)
            for (int l = 0; l < LANES; l++)
                from[word][l] = before[(i + l) * words + word];
        for (ptrdiff_t at = i; at < count; at += part) {
            const float *const level = levels + at;
            for (int l = 0; l < LANES; l++)
                after[at + l] = HUGE_VALF;
            for (ptrdiff_t word = 0; word < words; word++)
                try_word(cols, pitch, level + word * count, scale, target, from[word], after + at);
        }
    }
}
