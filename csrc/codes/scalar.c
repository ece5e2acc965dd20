/* Kinds with one word per weight: a level of a grid or of a table. */
#include <math.h>
#include <string.h>

#include "codes/code.h"
#include "codes/stored.h"
#include "core/pack.h"
#include "core/threads.h"

static inline bool
odd(int value)
{
    return value & 1;
}

uint8_t
lbq_code_encode(const lbq_code *code, double w, double scale, double offset)
{
    const double x = scale != 0 ? (w - offset) / scale : 0;
    const int top = code->count - 1;
    if (!code->levels)
        return (uint8_t)(x > 0 ? x < top ? rint(x) : top : 0);
    int value = 0;
    for (; value < top && scale != 0; value++) {
        const double middle = 0.5 * ((double)code->levels[value] + code->levels[value + 1]);
        if (!(x > middle || (x == middle && odd(value))))
            break;
    }
    return (uint8_t)value;
}

double
lbq_code_decode(const lbq_code *code, uint8_t value, double scale, double offset)
{
    return scale * (code->levels ? code->levels[value] : value) + offset;
}

/* --- rounding --------------------------------------------------------------------------------- */

static void
encode_uniform(const lbq_code *code, const lbq_grid *grid, const float *w, const float *shift,
               ptrdiff_t pitch, uint8_t *words, float *e, void *scratch)
{
    (void)pitch, (void)scratch;
    lbq_kernel.round_f32(grid->lanes, code->count - 1, w, shift, words, e);
}

static void
encode_uniform_f64(const lbq_code *code, const double *lanes, const double *w, const double *shift,
                   uint8_t *words, double *e)
{
    const int top = code->count - 1;
    for (int l = 0; l < LBQ_PANEL; l++) {
        const double x = (w[l] + shift[l] - lanes[LBQ_PANEL + l]) * lanes[2 * LBQ_PANEL + l];
        words[l] = (uint8_t)(x > 0 ? x < top ? rint(x) : top : 0);
        e[l] = w[l] - (lanes[l] * words[l] + lanes[LBQ_PANEL + l]);
    }
}

static void
encode_uniform_rows(const lbq_code *code, const lbq_grid *grid, const float *w, ptrdiff_t stride,
                    ptrdiff_t count, ptrdiff_t ahead, uint8_t *words)
{
    lbq_kernel.encode_f32(w, stride, grid->rows, count, grid->lanes, code->count - 1, ahead, words);
}

/* The kernel supports float16 grids over the range. */
static ptrdiff_t
pack_uniform(const lbq_code *code, const lbq_search *search, const lbq_packed *packed,
             const float *W, float limit, uint8_t *panel, bool *fit)
{
    if (packed->group >= packed->cols || code->scale_bits != 16 ||
        search->method != LBQ_RANGE_MINMAX)
        return 0;
    const ptrdiff_t step = lbq_packed_step(packed), steps = packed->cols / step;
    const lbq_cover cover = lbq_cover_of(code, search->clip);
    *fit = lbq_kernel.round_panel(
        W, packed->cols, steps, step, limit, &cover, code->count - 1, code->bits, panel);
    return steps;
}

static lbq_status
check_table(const lbq_code *code)
{
    for (int i = 1; i < code->count; i++)
        LBQ_REQUIRE(code->levels[i - 1] <= code->levels[i],
                    LBQ_BAD_VALUE,
                    "levels[%d] is %g, expected ascending levels",
                    i,
                    (double)code->levels[i]);
    return LBQ_OK;
}

#define ENCODE_TABLE(name, real)                                                                   \
    static inline void name(const lbq_code *code,                                                  \
                            const real *lanes,                                                     \
                            const real *w,                                                         \
                            const real *shift,                                                     \
                            uint8_t *words,                                                        \
                            real *e)                                                               \
    {                                                                                              \
        for (int l = 0; l < LBQ_PANEL; l++) {                                                      \
            const double scale = (double)lanes[l], offset = (double)lanes[LBQ_PANEL + l];          \
            words[l] = lbq_code_encode(code, (double)(w[l] + shift[l]), scale, offset);            \
            e[l] = w[l] - (real)lbq_code_decode(code, words[l], scale, offset);                    \
        }                                                                                          \
    }
