/* Trellis codes: which row has which window of bits, and the level that follows from a window.
 *
 * The words of the 64 rows of a column, `bits` bits each, form a ring, in which the four panels of
 * the strip take turns: row 16 p + i has place 4 i + p. The window of a row is the `window` bits
 * that begin with its own word, the lowest, and go on with those of the places after it. With
 *     z = window * multiplier[c] mod 2^16
 * the level in column c of those that share the ring is the sum of the two bytes of z & 0x7F7F.
 * A wide code adds four bytes, of
 *     (z & 0x3F3F) + (floor(z * multiplier[1] / 2^16) & 0x3F3F),
 * so that its levels reach further: to 3.4 standard deviations on both sides instead of 2.4. */
#ifndef LBQ_TRELLIS_H
#define LBQ_TRELLIS_H

#include <stdbool.h>
#include <stdint.h>

enum { LBQ_RING = 64, LBQ_RING_COLS = 2 /* columns that may share a ring */ };

typedef struct lbq_trellis {
    int bits, window;
    int cols; /* of a ring: 1, or 2 unless wide */
    bool wide;
    uint16_t multiplier[LBQ_RING_COLS];
    float normal; /* deviation of the normal variable that the levels suit best */
} lbq_trellis;

/* The row of a strip at a place of the ring. */
static inline int
lbq_ring_row(int place)
{
    return place % 4 * 16 + place / 4;
}

static inline int
lbq_trellis_level(const lbq_trellis *trellis, uint32_t window, int column)
{
    const uint32_t z = window * trellis->multiplier[trellis->wide ? 0 : column] & 0xFFFF;
    uint32_t bytes = z & 0x7F7F;
    if (trellis->wide)
        bytes = (z & 0x3F3F) + (z * trellis->multiplier[1] >> 16 & 0x3F3F);
    return (int)((bytes & 0xFF) + (bytes >> 8));
}

#endif
