/* The packed layout of a quantized matrix, the same for every instruction set, on disk and in
 * memory.
 *
 * It defines where the words of a code, one per weight, and the scales and offsets of their groups,
 * g = k / group, are stored; codes/matrix.h defines what they mean. Rows are stored in panels of
 * 16, the last one padded; if the words in a block of 64 rows depend on each other, panels are
 * padded to whole blocks. A panel is cut along k into steps of `step` columns, the last one padded
 * with zero codes. A step stores its codes in 64-byte blocks. In a block, every 32-bit lane r holds
 * four k-bytes of row r, so that a kernel broadcasts four activations and multiplies; only 1-bit
 * codes keep the 16 rows of a k-byte together, so that a kernel looks up sums of four activations
 * for 16 rows at once:
 *
 *     bits   columns per block   column of plane p (bits p * bits and up) of byte
 *     1      32                  i + 4 p,  p = 0..7         16 i + r
 *     2      16                  i + 4 p,  p = 0..3         4 r + i
 *     4       8                  i + 4 p,  p = 0..1         4 r + i
 *     8       4                  i                          4 r + i
 *     3      32                  two 2-bit blocks (low bits of columns 0-15, 16-31), then one with
 *                                the high bits: i + 4 p, p = 0..7, in byte 4 r + i
 *
 * If blocks have 64 rows, the four panels of one share out its columns (core/ring.h).
 *
 * Half-bit rates have one word for every two columns, word_cols = 2. It counts as the word of the
 * first column; the word of the second is 0 and not stored. "Column" in the table then counts
 * words.
 *
 * 16 scales follow, then 16 float16 offsets if there are any: after each step if every `group`
 * columns have a scale (group = step), once at the panel's end if each row has one (group >= cols),
 * and not at all if the whole matrix has one (scale_bits = 0). scale_bits = 16: float16. 8 and 4:
 * unsigned integers times `unit`; 4-bit scales of rows 2i and 2i+1 share byte i, the even row in
 * the low half. 0: the scale is `unit`. Without offsets, offset[r,g] is -zero * scale[r,g],
 * computed in float32. */
#ifndef LBQ_PACKED_H
#define LBQ_PACKED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

enum { LBQ_PANEL = 16, LBQ_STRIP = 64, LBQ_ROW_STEP = 64, LBQ_MAX_STEP = 128 };

typedef struct {
    const uint8_t *panels; /* geometry.bytes bytes; fastest if 64-byte aligned */
    ptrdiff_t rows, cols;
    ptrdiff_t group;            /* 16, 32, 64, 128; or >= cols: one group per row */
    int block_rows, block_cols; /* block whose words depend on each other, 1 x 1 if none do;
                                   block_rows is 1 or LBQ_STRIP, block_cols divides 16 */
    int bits;                   /* of a word: 1, 2, 3, 4, 8 */
    int word_cols;              /* columns that share a word: 1 or 2; divides block_cols */
    int scale_bits;             /* 16, 8, 4, 0 */
    bool has_offset;            /* only with scale_bits = 16 */
    float unit, zero;           /* see above */
} lbq_packed;

/* Sizes and positions; in bytes from code_bytes on. */
typedef struct {
    ptrdiff_t step;         /* columns per step, lbq_packed_step() */
    ptrdiff_t steps;        /* per panel */
    ptrdiff_t strip;        /* panels of a block, at least 1 */
    ptrdiff_t panels;       /* rows / 16, rounded up to whole strips */
    ptrdiff_t code_bytes;   /* of one step */
    ptrdiff_t step_bytes;   /* from one step to the next */
    ptrdiff_t scale_at;     /* scales of step 0, from the start of the panel; offsets follow */
    ptrdiff_t scale_stride; /* from one step's scales to the next: step_bytes or 0 */
    ptrdiff_t panel_bytes;
    ptrdiff_t bytes; /* of all panels */
} lbq_packed_geometry;

/* Columns per step: group, or LBQ_ROW_STEP if group >= cols. */
static inline ptrdiff_t
lbq_packed_step(const lbq_packed *packed)
{
    return packed->group < packed->cols ? packed->group : LBQ_ROW_STEP;
}

/* Rows and columns of codes: the matrix padded to whole blocks. */
static inline ptrdiff_t
lbq_packed_code_rows(const lbq_packed *packed)
{
    return (packed->rows + packed->block_rows - 1) / packed->block_rows * packed->block_rows;
}

