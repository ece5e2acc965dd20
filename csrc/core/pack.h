/* Packing the codes of one step, inline so that kernels compile it for their instruction sets. */
#ifndef LBQ_PACK_H
#define LBQ_PACK_H

#include <string.h>

#include "core/packed.h"

enum { LBQ_BLOCK = 64 };

static inline uint32_t
lbq_load_word(const uint8_t *from)
{
    uint32_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

static inline void
lbq_store_word(uint8_t *to, uint32_t word)
{
    memcpy(to, &word, sizeof word);
}

/* Index of column k and row r of a panel in unpacked codes, [k / 4][row][k % 4]. */
static inline ptrdiff_t
lbq_word_at(ptrdiff_t k, ptrdiff_t r)
{
    return (k / 4 * LBQ_PANEL + r) * 4 + k % 4;
}

/* The low `bits` bits of each byte. */
static inline uint32_t
lbq_low_bits(int bits)
{
    return 0x01010101u * ((1u << bits) - 1);
}

/* Packs `bits` bits, starting at bit `shift`, of the codes of a block; its first `rows` lanes. */
static inline void
lbq_pack_lanes(int bits, const uint8_t *restrict codes, int shift, int rows,
               uint8_t *restrict lanes)
{
    for (int r = 0; r < rows; r++) {
        uint32_t lane = 0;
        for (int p = 0; p < 8 / bits; p++) {
            const uint32_t word = lbq_load_word(codes + p * LBQ_BLOCK + 4 * r);
            lane |= (word >> shift & lbq_low_bits(bits)) << p * bits;
        }
        lbq_store_word(lanes + 4 * r, lane);
    }
}

/* The inverse of lbq_step_unpack, for codes below 2^bits and `rows` rows starting at `first`. */
static inline void
lbq_rows_pack(int bits, const uint8_t *codes, ptrdiff_t columns, int first, int rows, uint8_t *out)
{
    const uint8_t *const end = codes + columns * LBQ_PANEL;
    codes += 4 * first;
    switch (bits) {
    case 1:
        for (; codes < end; codes += 8 * LBQ_BLOCK, out += LBQ_BLOCK) {
            uint8_t lanes[LBQ_BLOCK];
            lbq_pack_lanes(1, codes, 0, rows, lanes);
            for (int i = 0; i < 4; i++)
                for (int r = 0; r < rows; r++)
                    out[i * LBQ_PANEL + first + r] = lanes[4 * r + i];
        }
        break;
    case 2:
        out += 4 * first;
        for (; codes < end; codes += 4 * LBQ_BLOCK, out += LBQ_BLOCK)
            lbq_pack_lanes(2, codes, 0, rows, out);
        break;
    case 3:
        out += 4 * first;
        for (; codes < end; codes += 8 * LBQ_BLOCK, out += 3 * LBQ_BLOCK) {
            lbq_pack_lanes(2, codes, 0, rows, out);
            lbq_pack_lanes(2, codes + 4 * LBQ_BLOCK, 0, rows, out + LBQ_BLOCK);
            lbq_pack_lanes(1, codes, 2, rows, out + 2 * LBQ_BLOCK);
        }
        break;
    case 4:
        out += 4 * first;
        for (; codes < end; codes += 2 * LBQ_BLOCK, out += LBQ_BLOCK)
            lbq_pack_lanes(4, codes, 0, rows, out);
        break;
    default:
        out += 4 * first;
        for (; codes < end; codes += LBQ_BLOCK, out += LBQ_BLOCK)
            memcpy(out, codes, (size_t)(4 * rows));
    }
}

static inline void
lbq_step_pack(int bits, const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    lbq_rows_pack(bits, codes, columns, 0, LBQ_PANEL, out);
}

#endif
