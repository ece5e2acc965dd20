/* Where the words of a strip of four panels lie whose columns are rings.
 *
 * The four words of a lane, row i of each panel, are one number of 4 * bits bits, panel 0's word
 * the lowest; so a column has 16 numbers, and the packed layout stores them like codes of a panel:
 * 4 bits (words of 1 bit) like 4-bit codes and 8 bits like 8-bit codes. Of 12 or 16 bits, the low
 * bytes lie like 8-bit codes, and after those of 8 or 4 columns the rest lies like 4- or 8-bit
 * codes. A step's columns are shared out: each panel stores a quarter of them, for all 64 rows. */
#ifndef LBQ_RING_H
#define LBQ_RING_H

#include "core/pack.h"

/* Where a number begins in its panel's codes of a step, and where the bits above its low byte. */
typedef struct {
    ptrdiff_t low, high;
    int shift; /* of the part that has 4 bits only */
} lbq_ring_place;

static inline lbq_ring_place
lbq_ring_place_of(int bits, ptrdiff_t column, int lane)
{
    const ptrdiff_t four = column / 4, eight = column / 8, byte = 4 * lane + column % 4;
    const ptrdiff_t block = bits == 1   ? eight
                            : bits == 2 ? four
                            : bits == 3 ? 3 * eight + four % 2
                                        : 2 * four;
    const ptrdiff_t above = bits == 3 ? 3 * eight + 2 : block + 1;
    return (lbq_ring_place){
        block * LBQ_BLOCK + byte, above * LBQ_BLOCK + byte, (int)(four % 2 * 4)};
}

/* The number of a column and lane. */
static inline uint32_t
lbq_ring_number(int bits, const uint8_t *codes, ptrdiff_t column, int lane)
{
    const lbq_ring_place at = lbq_ring_place_of(bits, column, lane);
    const uint32_t low = codes[at.low], high = bits > 2 ? codes[at.high] : 0;
    switch (bits) {
    case 1:
        return low >> at.shift & 15;
    case 3:
        return low | (high >> at.shift & 15) << 8;
    default:
        return low | high << 8;
    }
}

/* Packs the words of a strip's step, [panel][k / 4][row][k % 4], into the codes of its panels,
 * which are `panel_bytes` apart. Only every `apart`-th column is stored; the inverse sets the
 * others to 0. */
void lbq_ring_pack(int bits, ptrdiff_t columns, ptrdiff_t apart, const uint8_t *words,
                   ptrdiff_t panel_bytes, uint8_t *codes);
void lbq_ring_unpack(int bits, ptrdiff_t columns, ptrdiff_t apart, const uint8_t *codes,
                     ptrdiff_t panel_bytes, uint8_t *words);

#endif
