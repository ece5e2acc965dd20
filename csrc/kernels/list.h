/* The list of kernels, each as X(name, result, (parameters)) under its contract. Included wherever
 * something is made for each of them: define X, include this file, which undefines X at its end.
 *
 * A kernel checks nothing, allocates nothing and cannot fail. Its portable version is the
 * specification: all others give the same bits for integer kernels and for those said to be exact,
 * and agree to rounding otherwise. */

/* y[i] = x[i] narrowed to float16, ties to even; infinity if |x[i]| >= 65520; exact. */
X(narrow_f16, void, (const float *x, ptrdiff_t count, uint16_t *y))

/* Rounds LBQ_PANEL numbers to values of float16: to the nearest (direction 0), down (-1) or up (1),
 * saturating at +-65504; y may be x; exact. */
X(round_f16, void, (const float *x, int direction, float *y))

/* The float16 grids that cover LBQ_PANEL ranges (lbq_cover); grid as [2][LBQ_PANEL]: scale, offset;
 * exact. */
X(cover_f16, void, (const float *low, const float *high, const lbq_cover *cover, float *grid))

/* Per step of a row x: scale = max |x| / limit, q = x * (limit / max |x|), ties to even, and total
 * = scale * sum of q; exact. A step with max |x| < 2^-100 counts as zeros; one with a NaN or an
 * infinity gets scale and total NaN and q 0. q is padded with zeros to whole steps. */
X(quantize_i8, void,
  (const float *x, ptrdiff_t cols, ptrdiff_t step, int limit, int8_t *q, float *scale,
   float *total))

/* quantize_i8 with scale = step_scale or, if that is 0, clip * max |x| / limit; q is clipped to
 * +-limit. */
X(clip_i8, void,
  (const float *x, ptrdiff_t cols, ptrdiff_t step, int limit, float clip, float step_scale,
   int8_t *q, float *scale, float *total))

/* `width` rows of q, `columns` bytes each, to lbq_activations.values; exact. */
X(interleave, void, (const int8_t *q, ptrdiff_t columns, ptrdiff_t width, int8_t *values))

/* The sums that 1-bit codes select. For every 32 columns, sums is [part][n][i][m] with m = 0..15:
 * the sum over the set bits j of m of q mod 16 (part 0) or of floor(q / 16), plus 32 (part 1), for
 * q = q[i + 4 j + 16 n]; hence 0 to 60. `columns` is a multiple of 32; exact. */
X(subset_sums, void, (const int8_t *q, ptrdiff_t columns, uint8_t *sums))

/* lbq_step_unpack for 1- to 4-bit codes; exact. */
X(unpack_u1, void, (const uint8_t *codes, ptrdiff_t columns, uint8_t *out))
X(unpack_u2, void, (const uint8_t *codes, ptrdiff_t columns, uint8_t *out))
X(unpack_u3, void, (const uint8_t *codes, ptrdiff_t columns, uint8_t *out))
X(unpack_u4, void, (const uint8_t *codes, ptrdiff_t columns, uint8_t *out))

/* A panel times x of width 1 or 4. For each row r and token t, from y = 0, step by step,
 *     y = fma(scale[r], fma(scale of x, sum of code * q, shift of x), y)
 *     y = fma(offset[r], total of x, y)                         if the panel has offsets
 * with y as [t][r] and the sum in integers; exact. */
X(gemv_u1_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))
X(gemv_u2_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))
X(gemv_u3_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))
X(gemv_u4_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))
X(gemv_u8_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))

/* The same with the panel's bytes[code] in place of the code. */
X(gemv_t2_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))
X(gemv_t3_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))
X(gemv_t4_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))

/* The four panels of a strip of rings (core/ring.h), whose first one is given, times x of width 1
 * or 4, with y as [panel][t][r]: the same sums with levels of panel->trellis in place of codes. */
X(gemv_trellis_i8, void, (const lbq_panel *panel, const lbq_activations *x, float *y))

/* Levels of a strip's step of `columns` columns, from codes of rings whose panels lie `panel_bytes`
 * apart; as [k / 4][r][k % 4] for each panel, panels `pitch` apart; exact. */
