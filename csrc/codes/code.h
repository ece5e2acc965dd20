/* Codes: how words stand for weights, and how a group's scale and offset are found.
 *
 *     w ~ scale * level(words) + offset
 *
 * A code's kind, one row of the table in kinds.c, defines what words mean. Code that rounds passes
 * it a strip, the weights of one block of `rows` x `cols`, and knows nothing else about codes.
 * Kinds with blocks of 1 x 1 (scalar.c) have the levels 0, 1, ..., count - 1 or a table. A
 * symmetric code stores no offset; it uses -zero * scale. Binary (-1, +1) is the uniform code with
 * count 2 and zero 1/2, ternary (-1, 0, +1) the one with count 3 and zero 1. For binary the search
 * for scales finds the mean of |w|, for ternary a threshold and the mean of |w| above it. */
#ifndef LBQ_CODE_H
#define LBQ_CODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/packed.h"
#include "core/status.h"
#include "kernels/kernels.h"
#include "kernels/trellis.h"

enum {
    LBQ_MAX_LEVELS = 16, /* of a table */
    LBQ_MAX_RUN = 16,    /* columns of a block, at most */
    LBQ_NAME = 32,       /* bytes of a code's name */
};

typedef struct lbq_code lbq_code;

/* How the range of a group is chosen. */
typedef enum {
    LBQ_RANGE_MINMAX,     /* the smallest range that clips nothing, times `clip` */
    LBQ_RANGE_PERCENTILE, /* the same for the values between two percentiles */
    LBQ_RANGE_MSE, /* the best of `candidates` shrunken ranges by sum importance |w - q|^norm; then
                      scale and offset are refitted by least squares while that lowers the sum;
                      never worse than minmax */
} lbq_range_method;

/* "minmax", "percentile", "mse"; LBQ_BAD_VALUE for another name. */
lbq_status lbq_range_method_find(const char *name, lbq_range_method *method);

/* How scales and offsets are searched. */
typedef struct {
    lbq_range_method method;
    double clip;       /* MINMAX, PERCENTILE: fraction of the range to keep, usually 1 */
    double percentile; /* PERCENTILE: 50 to 100; clips the tail beyond it on both sides */
    int candidates;    /* MSE: shrink factors 1, 1 - shrink / candidates, ... */
    double shrink;     /* MSE: the smallest factor is just above 1 - shrink */
    double norm;       /* MSE: the exponent; 2 is fast, GPTQ's code uses 2.4 */
} lbq_search;

/* LBQ_PANEL groups of weights, one per lane, or one long group spread over all lanes. */
typedef struct {
    float *w;                /* (count, LBQ_PANEL), finite; overwritten by the search */
    const float *importance; /* same shape: shares (codes/importance.h), or NULL */
    ptrdiff_t count;
    bool together; /* the lanes are parts of one group */
    int rest;      /* together: the first `rest` lanes hold one extra weight, stored after the
                      others; in the other lanes w is finite there and importance 0 */
    const float *low, *high; /* minimum and maximum of each group, or NULL */
} lbq_groups;

/* Grids of a strip's rows, one lane per row: scale, offset and 1 / scale as [3][rows of the strip].
 * Lanes beyond `rows` are padding: their weights are zero, their errors ignored. */
typedef struct {
    ptrdiff_t rows;
    const float *lanes;
} lbq_grid;

/* A panel, or all panels of a strip, times a few tokens. */
typedef void (*lbq_gemv)(const lbq_panel *panel, const lbq_activations *x, float *y);

/* Where the levels of a kind come from. */
typedef enum { LBQ_NO_TABLE, LBQ_FIXED_TABLE, LBQ_LEARNED_TABLE } lbq_table;

/* A kind of code. Words of a strip are bytes, laid out as by lbq_step_unpack panel after panel:
 * [panel][k / 4][row][k % 4]. */
