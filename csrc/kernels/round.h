/* Rounds a panel eight rows at a time, for instruction sets with their own ranges and codes of
 * rows. The rest is plain C that the compiler vectorises.
 *
 * If the number of columns is a power of two, all rows map to the same few sets of the first-level
 * cache. Its eight ways keep the lines of eight rows, but not of sixteen, from the range search to
 * the encoding. */
#ifndef LBQ_ROUND_H
#define LBQ_ROUND_H

#include "core/pack.h"
#include "kernels/kernels.h"

enum { LBQ_ROWS = 8 };

/* Used for 1 / 0: every weight gets code 0, and an infinity that pads a row stays infinite. */
#define LBQ_NEARLY_ZERO 0x1p-126f

/* The parts that an instruction set provides, for LBQ_ROWS rows of a panel starting at `first`:
 * range_f32, encode_f32, and rounding to float16 down (direction -1) or up (1), saturating at
 * +-65504. */
typedef struct {
    int (*range)(const float *w, ptrdiff_t stride, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t count,
                 float limit, float *low, float *high);
    void (*encode)(const float *w, ptrdiff_t stride, ptrdiff_t first, ptrdiff_t rows,
                   ptrdiff_t count, const float *grid, int top, ptrdiff_t ahead, uint8_t *codes);
    void (*halve)(const float *x, int direction, uint8_t *half, float *value);
} lbq_by_rows;

/* cover_f16 for LBQ_ROWS lanes of a grid, which are also stored as a panel's float16. */
static inline __attribute__((always_inline)) void
lbq_cover_rows(lbq_by_rows by, const float *low, const float *high, const lbq_cover *cover,
               float *grid, uint8_t *halves)
{
    float least[LBQ_ROWS], start[LBQ_ROWS] = {0}, scale[LBQ_ROWS], wanted[LBQ_ROWS];
    for (int l = 0; l < LBQ_ROWS; l++)
        least[l] = cover->clip * low[l] + 0.0f; /* turns -0, a possible minimum, into 0 */
    if (cover->has_offset)
        by.halve(least, -1, halves + 2 * LBQ_PANEL, start);
#pragma GCC unroll 1 /* else gcc unrolls it before it tries to vectorise */
    for (int l = 0; l < LBQ_ROWS; l++) {
        const float up = (cover->clip * high[l] - start[l]) / cover->above;
        const float down = (start[l] - least[l]) / cover->below;
        const float both = up > down ? up : down;
        wanted[l] = both > 0x1p-24f ? both : 0x1p-24f;
    }
    by.halve(wanted, 1, halves, scale);
#pragma GCC unroll 1
    for (int l = 0; l < LBQ_ROWS; l++) {
        grid[l] = scale[l];
        grid[LBQ_PANEL + l] = start[l] - cover->zero * scale[l];
    }
}

static inline __attribute__((always_inline)) void
lbq_cover_by_rows(lbq_by_rows by, const float *low, const float *high, const lbq_cover *cover,
                  float *grid)
{
    uint8_t halves[4 * LBQ_PANEL];
    for (int first = 0; first < LBQ_PANEL; first += LBQ_ROWS)
        lbq_cover_rows(by, low + first, high + first, cover, grid + first, halves + 2 * first);
}

/* round_panel of list.h. A grid has a long latency, so a step is encoded between the ranges and the
 * grids of the next one, and the processor can overlap them. */
static inline __attribute__((always_inline)) int
lbq_round_by_rows(lbq_by_rows by, const float *w, ptrdiff_t stride, ptrdiff_t steps,
                  ptrdiff_t count, float limit, const lbq_cover *cover, int top, int bits,
                  uint8_t *panel)
{
    const ptrdiff_t code_bytes = count * bits * LBQ_PANEL / 8, rows = LBQ_PANEL;
    const ptrdiff_t step_bytes = code_bytes + 2 * LBQ_PANEL * (cover->has_offset ? 2 : 1);
    int within = 1;
    for (int first = 0; first < LBQ_PANEL; first += LBQ_ROWS) {
        float low[LBQ_ROWS], high[LBQ_ROWS], grid[2 * LBQ_PANEL];
        uint8_t codes[LBQ_MAX_STEP * LBQ_PANEL];
        for (ptrdiff_t s = 0; s <= steps; s++) {
            const float *const from = w + s * count;
            uint8_t *const to = panel + s * step_bytes;
            if (s < steps)
                within &= by.range(from, stride, first, rows, count, limit, low, high);
            if (s > 0)
                by.encode(from - count, stride, first, rows, count, grid, top, 2 * count, codes);
            if (s < steps)
                lbq_cover_rows(by, low, high, cover, grid + first, to + code_bytes + 2 * first);
            if (s > 0)
                lbq_rows_pack(bits, codes, count, first, LBQ_ROWS, to - step_bytes);
        }
    }
    return within;
}

#endif
