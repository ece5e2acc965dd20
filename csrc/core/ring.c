/* Words of rings to packed codes and back, number by number. */
#include "core/ring.h"

enum { PANELS = 4 };

void
lbq_ring_pack(int bits, ptrdiff_t columns, ptrdiff_t apart, const uint8_t *words,
              ptrdiff_t panel_bytes, uint8_t *codes)
{
    const ptrdiff_t count = columns / apart, quarter = count / PANELS;
    for (ptrdiff_t p = 0; p < PANELS; p++)
        memset(codes + p * panel_bytes, 0, (size_t)(quarter * 8 * bits));
    for (ptrdiff_t c = 0; c < count; c++)
        for (int lane = 0; lane < LBQ_PANEL; lane++) {
            uint32_t number = 0;
            for (int p = PANELS - 1; p >= 0; p--) {
                const uint8_t *const panel = words + p * columns * LBQ_PANEL;
                number = number << bits | panel[lbq_word_at(c * apart, lane)];
            }
            uint8_t *const to = codes + c / quarter * panel_bytes;
            const lbq_ring_place at = lbq_ring_place_of(bits, c % quarter, lane);
            to[at.low] |= (uint8_t)(bits == 1 ? number << at.shift : number);
            if (bits > 2)
                to[at.high] |= (uint8_t)(bits == 3 ? number >> 8 << at.shift : number >> 8);
        }
}

void
lbq_ring_unpack(int bits, ptrdiff_t columns, ptrdiff_t apart, const uint8_t *codes,
                ptrdiff_t panel_bytes, uint8_t *words)
{
    const ptrdiff_t count = columns / apart, quarter = count / PANELS;
    memset(words, 0, (size_t)(columns * PANELS * LBQ_PANEL));
    for (ptrdiff_t c = 0; c < count; c++)
        for (int lane = 0; lane < LBQ_PANEL; lane++) {
            const uint8_t *const from = codes + c / quarter * panel_bytes;
            uint32_t number = lbq_ring_number(bits, from, c % quarter, lane);
            for (int p = 0; p < PANELS; p++, number >>= bits) {
                uint8_t *const panel = words + p * columns * LBQ_PANEL;
                panel[lbq_word_at(c * apart, lane)] = (uint8_t)(number & ((1u << bits) - 1));
            }
        }
}