X(expand_trellis, void,
  (const struct lbq_trellis *trellis, const uint8_t *codes, ptrdiff_t panel_bytes,
   ptrdiff_t columns, ptrdiff_t pitch, uint8_t *bytes))

/* codes[i] = bytes[codes[i]] for codes below 16; count is a multiple of 64; exact. */
X(lookup_u8, void, (const uint8_t bytes[16], ptrdiff_t count, uint8_t *codes))

/* The product of gemv_u8_i8 for `count` panels (1 or 2), x of width LBQ_TILE and the steps from
 * `first` up to, not including, `end`. codes holds the unpacked codes of these steps, at most
 * `bits` bits each, as [panel][step - first][k / 4][r][k % 4]. y as [panel][t][r] is added to
 * unless first = 0; exact. */
X(gemm_u8_i8, void,
  (const lbq_panel *panel, ptrdiff_t count, int bits, const uint8_t *codes, ptrdiff_t first,
   ptrdiff_t end, const lbq_activations *x, float *y))

/* y[t * stride + p * LBQ_PANEL + r] = sums[p][t][r], as gemm_u8_i8 left them, for `count` panels
 * and the first `tokens` tokens of the tile. The next call is probably for the next tokens. */
X(store_tile, void,
  (const float *sums, ptrdiff_t count, ptrdiff_t tokens, ptrdiff_t stride, float *y))

/* Unpacked codes of `columns` columns to values: w[k * stride + r] = fma(scale[r], level,
 * offset[r]), where level is levels[code], or the code itself if levels is NULL; exact. */
X(decode_f32, void,
  (const uint8_t *codes, ptrdiff_t columns, const float *levels, const float *scale,
   const float *offset, ptrdiff_t stride, float *w))

/* C (m, n) = A (m, k) B (k, n), plus C if `add`; n is a multiple of 16. */
X(product_f32, void,
  (ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda, const float *B,
   ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc))

/* The same for integer B, converted on the fly. */
X(product_i8_f32, void,
  (ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *A, ptrdiff_t lda, const int8_t *B,
   ptrdiff_t ldb, int add, float *C, ptrdiff_t ldc))

/* Minimum and maximum of `count` numbers of each row, rows `stride` apart; exact except for the
 * sign of a zero. low and high as [LBQ_PANEL]; lanes past `rows` <= LBQ_PANEL repeat the last row.
 * Returns whether all numbers lie within +-limit; if one does not, or is NaN, low and high are
 * undefined. */
X(range_f32, int,
  (const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count, float limit, float *low,
   float *high))

/* Codes of `rows` <= LBQ_PANEL rows, each with its own grid: (w - offset) (1 / scale), clipped to
 * 0..top <= 255, ties to even; 0 where scale is 0. Laid out as by lbq_step_unpack, with zeros in
 * the rows past `rows` and up to a multiple of 16 columns; exact. grid as [2][LBQ_PANEL]: scale,
 * offset. What the caller reads next lies `ahead` numbers further on (0: nothing) and may be
 * prefetched. */
X(encode_f32, void,
  (const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count, const float *grid, int top,
   ptrdiff_t ahead, uint8_t *codes))

/* The first `steps` steps of a panel, `count` columns each, a multiple of 16 (of 32 for 1 and 3
 * bits): range_f32, cover_f16 and encode_f32 for LBQ_PANEL rows, then packed codes, scales and any
 * offsets as float16. Returns what range_f32 does; if 0, the panel is undefined. */
X(round_panel, int,
  (const float *w, ptrdiff_t stride, ptrdiff_t steps, ptrdiff_t count, float limit,
   const lbq_cover *cover, int top, int bits, uint8_t *panel))

/* y[i] = x[i] as a float; count is a multiple of 16; exact. */
X(widen_i8, void, (const int8_t *x, ptrdiff_t count, float *y))

/* Columns of `rows` <= LBQ_PANEL rows, `stride` apart, to lanes: lanes[place[i]][r] =
 * w[r * stride + columns[i]] for i < count, and 0 for the rows past `rows`; a place has LBQ_PANEL
 * lanes. columns ascend; if both are NULL, they are 0, 1, ...; exact. */
