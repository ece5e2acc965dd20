/* The kernels: inner loops that exist once per instruction set, and the table that holds the
 * chosen ones.
 *
 * LBQ_KERNELS(X) lists each as X(name, result, (parameters)). A kernel checks nothing, allocates
 * nothing and cannot fail. Its portable version is the specification: every other one gives the
 * same bits for integer kernels and for those said to be exact, and else agrees to rounding. */
#ifndef LBQ_KERNELS_H
#define LBQ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "core/cpu.h"
#include "core/packed.h"
#include "core/status.h"

enum { LBQ_TILE = 8 /* tokens that gemm_u8_i8 takes at once */ };

/* Quantized activations of `width` tokens, interleaved: x[t,k] ~ scale[k / step][t] * q[t,k]. */
typedef struct {
    const int8_t *values; /* q as [k / 4][width][k % 4], -127 to 127, zero beyond the last column */
    /* [step][3][width]: scale; total = scale * sum of q over the step; shift = -zero * total, zero
     * being that of the weight, or 0 if it has offsets. With a table of levels, step * scale and
     * (base - zero) * total instead of scale and shift (lbq_byte_levels) */
    const float *factors;
    ptrdiff_t width;
    const uint8_t *sums; /* subset_sums of each token, one after the other; for gemv_u1_i8 only */
} lbq_activations;

/* How grids of float16 cover ranges: with low and high times `clip`, and in float32,
 *     start = the largest float16 not above low if there are offsets, else 0
 *     scale = the smallest float16 from 2^-24 on not below (high - start) / above and
 *             (start - low) / below
 *     offset = start - zero * scale
 * where float16 ends at 65504. What the roundings of float32 leave out of the range moves no code.
 */
typedef struct {
    float clip;
    int has_offset;
    float zero;         /* the level that stands for 0; 0 if there are offsets */
    float above, below; /* steps from start to the ends, infinite where there are none */
} lbq_cover;