static inline ptrdiff_t
lbq_packed_code_cols(const lbq_packed *packed)
{
    return (packed->cols + packed->block_cols - 1) / packed->block_cols * packed->block_cols;
}

/* Steps are multiples of this number of columns: whole blocks of words. */
static inline ptrdiff_t
lbq_packed_multiple(const lbq_packed *packed)
{
    return (packed->bits == 1 || packed->bits == 3 ? 32 : 16) * packed->word_cols;
}

/* LBQ_BAD_VALUE unless bits, group, block_cols, scale_bits and has_offset fit together as above,
 * group is a multiple of lbq_packed_multiple, and unit and zero are finite; LBQ_BAD_SHAPE for sizes
 * below 1 or above 2^31 - 1. */
lbq_status lbq_packed_geometry_of(const lbq_packed *packed, lbq_packed_geometry *geometry);

/* Packs codes, padded to whole blocks, and float32 scale and offset (rows, groups) into `panels`;
 * packed->panels is ignored. The quantizer does the rounding: LBQ_BAD_VALUE for a scale or offset
 * that its stored form cannot hold exactly, for a code above 2^bits - 1, and for a nonzero code
 * where none is stored. scale is not read if scale_bits = 0, offset not if has_offset is false. */
lbq_status lbq_pack(const lbq_packed *packed, const uint8_t *codes, const float *scale,
                    const float *offset, uint8_t *panels);

/* Checks and stores scale and offset of one row and group, as lbq_pack does. `to`: the scales of
 * its panel and group, initially zero. */
lbq_status lbq_scale_pack(const lbq_packed *packed, ptrdiff_t row, ptrdiff_t group, float scale,
                          float offset, uint8_t *to);

/* The inverse of lbq_pack; each output may be NULL. If they are not stored, scale is unit and
 * offset is -zero * scale. */
lbq_status lbq_unpack(const lbq_packed *packed, uint8_t *codes, float *scale, float *offset);

/* One panel as kernels read it; pointers are to its step 0. */
typedef struct {
    const uint8_t *codes;
    const uint8_t *scale;   /* not read if scale_bits = 0; offsets follow directly */
    ptrdiff_t step, steps;  /* columns per step, number of steps */
    ptrdiff_t step_bytes;   /* from one step's codes to the next */
    ptrdiff_t scale_stride; /* from one step's scales, or offsets, to the next */
    int scale_bits;
    bool has_offset; /* else offsets are -zero * scale */
    float unit, zero;
    const uint8_t *bytes; /* (16): the byte of each code, for table kernels */
    /* For kernels that multiply whole strips: what words mean; bytes to the strip's next panel. */
    const struct lbq_trellis *trellis;
    ptrdiff_t panel_bytes;
} lbq_panel;

lbq_panel lbq_packed_panel(const lbq_packed *packed, const lbq_packed_geometry *geometry,
                           ptrdiff_t panel);

/* The 16 scales, or offsets, of one step, widened. */
void lbq_panel_scale(const lbq_panel *panel, ptrdiff_t step, float scale[LBQ_PANEL]);
void lbq_panel_offset(const lbq_panel *panel, ptrdiff_t step, float offset[LBQ_PANEL]);

/* Unpacks `columns` columns of one step to bytes, one per code, laid out like 8-bit codes as out[k
 * / 4][row][k % 4]. `columns` is a multiple of 16, or of 32 for 1 and 3 bits. */
void lbq_step_unpack(int bits, const uint8_t *codes, ptrdiff_t columns, uint8_t *out);

/* The same for a step of a panel by `unpack`, with 0 for words that are not stored. */
typedef void (*lbq_unpacker)(const uint8_t *codes, ptrdiff_t columns, uint8_t *out);
void lbq_words_unpack(const lbq_packed *packed, lbq_unpacker unpack, const uint8_t *codes,
                      uint8_t *words);

/* Packs the words of a strip's step, [panel][k / 4][row][k % 4], to the codes of its panels; and
 * unpacks those of a block of LBQ_STRIP rows. */
void lbq_strip_pack(const lbq_packed *packed, const lbq_packed_geometry *geometry,
                    const uint8_t *words, uint8_t *codes);
void lbq_strip_unpack(const lbq_packed *packed, const lbq_packed_geometry *geometry,
                      const uint8_t *codes, uint8_t *words);

#endif