X(to_lanes_f32, void,
  (const float *w, ptrdiff_t stride, ptrdiff_t rows, const int64_t *columns, const int64_t *place,
   ptrdiff_t count, float *lanes))

/* And back: codes[r * stride + columns[i]] = lanes[place[i]][r]; neither is NULL; exact. */
X(from_lanes_u8, void,
  (const uint8_t *lanes, const int64_t *columns, const int64_t *place, ptrdiff_t count,
   ptrdiff_t rows, ptrdiff_t stride, uint8_t *codes))

/* Minimum and maximum of LBQ_PANEL groups of weights w (count, LBQ_PANEL), count >= 1; low and high
 * as [group]; exact. */
X(lanes_range_f32, void, (const float *w, ptrdiff_t count, float *low, float *high))

/* Replaces w (count, LBQ_PANEL) by (w - shift) * inverse; change as [2][group]: shift, inverse.
 * moments as [3][group]: the sums over k of importance times 1, w, w^2 with the new w, the last by
 * fma. importance has the shape of w; NULL: ones; exact. */
X(centre_f32, void,
  (float *w, const float *importance, ptrdiff_t count, const float *change, float *moments))

/* How well LBQ_PANEL groups of weights w (count, LBQ_PANEL) fit their grids. With
 *     x = fma(w, inverse, start), v = x clipped to 0..top <= 255, ties to even, r = x - v
 * sums as [3][group] are those of importance times r, r v, r^2, the last two by fma. grid as
 * [2][group]: inverse, start. importance has the shape of w; NULL: ones; exact. */
X(grid_sums_f32, void,
  (const float *w, const float *importance, ptrdiff_t count, const float *grid, int top,
   float *sums))

/* The same for a table of levels: v = first + jump[0] + jump[1] + ..., added in this order, with 0
 * in place of jump[j] unless x > middle[j], j < jumps; exact. */
X(table_sums_f32, void,
  (const float *w, const float *importance, ptrdiff_t count, const float *grid, float first,
   int jumps, const float *middle, const float *jump, float *sums))

/* Evaluates the sums of grid_sums_f32 or table_sums_f32. refit as [4][group]: the sum of importance
 * times (w - q)^2; scale and offset of the least squares refit to the same codes, where scale is 0
 * if there is none and offset is -zero * scale if symmetric; the sum of squares of the refit.
 * moments as [4][group]: the sums of importance times 1, w, w^2, and 1 / the first; grid as
 * [4][group]: inverse, start, scale = 1 / inverse, offset = -start * scale; exact. */
X(refit_f32, void,
  (const float *moments, const float *grid, const float *sums, int symmetric, float zero,
   float *refit))

/* The same refit. Where there is one with a sum of squares below `enough` times that in best, best
 * as [3][group] gets its sum of squares, scale and offset. Returns whether any group improved;
 * exact. */
X(improve_f32, int,
  (const float *moments, const float *grid, const float *sums, int symmetric, float zero,
   float enough, float *best))

/* sum[j][l] += R[i * stride + j] * e[i][l] for i = 0, 1, ..., count - 1 in order, j < width and
 * LBQ_PANEL rows l; sum[j] and sum[j + 1] are `pitch` floats apart, as are e[i] and e[i + 1];
 * exact. */
X(feedback_f32, void,
  (ptrdiff_t count, ptrdiff_t width, const float *R, ptrdiff_t stride, const float *e,
   ptrdiff_t pitch, float *sum))

/* Solves R^T y = x in place, x (count, LBQ_PANEL), R (count, count) upper triangular with ones on
 * its diagonal: x[j] -= x[i] * R[i * stride + j] for i = 0, 1, ..., j - 1 in order; exact. */
X(solve_f32, void, (ptrdiff_t count, const float *R, ptrdiff_t stride, float *x))

/* y[c] += factor[i] * matrix[row[i] * stride + c] for i < count, c < width. */
X(add_rows_f32, void,
  (ptrdiff_t count, const int32_t *row, const float *factor, const float *matrix, ptrdiff_t stride,
   ptrdiff_t width, float *y))