/* X(name, result, (parameters)), each with its contract in the comment above it. */
#define LBQ_KERNELS(X)                                                                             \
    /* y[i] = x[i] narrowed to float16, ties to even; infinity beyond 65504; exact. */             \
    X(narrow_f16, void, (const float *x, ptrdiff_t count, uint16_t *y))                            \
    /* LBQ_PANEL numbers rounded to values of float16: the nearest (direction 0), the largest not  \
     * above x (-1), the smallest not below it (1), +-65504 at the most; y may be x; exact. */     \
    X(round_f16, void, (const float *x, int direction, float *y))                                  \
    /* Grids of float16 over LBQ_PANEL ranges; exact. grid as [2][LBQ_PANEL]: scale, offset. */    \
    X(cover_f16, void, (const float *low, const float *high, const lbq_cover *cover, float *grid)) \
    /* Per step of a row x: scale = max |x| / limit, q = x * (limit / max |x|), ties to even, and  \
     * total = scale * sum of q; exact. A step below 2^-100 counts as zeros; one with a NaN or an  \
     * infinity gets scale NaN and zeros. q is padded with zeros to whole steps. */                \
    X(quantize_i8,                                                                                 \
      void,                                                                                        \
      (const float *x,                                                                             \
       ptrdiff_t cols,                                                                             \
       ptrdiff_t step,                                                                             \
       int limit,                                                                                  \
       int8_t *q,                                                                                  \
       float *scale,                                                                               \
       float *total))                                                                              \
    /* The same by scale = step_scale or, where that is 0, clip * max |x| / limit; q is cut to     \
     * +-limit. */                                                                                 \
    X(clip_i8,                                                                                     \
      void,                                                                                        \
      (const float *x,                                                                             \
       ptrdiff_t cols,                                                                             \
       ptrdiff_t step,                                                                             \
       int limit,                                                                                  \
       float clip,                                                                                 \
       float step_scale,                                                                           \
       int8_t *q,                                                                                  \
       float *scale,                                                                               \
       float *total))                                                                              \
    /* `width` rows of q, `columns` bytes each, to lbq_activations.values; exact. */               \
    X(interleave, void, (const int8_t *q, ptrdiff_t columns, ptrdiff_t width, int8_t *values))     \
    /* Sums that 1-bit codes ask for. For every 32 columns [part][n][i][m], m = 0..15: the sum     \
     * over the bits j of m of the part of q[i + 4 j + 16 n], which is q mod 16 (part 0) or        \
     * floor(q / 16) (part 1), and 32 more in part 1; hence 0 to 60. `columns` is a multiple of    \
     * 32; exact. */                                                                               \
    X(subset_sums, void, (const int8_t *q, ptrdiff_t columns, uint8_t *sums))                      \
    /* lbq_step_unpack of 1- to 4-bit codes; exact. */                                             \
    X(unpack_u1, void, (const uint8_t *codes, ptrdiff_t columns, uint8_t *out))                    \
    X(unpack_u2, void, (const uint8_t *codes, ptrdiff_t columns, uint8_t *out))                    \
    X(unpack_u3, void, (const uint8_t *codes, ptrdiff_t columns, uint8_t *out))                    \
    X(unpack_u4, void, (const uint8_t *codes, ptrdiff_t columns, uint8_t *out))                    \
    /* A panel times x of width 1 or 4: for each row r and token t, step after step,               \
     *     y = fma(scale[r], fma(scale of x, sum of code * q, shift of x), y)                      \
     *     y = fma(offset[r], total of x, y)                         if the panel has offsets      \
     * from y = 0 on, with y as [t][r] and the sum in integers; exact. */                          \
    X(gemv_u1_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))              \
    X(gemv_u2_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))              \
    X(gemv_u3_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))              \
    X(gemv_u4_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))              \
    X(gemv_u8_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))              \
    /* The same with bytes[code] of the panel in place of the code. */                             \
    X(gemv_t2_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))              \
    X(gemv_t3_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))              \
    X(gemv_t4_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))              \
    /* codes[i] = bytes[codes[i]] for codes below 16; count is a multiple of 64; exact. */         \
    X(lookup_u8, void, (const uint8_t bytes[16], ptrdiff_t count, uint8_t *codes))                 \
    /* The same for `count` panels, 1 or 2, and width LBQ_TILE, over the steps from `first` to     \
     * `end`, whose unpacked codes of at most `bits` bits lie at codes as [panel][step - first]    \
     * [k / 4][r][k % 4]. y as [panel][t][r], going on from what is there unless first = 0; exact. \
     */                                                                                            \
    X(gemm_u8_i8,                                                                                  \
      void,                                                                                        \
      (const lbq_panel *panel,                                                                     \
       ptrdiff_t count,                                                                            \
       int bits,                                                                                   \
       const uint8_t *codes,                                                                       \
       ptrdiff_t first,                                                                            \
       ptrdiff_t end,                                                                              \
       const lbq_activations *x,                                                                   \
       float *y))                                                                                  \
    /* y[t * stride + p * LBQ_PANEL + r] = sums[p][t][r], as gemm_u8_i8 left them, for `count`     \
     * panels and `tokens` of the tile's tokens. The next call will probably be for those after    \
     * them. */                                                                                    \
    X(store_tile,                                                                                  \
      void,                                                                                        \
      (const float *sums, ptrdiff_t count, ptrdiff_t tokens, ptrdiff_t stride, float *y))          \
    /* Unpacked codes of `columns` columns to values: w[k * stride + r] = fma(scale[r], level,     \
     * offset[r]), where the level is the code or, if levels is not NULL, levels[code]; exact. */  \
    X(decode_f32,                                                                                  \
      void,                                                                                        \
      (const uint8_t *codes,                                                                       \
       ptrdiff_t columns,                                                                          \
       const float *levels,                                                                        \
       const float *scale,                                                                         \
       const float *offset,                                                                        \
       ptrdiff_t stride,                                                                           \
       float *w))                                                                                  \
    /* C (m, n) = A (m, k) B (k, n), added to C if `add`; n is a multiple of 16. */                \
    X(product_f32,                                                                                 \
      void,                                                                                        \
      (ptrdiff_t m,                                                                                \
       ptrdiff_t n,                                                                                \
       ptrdiff_t k,                                                                                \
       const float *A,                                                                             \
       ptrdiff_t lda,                                                                              \
       const float *B,                                                                             \
       ptrdiff_t ldb,                                                                              \
       int add,                                                                                    \
       float *C,                                                                                   \
       ptrdiff_t ldc))                                                                             \
    /* The same for integers B, converted on the fly. */                                           \
    X(product_i8_f32,                                                                              \
      void,                                                                                        \
      (ptrdiff_t m,                                                                                \
       ptrdiff_t n,                                                                                \
       ptrdiff_t k,                                                                                \
       const float *A,                                                                             \
       ptrdiff_t lda,                                                                              \
       const int8_t *B,                                                                            \
       ptrdiff_t ldb,                                                                              \
       int add,                                                                                    \
       float *C,                                                                                   \
       ptrdiff_t ldc))                                                                             \
    /* The least and the most of `count` numbers of each row, rows `stride` apart; exact, but for  \
     * the sign of a zero. `rows` <= LBQ_PANEL, the rest is like the last one. low and high as     \
     * [LBQ_PANEL]. Returns whether no number exceeds +-limit; if one does, or is a NaN, they are  \
     * undefined. */                                                                               \
    X(range_f32,                                                                                   \
      int,                                                                                         \
      (const float *w,                                                                             \
       ptrdiff_t stride,                                                                           \
       ptrdiff_t rows,                                                                             \
       ptrdiff_t count,                                                                            \
       float limit,                                                                                \
       float *low,                                                                                 \
       float *high))                                                                               \
    /* Codes of `rows` <= LBQ_PANEL rows, each with its grid: (w - offset) (1 / scale), clipped to \
     * 0 and top <= 255, ties to even, or 0 where scale is 0; laid out as lbq_step_unpack does;    \
     * zeros in further rows, and up to whole 16 columns; exact. grid as [2][LBQ_PANEL]: scale,    \
     * offset. What is wanted next lies `ahead` numbers further on, and may be fetched; 0:         \
     * nothing. */                                                                                 \
    X(encode_f32,                                                                                  \
      void,                                                                                        \
      (const float *w,                                                                             \
       ptrdiff_t stride,                                                                           \
       ptrdiff_t rows,                                                                             \
       ptrdiff_t count,                                                                            \
       const float *grid,                                                                          \
       int top,                                                                                    \
       ptrdiff_t ahead,                                                                            \
       uint8_t *codes))                                                                            \
    /* The first steps of a panel, of `count` columns each, a multiple of 16, or of 32 for 1 and 3 \
     * bits: for each the last three in turn over LBQ_PANEL rows, packed, with scales and, if      \
     * there are any, offsets as float16. Returns what range_f32 does. */                          \
    X(round_panel,                                                                                 \
      int,                                                                                         \
      (const float *w,                                                                             \
       ptrdiff_t stride,                                                                           \
       ptrdiff_t steps,                                                                            \
       ptrdiff_t count,                                                                            \
       float limit,                                                                                \
       const lbq_cover *cover,                                                                     \
       int top,                                                                                    \
       int bits,                                                                                   \
       uint8_t *panel))                                                                            \
    /* y[i] = x[i] as a float; count is a multiple of 16; exact. */                                \
    X(widen_i8, void, (const int8_t *x, ptrdiff_t count, float *y))                                \
    /* Columns of `rows` <= LBQ_PANEL rows, `stride` apart, to lanes: lanes[place[i]][r] =         \
     * w[r * stride + columns[i]] for i < count, 0 for further rows, with LBQ_PANEL lanes at a     \
     * place. columns ascending; both NULL: 0, 1, ...; exact. */                                   \
    X(to_lanes_f32,                                                                                \
      void,                                                                                        \
      (const float *w,                                                                             \
       ptrdiff_t stride,                                                                           \
       ptrdiff_t rows,                                                                             \
       const int64_t *columns,                                                                     \
       const int64_t *place,                                                                       \
       ptrdiff_t count,                                                                            \
       float *lanes))                                                                              \
    /* And back: codes[r * stride + columns[i]] = lanes[place[i]][r]; neither is NULL; exact. */   \
    X(from_lanes_u8,                                                                               \
      void,                                                                                        \
      (const uint8_t *lanes,                                                                       \
       const int64_t *columns,                                                                     \
       const int64_t *place,                                                                       \
       ptrdiff_t count,                                                                            \
       ptrdiff_t rows,                                                                             \
       ptrdiff_t stride,                                                                           \
       uint8_t *codes))                                                                            \
    /* low and high as [group]: minimum and maximum of LBQ_PANEL groups of weights w (count,       \
     * LBQ_PANEL), count >= 1; exact. */                                                           \
    X(lanes_range_f32, void, (const float *w, ptrdiff_t count, float *low, float *high))           \
    /* w (count, LBQ_PANEL) becomes (w - shift) * inverse, with change as [2][group]: shift,       \
     * inverse. moments as [3][group]: the sums over k of importance times 1, w, w^2 of the new w, \
     * the last by fma; importance like w, or NULL for ones; exact. */                             \
    X(centre_f32,                                                                                  \
      void,                                                                                        \
      (float *w, const float *importance, ptrdiff_t count, const float *change, float *moments))   \
    /* How LBQ_PANEL groups of weights w (count, LBQ_PANEL) fit their grids: with                  \
     * x = fma(w, inverse, start), v = x clipped to 0 and top <= 255 and rounded, ties to even,    \
     * and r = x - v, the sums over a group of importance times r, r v, r^2, the last two by fma;  \
     * importance like w, or NULL for ones. grid as [2][group]: inverse, start; sums as            \
     * [3][group]; exact. */                                                                       \
    X(grid_sums_f32,                                                                               \
      void,                                                                                        \
      (const float *w,                                                                             \
       const float *importance,                                                                    \
       ptrdiff_t count,                                                                            \
       const float *grid,                                                                          \
       int top,                                                                                    \
       float *sums))                                                                               \
    /* The same for a table of levels: v = first + the sum of those jump[j] whose middle[j] is     \
     * below x, j = 0, 1, ..., jumps - 1 in turn, the other ones counting as 0; exact. */          \
    X(table_sums_f32,                                                                              \
      void,                                                                                        \
      (const float *w,                                                                             \
       const float *importance,                                                                    \
       ptrdiff_t count,                                                                            \
       const float *grid,                                                                          \
       float first,                                                                                \
       int jumps,                                                                                  \
       const float *middle,                                                                        \
       const float *jump,                                                                          \
       float *sums))                                                                               \
    /* What follows from the sums of the last two: as [4][group] the sum of importance times       \
     * (w - q)^2; scale and offset of the least squares refit to the same codes, scale 0 where     \
     * there is none, and offset -zero * scale if symmetric; and its sum of squares. moments as    \
     * [4][group]: sums of importance times 1, w, w^2, and one over the first; grid as [4][group]: \
     * after the two above scale = 1 / inverse and offset = -start * scale; exact. */              \
    X(refit_f32,                                                                                   \
      void,                                                                                        \
      (const float *moments,                                                                       \
       const float *grid,                                                                          \
       const float *sums,                                                                          \
       int symmetric,                                                                              \
       float zero,                                                                                 \
       float *refit))                                                                              \
    /* The same refit, kept in best as [3][group] of its sum of squares, scale and offset where    \
     * there is one with a sum below `enough` times the one there; returns whether any is; exact.  \
     */                                                                                            \
    X(improve_f32,                                                                                 \
      int,                                                                                         \
      (const float *moments,                                                                       \
       const float *grid,                                                                          \
       const float *sums,                                                                          \
       int symmetric,                                                                              \
       float zero,                                                                                 \
       float enough,                                                                               \
       float *best))                                                                               \
    /* sum[j][l] += R[i * stride + j] * e[i][l] for i = 0, 1, ..., count - 1 in turn, j < width    \
     * and LBQ_PANEL rows l; sum and e are `pitch` floats from one j or i to the next; exact. */   \
    X(feedback_f32,                                                                                \
      void,                                                                                        \
      (ptrdiff_t count,                                                                            \
       ptrdiff_t width,                                                                            \
       const float *R,                                                                             \
       ptrdiff_t stride,                                                                           \
       const float *e,                                                                             \
       ptrdiff_t pitch,                                                                            \
       float *sum))                                                                                \
    /* x (count, LBQ_PANEL) becomes what times R is x, R (count, count) upper triangular with ones \
     * on its diagonal: x[j] -= x[i] * R[i * stride + j] for i = 0, 1, ..., j - 1 in turn; exact.  \
     */                                                                                            \
    X(solve_f32, void, (ptrdiff_t count, const float *R, ptrdiff_t stride, float *x))              \
    /* y[c] += factor[i] * matrix[row[i] * stride + c] for i < count, c < width. */                \
    X(add_rows_f32,                                                                                \
      void,                                                                                        \
      (ptrdiff_t count,                                                                            \
       const int32_t *row,                                                                         \
       const float *factor,                                                                        \
       const float *matrix,                                                                        \
       ptrdiff_t stride,                                                                           \
       ptrdiff_t width,                                                                            \
       float *y))                                                                                  \
    /* One column of LBQ_PANEL rows, each with its grid: the code is (w + shift - offset) *        \
     * inverse, clipped to 0 and top <= 255, ties to even, and e = w - (scale * code + offset);    \
     * exact. grid as [3][row]: scale, offset, inverse; e may be shift. */                         \
    X(round_f32,                                                                                   \
      void,                                                                                        \
      (const float *grid, int top, const float *w, const float *shift, uint8_t *codes, float *e))  \
    /* y[i] = gain[i] x[i] / sqrt(mean of x^2 + epsilon); gain may be NULL, y may be x. Squares    \
     * beyond float32 are summed in float64 (norm.h), so every finite x is right. */               \
    X(rmsnorm_f32,                                                                                 \
      void,                                                                                        \
      (const float *x, const float *gain, ptrdiff_t count, float epsilon, float *y))               \
    /* y[i] = up[i] gate[i] / (1 + exp(-gate[i])); y may be gate or up. */                         \
    X(swiglu_f32, void, (const float *gate, const float *up, ptrdiff_t count, float *y))           \
    /* Rows of an online softmax of base 2, `stride` apart: x[i] = 2^(x[i] - new) with new =       \
     * max(max, x), factor = 2^(max - new), sum becomes sum factor + the sum of x, max new. max    \
     * is finite, x[i] may be -infinity, which at the end of a row changes no bit; max, sum,       \
     * factor (rows); count >= 1. */                                                               \
    X(softmax_f32,                                                                                 \
      void,                                                                                        \
      (ptrdiff_t rows,                                                                             \
       ptrdiff_t count,                                                                            \
       float *x,                                                                                   \
       ptrdiff_t stride,                                                                           \
       float *max,                                                                                 \
       float *sum,                                                                                 \
       float *factor))                                                                             \
    /* The largest of count >= 1 numbers; anything if one is a NaN. */                             \
    X(max_f32, float, (const float *x, ptrdiff_t count))                                           \
    /* Sum of exp(x[i] - shift), accumulated in float64; no x[i] exceeds shift. */                 \
    X(exp_sum_f32, double, (const float *x, ptrdiff_t count, float shift))                         \
    /* Sum of exp(a) (a - b) with a = p[i] - p_shift, b = q[i] - q_shift, in float64; a <= 0. */   \
    X(exp_gap_f32,                                                                                 \
      double,                                                                                      \
      (const float *p, const float *q, ptrdiff_t count, float p_shift, float q_shift))             \
    /* count blocks of n = 2^k numbers, each: x <- after o (H (before o x)), H Sylvester's matrix, \
     * before and after (count n) or NULL for ones. Butterflies (a + b, a - b) of distance 1, 2,   \
     * 4, ..., n / 2, so that the bits are the same everywhere. */                                 \
    X(hadamard_sylvester,                                                                          \
      void,                                                                                        \
      (ptrdiff_t n, ptrdiff_t count, const float *before, const float *after, float *x))           \
    /* x (order, lanes) <- after o (A^T (before o x)), A (order, order) row-major, before and      \
     * after (order, lanes) or NULL for ones. Sums run over the rows of A from 0 upwards, with an  \
     * fma where an entry is not +-1, so that the bits are the same everywhere. scratch (order,    \
     * LBQ_HADAMARD_LANES), 64-byte aligned. */                                                    \
    X(hadamard_base,                                                                               \
      void,                                                                                        \
      (const float *A,                                                                             \
       ptrdiff_t order,                                                                            \
       ptrdiff_t lanes,                                                                            \
       const float *before,                                                                        \
       const float *after,                                                                         \
       float *x,                                                                                   \
       float *scratch))

enum { LBQ_HADAMARD_LANES = 32 /* of hadamard_base at a time: two AVX-512 registers */ };

typedef struct {
#define LBQ_KERNEL_POINTER(name, result, parameters) result(*name) parameters;
    LBQ_KERNELS(LBQ_KERNEL_POINTER)
#undef LBQ_KERNEL_POINTER
} lbq_kernels;

/* The table in use: filled for this CPU, or for a weaker one by lbq_use_isa. */
extern lbq_kernels lbq_kernel;

/* Fills the table from the portable kernels up to `isa`; LBQ_BAD_VALUE if the CPU lacks it.
 * Not while kernels run. */
lbq_status lbq_use_isa(lbq_isa isa);

/* The instruction set of the table. */
lbq_isa lbq_isa_in_use(void);

/* Names of all kernels; and for each the instruction set whose version is in use. */
extern const char *const lbq_kernel_names[];
extern const int lbq_kernel_count;
lbq_isa lbq_kernel_isa(int kernel);

/* Each instruction set overwrites the entries that it does better. */
void lbq_table_portable(lbq_kernels *table);
void lbq_table_avx2(lbq_kernels *table);
void lbq_table_avx512(lbq_kernels *table);

#endif
