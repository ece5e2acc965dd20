/* Codes: how words stand for weights, and how a group's scale and offset are found.
 *
 *     w ~ scale * level(words) + offset
 *
 * What words mean is the business of a code's kind, one row of the table in kinds.c. Whoever rounds
 * hands over a strip, the weights of one block of `rows` x `cols`, and knows nothing else about
 * codes. Kinds with blocks of 1 x 1 (scalar.c) have the levels 0, 1, ..., count - 1 or a table. A
 * symmetric code stores no offset: it is -zero * scale. Binary (-1, +1) and ternary (-1, 0, +1) are
 * the uniform codes with count 2 and zero 1/2, count 3 and zero 1: the search for scales finds the
 * mean of |w| for the first, threshold and mean of what exceeds it for the second. */
#ifndef LBQ_CODE_H
#define LBQ_CODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/packed.h"
#include "core/status.h"
#include "kernels/kernels.h"

enum {
    LBQ_MAX_LEVELS = 16, /* of a table */
    LBQ_STRIP = 64,      /* rows of a strip, and */
    LBQ_MAX_RUN = 16,    /* columns of a block, at most */
    LBQ_NAME = 32,       /* bytes of a code's name */
};

typedef struct lbq_code lbq_code;

/* How the range of a group is chosen. */
typedef enum {
    LBQ_RANGE_MINMAX,     /* the smallest range that clips nothing, times `clip` */
    LBQ_RANGE_PERCENTILE, /* the same for the values between two percentiles */
    LBQ_RANGE_MSE,        /* of `candidates` shrunken ranges the one with the least
                             sum importance |w - q|^norm, then scale and offset refitted by least
                             squares while that lowers it; never worse than minmax */
} lbq_range_method;

/* "minmax", "percentile", "mse"; LBQ_BAD_VALUE for another name. */
lbq_status lbq_range_method_find(const char *name, lbq_range_method *method);

/* How scales and offsets are searched. */
typedef struct {
    lbq_range_method method;
    double clip;       /* MINMAX, PERCENTILE: the part of the range that is kept, usually 1 */
    double percentile; /* PERCENTILE: 50 to 100, clips this tail on both sides */
    int candidates;    /* MSE: shrink factors 1, 1 - shrink / candidates, ... */
    double shrink;     /* MSE: the smallest factor is just above 1 - shrink */
    double norm;       /* MSE: the exponent; 2 is fast, GPTQ's code uses 2.4 */
} lbq_search;

/* LBQ_PANEL groups of weights, one in each lane, or one long group spread over all lanes. */
typedef struct {
    float *w;                /* (count, LBQ_PANEL), finite; overwritten by the search */
    const float *importance; /* alike, shares as in codes/importance.h, or NULL */
    ptrdiff_t count;
    bool together; /* the lanes are parts of one group */
    int rest;      /* together: the first `rest` lanes hold one extra weight, stored after the
                      others; in the other lanes w is finite there and importance 0 */
    const float *low, *high; /* minimum and maximum of each group, or NULL */
} lbq_groups;

/* Grids of a strip's rows, one lane a row: [3][rows of the strip], scale, offset, 1 / scale. Lanes
 * beyond `rows` are padding: their weights are zero and their errors do not count. */
typedef struct {
    ptrdiff_t rows;
    const float *lanes;
} lbq_grid;

typedef void (*lbq_gemv)(const lbq_panel *panel, const lbq_activations *x, float *y);

/* Where the levels of a kind come from. */
typedef enum { LBQ_NO_TABLE, LBQ_FIXED_TABLE, LBQ_LEARNED_TABLE } lbq_table;

/* A kind of code. Words of a strip lie as lbq_step_unpack leaves them, a byte each, panel after
 * panel: [panel][k / 4][row][k % 4]. */