/* One column of LBQ_PANEL rows, each with its own grid: the code is (w + shift - offset) * inverse,
 * clipped to 0..top <= 255, ties to even, and e = w - (scale * code + offset); exact. grid as
 * [3][row]: scale, offset, inverse; e may be shift. */
X(round_f32, void,
  (const float *grid, int top, const float *w, const float *shift, uint8_t *codes, float *e))

/* One row of Viterbi's algorithm for a trellis, whose states u < count are the parts that windows
 * have in common with the next row's:
 *     after[u] = min over word < 2^bits of
 *         before[(u * 2^bits + word) mod count] + sum over c of (target[c] - scale * level)^2
 * with level = levels[c][word][u], c < cols; the squares are added first. cols is 1, or 2 if bits
 * is 3; count is a multiple of 16 * 2^bits; exact. */
X(viterbi_f32, void,
  (int bits, int cols, ptrdiff_t count, const float *levels, float scale, const float *target,
   const float *before, float *after))

/* y[i] = gain[i] x[i] / sqrt(mean of x^2 + epsilon); gain may be NULL, y may be x. Where squares
 * leave the range of float32 they are summed in float64 (norm.h), so every finite x works. */
X(rmsnorm_f32, void, (const float *x, const float *gain, ptrdiff_t count, float epsilon, float *y))

/* How many |x[i]| exceed the threshold; sum and maximum of |x[i]|, 0 if there is none. Every
 * 64th number goes to the same partial sum; then halves of these are added to halves; exact. A NaN
 * makes the sum NaN and is passed over elsewhere. */
X(moments_f32, ptrdiff_t,
  (const float *x, ptrdiff_t count, float threshold, float *sum, float *largest))

/* y[i] = up[i] gate[i] / (1 + exp(-gate[i])); y may be gate or up. */
X(swiglu_f32, void, (const float *gate, const float *up, ptrdiff_t count, float *y))

/* One update of an online softmax in base 2, for rows of x `stride` apart. With new = max(max, x),
 *     x[i] = 2^(x[i] - new), factor = 2^(max - new), sum = sum factor + sum of x[i], max = new
 * max is finite. x[i] may be -infinity; at the end of a row that changes no bit. max, sum and
 * factor have `rows` entries; count >= 1. */
X(softmax_f32, void,
  (ptrdiff_t rows, ptrdiff_t count, float *x, ptrdiff_t stride, float *max, float *sum,
   float *factor))

/* Maximum of count >= 1 numbers; undefined if any is NaN. */
X(max_f32, float, (const float *x, ptrdiff_t count))

/* Sum of exp(x[i] - shift), accumulated in float64; no x[i] exceeds shift. */
X(exp_sum_f32, double, (const float *x, ptrdiff_t count, float shift))

/* Sum of exp(a) (a - b) with a = p[i] - p_shift <= 0, b = q[i] - q_shift, in float64. */
X(exp_gap_f32, double,
  (const float *p, const float *q, ptrdiff_t count, float p_shift, float q_shift))

/* `count` blocks of n = 2^k numbers, each x <- after o (H (before o x)) with Sylvester's matrix H;
 * before and after (count n), or NULL for ones. The butterflies (a + b, a - b) have distance 1, 2,
 * 4, ..., n / 2 in this order, so the bits are the same everywhere. */
X(hadamard_sylvester, void,
  (ptrdiff_t n, ptrdiff_t count, const float *before, const float *after, float *x))

/* x (order, lanes) <- after o (A^T (before o x)), A (order, order) row-major, before and after
 * (order, lanes), or NULL for ones. Sums run over the rows of A in ascending order, with an fma
 * where an entry is not +-1, so the bits are the same everywhere. scratch (order,
 * LBQ_HADAMARD_LANES), 64-byte aligned. */
X(hadamard_base, void,
  (const float *A, ptrdiff_t order, ptrdiff_t lanes, const float *before, const float *after,
   float *x, float *scratch))

#undef X