typedef struct {
    const char *name;  /* as in formats: "int" */
    const char *rates; /* bits per weight that may follow the name, and what distinguishes codes of
                          the same rate: "1.5 2 2w10"; "" if none may */
    int rows, cols;    /* block whose words are chosen together: rows is 1 or LBQ_STRIP; cols at
                          most LBQ_MAX_RUN */
    int word_cols; /* columns that share a word, stored for the first of them, the others have 0; 2
                      for fractional rates. 0 means 1 */
    int count;     /* values of a word; 0: 2^rate */
    int top;       /* the largest level; 0: count - 1 */
    const lbq_trellis *trellises; /* one for each rate, or NULL */
    bool ordered;                 /* word + 1 is the next level, so that neighbours can be tried */
    bool offsets;                 /* offsets may be stored */
    lbq_table table;
    /* LBQ_OK if weights can be rounded to the code. NULL: they always can. */
    lbq_status (*check)(const lbq_code *code);
    /* Bytes of scratch for encode. NULL: none. */
    size_t (*scratch)(const lbq_code *code);
    /* Words for the weights w + shift of one block, and e = w - decoded words. w and words are
     * (cols, rows of the strip); so are shift and e, which may be the same array, but with columns
     * `pitch` apart. */
    void (*encode)(const lbq_code *code, const lbq_grid *grid, const float *w, const float *shift,
                   ptrdiff_t pitch, uint8_t *words, float *e, void *scratch);
    /* The same in float64, for blocks of 1 x 1. NULL: words are chosen in float32. */
    void (*encode_f64)(const lbq_code *code, const double *lanes, const double *w,
                       const double *shift, uint8_t *words, double *e);
    /* The words that encode would choose, but faster, for whole rows `stride` apart. Lanes of
     * missing rows and columns up to a multiple of 16 get 0. `ahead`: as in encode_f32. NULL: no
     * faster way. */
    void (*encode_rows)(const lbq_code *code, const lbq_grid *grid, const float *w,
                        ptrdiff_t stride, ptrdiff_t count, ptrdiff_t ahead, uint8_t *words);
    /* Rounds LBQ_PANEL rows of W to a panel, scales included, with a single kernel; returns the
     * number of steps it did. *fit: whether all weights are within +-limit. NULL: no such
     * kernel. */
    ptrdiff_t (*pack)(const lbq_code *code, const lbq_search *search, const lbq_packed *packed,
                      const float *W, float limit, uint8_t *panel, bool *fit);
    /* Replaces `columns` columns of words, in place, by the bytes of their levels; these are the
     * levels themselves unless there is a table. NULL: words are already these bytes. */
    void (*expand)(const lbq_code *code, ptrdiff_t columns, uint8_t *words);
    /* The bytes of a strip's levels straight from its codes of one step, those of its panels
     * `panel_bytes` apart; as [panel][k / 4][row][k % 4], panels `pitch` apart. For blocks of
     * LBQ_STRIP rows; else NULL. */
    void (*read)(const lbq_code *code, const uint8_t *codes, ptrdiff_t panel_bytes,
                 ptrdiff_t columns, ptrdiff_t pitch, uint8_t *bytes);
    /* A kernel for a few tokens. NULL: expand, then GEMM. */
    lbq_gemv (*gemv)(const lbq_code *code);
    /* Scales and offsets (LBQ_PANEL) of groups, rounded to their stored form. */
    void (*fit)(const lbq_code *code, const lbq_search *search, const lbq_groups *groups,
                float *scale, float *offset);
} lbq_code_kind;

/* Levels as bytes, for kernels that multiply integers: level ~ base + step * byte. */
typedef struct {
    float base, step;
    int bits;          /* of the bytes */
    uint8_t table[16]; /* byte of code i % 2^bits, if expand looks it up */
} lbq_byte_levels;

struct lbq_code {
    const lbq_code_kind *kind;
    int bits;       /* of a word in the packed layout */
    int count;      /* values of a word, 2 to 256 */
    bool symmetric; /* offset = -zero * scale, not fitted */
    float zero;
    const float *levels;        /* a table of `count` values, or NULL */
    const lbq_trellis *trellis; /* of kinds that have one */
    int scale_bits; /* how scales and offsets are stored. 16: float16. 8 or 4: multiples of `unit`,
                       1 to 2^scale_bits - 1. 0: float32 */
    float unit;     /* 0: not chosen yet, scales stay float32 */
    lbq_byte_levels bytes;
};

/* All kinds, NULL-terminated. The name of code number `index`, counted kind by kind and rate by
 * rate; false past the last. */
extern const lbq_code_kind *const lbq_code_kinds[];
bool lbq_code_name(int index, char name[LBQ_NAME]);

/* The code called `name`: symmetric with its default zero, float16 scales, no table; enough for
 * layouts and properties. LBQ_BAD_VALUE for an unknown name. */