typedef struct {
    const char *name;  /* as in formats: "int" */
    const char *rates; /* bits a weight, that may follow the name: "1.5 2 3"; "": none does */
    int rows, cols;    /* the block whose words are chosen together; rows are 1, LBQ_PANEL or more
                          whole panels, up to LBQ_STRIP, cols at most LBQ_MAX_RUN */
    int word_cols;     /* columns that share a word, which is the first one's, the others have 0;
                          2 where rates are not whole. 0: 1 */
    int count;         /* values of a word; 0: 2^rate */
    int top;           /* the largest level; 0: count - 1 */
    bool ordered;      /* word + 1 is the next level, so that neighbours can be tried */
    bool offsets;      /* offsets may be stored */
    lbq_table table;
    /* LBQ_OK if weights can be rounded to the code. NULL: they always can. */
    lbq_status (*check)(const lbq_code *code);
    /* Bytes that encode takes. NULL: none. */
    size_t (*scratch)(const lbq_code *code);
    /* Words for the weights w + shift of one block, and e = w - what the words stand for. w and
     * words (cols, rows of the strip); shift and e, which may be the same, alike but `pitch` from
     * one column to the next. */
    void (*encode)(const lbq_code *code, const lbq_grid *grid, const float *w, const float *shift,
                   ptrdiff_t pitch, uint8_t *words, float *e, void *scratch);
    /* The same in float64 for blocks of 1 x 1. NULL: words are chosen in float32. */
    void (*encode_f64)(const lbq_code *code, const double *lanes, const double *w,
                       const double *shift, uint8_t *words, double *e);
    /* Words of whole rows, `stride` apart, as encode finds them, where that has a faster way; zeros
     * in the lanes of further rows and up to whole 16 columns. `ahead`: as in encode_f32. */
    void (*encode_rows)(const lbq_code *code, const lbq_grid *grid, const float *w,
                        ptrdiff_t stride, ptrdiff_t count, ptrdiff_t ahead, uint8_t *words);
    /* A panel of LBQ_PANEL rows W, scales included, as far as one kernel does it all: how many
     * steps. *fit: whether no weight exceeds +-limit. NULL: none. */
    ptrdiff_t (*pack)(const lbq_code *code, const lbq_search *search, const lbq_packed *packed,
                      const float *W, float limit, uint8_t *panel, bool *fit);
    /* The first `columns` of `step` columns of words to values fma(scale, level, offset), w[k *
     * stride + row of the strip]. words may be overwritten. */
    void (*decode)(const lbq_code *code, const lbq_grid *grid, uint8_t *words, ptrdiff_t step,
                   ptrdiff_t columns, ptrdiff_t stride, float *w);
    /* `columns` columns of words, in place, to the bytes that stand for their levels. NULL: words
     * are those bytes. */
    void (*expand)(const lbq_code *code, ptrdiff_t columns, uint8_t *words);
    /* A kernel for a few tokens. NULL: expand, then GEMM. */
    lbq_gemv (*gemv)(const lbq_code *code);
    /* Scales and offsets (LBQ_PANEL) of groups, rounded to what is stored. */
    void (*fit)(const lbq_code *code, const lbq_search *search, const lbq_groups *groups,
                float *scale, float *offset);
} lbq_code_kind;

/* Levels as bytes, for kernels that multiply integers: level ~ base + step * byte. */
typedef struct {
    float base, step;
    int bits;          /* of the bytes */
    uint8_t table[16]; /* of code i % 2^bits, where expand looks them up */
} lbq_byte_levels;

struct lbq_code {
    const lbq_code_kind *kind;
    int bits;       /* of a word in the packed layout */
    int count;      /* values of a word, 2 to 256 */
    bool symmetric; /* offset = -zero * scale, not fitted */
    float zero;
    const float *levels; /* a table of `count` values, or NULL */
    int scale_bits;      /* what scales and offsets are rounded to. 16: float16. 8 or 4: whole
                            multiples of `unit` from 1 to 2^scale_bits - 1. 0: float32 */
    float unit;          /* 0: not chosen yet, scales stay float32 */
    lbq_byte_levels bytes;
};

/* The kinds; NULL ends them. And the name of code number `index` of all, kind by kind and rate by
 * rate; false behind the last. */
extern const lbq_code_kind *const lbq_code_kinds[];
bool lbq_code_name(int index, char name[LBQ_NAME]);

/* The code called `name`, symmetric with its own zero, float16 scales and without a table; for
 * layouts and properties. LBQ_BAD_VALUE for another name. */