ENCODE_TABLE(round_to_levels, float)
ENCODE_TABLE(encode_table_f64, double)
#undef ENCODE_TABLE

static void
encode_table(const lbq_code *code, const lbq_grid *grid, const float *w, const float *shift,
             ptrdiff_t pitch, uint8_t *words, float *e, void *scratch)
{
    (void)pitch, (void)scratch;
    round_to_levels(code, grid->lanes, w, shift, words, e);
}

static void
encode_table_rows(const lbq_code *code, const lbq_grid *grid, const float *w, ptrdiff_t stride,
                  ptrdiff_t count, ptrdiff_t ahead, uint8_t *words)
{
    (void)ahead;
    memset(words, 0, (size_t)(lbq_pieces(count, 16) * 16 * LBQ_PANEL));
    for (ptrdiff_t r = 0; r < grid->rows; r++) {
        const double scale = (double)grid->lanes[r], offset = (double)grid->lanes[LBQ_PANEL + r];
        uint8_t row[LBQ_MAX_STEP] = {0};
        for (ptrdiff_t k = 0; k < count; k++)
            row[k] = lbq_code_encode(code, (double)w[r * stride + k], scale, offset);
        for (ptrdiff_t k = 0; k < count; k += 4)
            memcpy(words + lbq_word_at(k, r), row + k, 4);
    }
}

/* --- products --------------------------------------------------------------------------------- */

static void
expand_table(const lbq_code *code, ptrdiff_t columns, uint8_t *words)
{
    if (code->bytes.bits == 8)
        lbq_kernel.lookup_u8(code->bytes.table, columns * LBQ_PANEL, words);
}

static lbq_gemv
gemv_uniform(const lbq_code *code)
{
    switch (code->bits) {
    case 1:
        return lbq_kernel.gemv_u1_i8;
    case 2:
        return lbq_kernel.gemv_u2_i8;
    case 3:
        return lbq_kernel.gemv_u3_i8;
    case 4:
        return lbq_kernel.gemv_u4_i8;
    default:
        return lbq_kernel.gemv_u8_i8;
    }
}

static lbq_gemv
gemv_table(const lbq_code *code)
{
    return code->bits == 1   ? lbq_kernel.gemv_u1_i8
           : code->bits == 2 ? lbq_kernel.gemv_t2_i8
           : code->bits == 3 ? lbq_kernel.gemv_t3_i8
                             : lbq_kernel.gemv_t4_i8;
}

/* --- the kinds -------------------------------------------------------------------------------- */

#define UNIFORM                                                                                    \
    .rows = 1, .cols = 1, .ordered = true, .encode = encode_uniform,                               \
    .encode_f64 = encode_uniform_f64, .encode_rows = encode_uniform_rows, .pack = pack_uniform,    \
    .gemv = gemv_uniform, .fit = lbq_code_fit

#define TABLE                                                                                      \
    .rows = 1, .cols = 1, .ordered = true, .check = check_table, .encode = encode_table,           \
    .encode_f64 = encode_table_f64, .encode_rows = encode_table_rows, .expand = expand_table,      \
    .gemv = gemv_table, .fit = lbq_code_fit

const lbq_code_kind lbq_kind_int = {
    .name = "int", .rates = "1 2 3 4 5 6 7 8", .offsets = true, UNIFORM};
const lbq_code_kind lbq_kind_ternary = {.name = "ternary", .rates = "", .count = 3, UNIFORM};
const lbq_code_kind lbq_kind_binary = {.name = "binary", .rates = "", .count = 2, UNIFORM};
const lbq_code_kind lbq_kind_nf = {.name = "nf", .rates = "4", .table = LBQ_FIXED_TABLE, TABLE};
const lbq_code_kind lbq_kind_log = {
    .name = "log", .rates = "2 3 4", .table = LBQ_FIXED_TABLE, TABLE};
const lbq_code_kind lbq_kind_kmeans = {
    .name = "kmeans", .rates = "1 2 3 4", .table = LBQ_LEARNED_TABLE, TABLE};