lbq_status lbq_code_find(const char *name, lbq_code *code);

/* Completes a code for use. `levels` has one level per code for kinds with a table, none for others
 * (else LBQ_BAD_SHAPE). LBQ_BAD_VALUE unless the rest fits together. */
lbq_status lbq_code_set(lbq_code *code, const float *levels, ptrdiff_t level_count, bool symmetric,
                        float zero, int scale_bits, float unit);

/* The layout of a matrix of the code; panels is NULL, and group is not checked. */
lbq_packed lbq_code_layout(const lbq_code *code, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t group);

/* LBQ_BAD_VALUE unless weights can be rounded to the code and, if `search` is not NULL, scales can
 * be found by it. */
lbq_status lbq_code_check(const lbq_code *code, const lbq_search *search);

/* The same, and LBQ_BAD_VALUE unless the kind is ordered. */
lbq_status lbq_code_check_ordered(const lbq_code *code);

static inline int
lbq_word_cols(const lbq_code_kind *kind)
{
    return kind->word_cols ? kind->word_cols : 1;
}

/* Rows of a strip, the unit of work: LBQ_PANEL, or the rows of a larger block. */
static inline ptrdiff_t
lbq_strip_rows(const lbq_code *code)
{
    return code->kind->rows > LBQ_PANEL ? code->kind->rows : LBQ_PANEL;
}

/* Number of values of a word; the level that represents 0; the level of an ordered code's word. */
static inline int
lbq_level_count(const lbq_code *code)
{
    return code->count;
}

static inline float
lbq_code_zero(const lbq_code *code)
{
    return code->zero;
}

static inline float
lbq_level_of(const lbq_code *code, int word)
{
    return code->levels ? code->levels[word] : (float)word;
}

/* Fits scalar codes. MINMAX and PERCENTILE round outwards, so that rounding clips nothing. A scale
 * is at least the smallest that can be stored, unless zeros fit a group better than its grid: then
 * a symmetric code, which may have no level of 0, and with MSE any code gets scale and offset 0.
 * Offsets not stored as float16 need a scale; such codes get the smallest one. float16 scales and
 * offsets saturate at 65504. */
void lbq_code_fit(const lbq_code *code, const lbq_search *search, const lbq_groups *groups,
                  float *scale, float *offset);

/* Grids over the ranges [low, high] times `clip`: MINMAX in lbq_code_fit, before it compares them
 * with zeros. */
void lbq_range_fit(const lbq_code *code, double clip, const float *low, const float *high,
                   float *scale, float *offset);

/* Word of the nearest level of a scalar code; ties go to the even word. 0 if scale is 0. */
uint8_t lbq_code_encode(const lbq_code *code, double w, double scale, double offset);

/* scale * level + offset. */
double lbq_code_decode(const lbq_code *code, uint8_t value, double scale, double offset);

/* Whether a grid fitted to [low, high] covers that range: its scale and offset did not saturate. */
bool lbq_grid_reaches(const lbq_code *code, float low, float high, float scale, float offset);

/* LBQ_BAD_VALUE, naming row and column, for a NaN or infinity in W, or a weight too large for any
 * scale of `scale_bits`. */
lbq_status lbq_check_weights(int scale_bits, ptrdiff_t rows, ptrdiff_t cols, const float *W);

/* The table of NF4 (count 16), or `count` = 2^b signed powers of two: 0, +-1, +-1/2, ...; the
 * smallest is positive only. */
void lbq_levels_nf4(float *levels);
void lbq_levels_log(int count, float *levels);

/* Number of the `bins` bins of a histogram of |x| to keep so that `levels` equal steps over them
 * lose the least information (Kullback-Leibler divergence of the quantized histogram from the
 * clipped one); on a tie the largest number. LBQ_BAD_VALUE for an empty histogram. */
lbq_status lbq_entropy_range(const double *counts, int bins, int levels, int *kept);

/* The `count` levels, ascending, that minimise sum weights (values - nearest level)^2. Exact up to
 * 2048 values; above, exact for 2048 bins of equal population, then refined by Lloyd's iteration on
 * all values. weights (n), positive, or NULL. LBQ_BAD_VALUE for a NaN. */
lbq_status lbq_kmeans(ptrdiff_t n, const double *values, const double *weights, int count,
                      double *levels);

#endif