lbq_status lbq_code_find(const char *name, lbq_code *code);

/* Gives the code what it needs to be used: `level_count` levels belong to kinds with a table and to
 * no others. LBQ_BAD_VALUE unless all fits together. */
lbq_status lbq_code_set(lbq_code *code, const float *levels, ptrdiff_t level_count, bool symmetric,
                        float zero, int scale_bits, float unit);

/* The layout of a matrix of the code; panels are NULL, group must not be checked yet. */
lbq_packed lbq_code_layout(const lbq_code *code, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t group);

/* LBQ_BAD_VALUE unless weights can be rounded to the code, with scales found by the search unless
 * that is NULL. */
lbq_status lbq_code_check(const lbq_code *code, const lbq_search *search);

/* The same, and that the next word is the next level. */
lbq_status lbq_code_check_ordered(const lbq_code *code);

static inline int
lbq_word_cols(const lbq_code_kind *kind)
{
    return kind->word_cols ? kind->word_cols : 1;
}

/* Rows of a strip, the unit of work: LBQ_PANEL or those of a larger block. */
static inline ptrdiff_t
lbq_strip_rows(const lbq_code *code)
{
    return code->kind->rows > LBQ_PANEL ? code->kind->rows : LBQ_PANEL;
}

/* Values that a word has; the level that stands for 0; that of a word of an ordered code. */
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

/* Decodes kinds whose bytes are their levels. */
void lbq_decode_bytes(const lbq_code *code, const lbq_grid *grid, uint8_t *words, ptrdiff_t step,
                      ptrdiff_t columns, ptrdiff_t stride, float *w);

/* Fits scalar codes. MINMAX and PERCENTILE round outwards, so that rounding clips nothing. A scale
 * is at least the smallest that can be stored; a symmetric code to which zeros are nearer than that
 * grid, as it has no level of 0, gets scale 0. MSE gives other codes to which zeros are nearer the
 * smallest scale and offset 0. float16 ends at 65504, where scale and offset saturate. */
void lbq_code_fit(const lbq_code *code, const lbq_search *search, const lbq_groups *groups,
                  float *scale, float *offset);

/* Grids over the ranges [low, high] times `clip`, as MINMAX fits them before lbq_code_fit compares
 * them with zeros. */
void lbq_range_fit(const lbq_code *code, double clip, const float *low, const float *high,
                   float *scale, float *offset);

/* The code of the nearest value of a scalar code; ties go to the even code. 0 if scale is 0. */
uint8_t lbq_code_encode(const lbq_code *code, double w, double scale, double offset);

/* scale * level + offset. */
double lbq_code_decode(const lbq_code *code, uint8_t value, double scale, double offset);

/* Whether a grid fitted to the range [low, high] reaches it: the grid is not the largest that can
 * be stored. */
bool lbq_grid_reaches(const lbq_code *code, float low, float high, float scale, float offset);

/* LBQ_BAD_VALUE for a NaN or infinity in W, and for a weight that no scale of `scale_bits` reaches,
 * naming row and column. */
lbq_status lbq_check_weights(int scale_bits, ptrdiff_t rows, ptrdiff_t cols, const float *W);

/* The table of NF4 (count 16), or `count` = 2^b signed powers of two: 0, +-1, +-1/2, ...; as many
 * negative as positive ones, but for one more, the smallest, above zero. */
void lbq_levels_nf4(float *levels);
void lbq_levels_log(int count, float *levels);

/* How many of the `bins` bins of a histogram of |x| to keep so that `levels` equal steps over them
 * lose the least information (Kullback-Leibler divergence of the quantized histogram from the
 * clipped one); of equals the most. LBQ_BAD_VALUE for an empty histogram. */
lbq_status lbq_entropy_range(const double *counts, int bins, int levels, int *kept);

/* The `count` levels, ascending, with the least sum weights (values - nearest level)^2. Exact up
 * to 2048 values; above, exact for as many bins of equal population and then refined by Lloyd's
 * iteration on all values. weights (n), positive, or NULL. LBQ_BAD_VALUE for a NaN. */
lbq_status lbq_kmeans(ptrdiff_t n, const double *values, const double *weights, int count,
                      double *levels);

#endif
