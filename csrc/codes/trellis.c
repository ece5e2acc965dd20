/* A trellis: the 64 rows of a column are a ring of 2-bit words, and a row's level follows from the
 * window of twelve bits that begins with its own word, going down the rows.
 *
 * A. Tseng, Q. Sun, D. Hou, C. De Sa, "QTIP: Quantization with Trellises and Incoherence
 * Processing", 2024, whose computed codes the level resembles: two bytes of a 16-bit product, seven
 * bits of each, added. Viterbi's algorithm finds the words, twice: where the first pass, over a
 * turn that begins half a turn early, has row 0, the second one begins and ends. The distortion of
 * a normal variable is 0.0765, where no code of 2 bits can have less than 0.0625; windows of ten
 * bits give 0.0777. */
#include <math.h>
#include <string.h>

#include "codes/code.h"
#include "codes/stored.h"
#include "core/pack.h"

enum {
    ROWS = 64,
    WINDOW = 12,
    STATES = 1 << WINDOW,
    LAST = STATES / 4,   /* windows that share all but their first word, */
    NEXT = STATES / 16,  /* and that share all but their first and last one */
    MULTIPLIER = 0xC6A7, /* the best of those tried; others gave up to 0.0845 */
};

/* Standard deviation of the levels, 52.25, less what errs least on a normal variable. */
#define DEVIATION 50

static inline int
level_of(uint32_t window)
{
    const uint32_t product = window * MULTIPLIER & 0x7F7F;
    return (int)((product & 0xFF) + (product >> 8));
}

/* Windows are in the order of their first word, so that the four before a window lie alike. */
typedef float by_window[4][LAST];

typedef struct {
    by_window level;
    by_window metric[ROWS]; /* least squared error of the rows so far that ends in a window */
    float best[4][NEXT];    /* of the four windows before one */
    float target[ROWS], scale[ROWS]; /* in the unit of the largest scale */
} search;

static size_t
scratch(const lbq_code *code)
{
    (void)code;
    return sizeof(search);
}

static inline float *
metric_of(search *s, int row, uint32_t window)
{
    return &s->metric[row][window & 3][window >> 2];
}

/* Metrics of a row from those of the row before. */
static void
advance(search *s, int before, int row)
{
    float (*const m)[LAST] = s->metric[before];
    const float target = s->target[row], scale = s->scale[row];
    float best[LAST];
    for (int i = 0; i < LAST; i++) {
        const float a = m[0][i] < m[1][i] ? m[0][i] : m[1][i];
        const float b = m[2][i] < m[3][i] ? m[2][i] : m[3][i];
        best[i] = a < b ? a : b;
    }
    for (int i = 0; i < NEXT; i++)
        for (int word = 0; word < 4; word++)
            s->best[word][i] = best[4 * i + word];
    for (int word = 0; word < 4; word++)
        for (int last = 0; last < LAST; last += NEXT)
            for (int i = 0; i < NEXT; i++) {
                const float e = target - scale * s->level[word][last + i];
                s->metric[row][word][last + i] = s->best[word][i] + e * e;
            }
}

/* The window before `window`, of the row `before`, that has led there. */
static uint32_t
step_back(search *s, int before, uint32_t window)
{
    uint32_t found = window << 2 & (STATES - 1);
    for (uint32_t w = found + 1; w < found + 4 && w % 4; w++)
        found = *metric_of(s, before, w) < *metric_of(s, before, found) ? w : found;
    return found;
}

/* The window of row 0 on the best way through a turn that has it in the middle. */
static uint32_t
find_start(search *s)
{
    memset(s->metric[ROWS / 2 - 1], 0, sizeof(by_window));
    for (int i = 0; i < ROWS; i++)
        advance(s, (i + ROWS / 2 + ROWS - 1) % ROWS, (i + ROWS / 2) % ROWS);
    uint32_t window = 0;
    for (uint32_t w = 1; w < STATES; w++)
        window = *metric_of(s, ROWS / 2 - 1, w) < *metric_of(s, ROWS / 2 - 1, window) ? w : window;
    for (int row = ROWS / 2 - 1; row > 0; row--)
        window = step_back(s, row - 1, window);
    return window;
}

static void
encode(const lbq_code *code, const lbq_grid *grid, const float *w, const float *shift,
       ptrdiff_t pitch, uint8_t *words, float *e, void *memory)
{
    (void)code, (void)pitch;
    search *const s = memory;
    const float *const scale = grid->lanes, *const offset = scale + ROWS;
    for (uint32_t window = 0; window < STATES; window++)
        s->level[window & 3][window >> 2] = (float)level_of(window);
    float unit = 0;
    for (ptrdiff_t r = 0; r < grid->rows; r++)
        unit = scale[r] > unit ? scale[r] : unit;
    for (ptrdiff_t r = 0; r < ROWS; r++) { /* padding costs nothing */
        const bool here = r < grid->rows && unit > 0;
        s->scale[r] = here ? scale[r] / unit : 0;
        s->target[r] = here ? (w[r] + shift[r] - offset[r]) / unit : 0;
    }
    const uint32_t start = find_start(s);
    for (uint32_t window = 0; window < STATES; window++)
        *metric_of(s, 0, window) = window == start ? 0 : HUGE_VALF;
    for (int row = 1; row < ROWS; row++)
        advance(s, row - 1, row);
    uint32_t window = start;
    for (int row = ROWS - 1; row >= 0; row--) {
        window = row ? step_back(s, row, window) : start;
        words[row] = window & 3;
        e[row] = w[row] - (scale[row] * (float)level_of(window) + offset[row]);
    }
}

static void
expand(const lbq_code *code, ptrdiff_t columns, uint8_t *words)
{
    (void)code;
    for (ptrdiff_t k = 0; k < columns; k++) {
        uint8_t *at[ROWS];
        uint32_t window = 0;
        for (ptrdiff_t r = ROWS - 1; r >= 0; r--) {
            at[r] = words + r / LBQ_PANEL * columns * LBQ_PANEL + lbq_word_at(k, r % LBQ_PANEL);
            window = (window << 2 | *at[r]) & (STATES - 1);
        }
        for (ptrdiff_t r = ROWS - 1; r >= 0; r--) {
            window = (window << 2 | *at[r]) & (STATES - 1);
            *at[r] = (uint8_t)level_of(window);
        }
    }
}

static void
fit(const lbq_code *code, const lbq_search *how, const lbq_groups *groups, float *scale,
    float *offset)
{
    (void)how;
    lbq_fit_deviation(code, groups, DEVIATION, scale, offset);
}

const lbq_code_kind lbq_kind_trellis = {
    .name = "trellis",
    .rates = "2",
    .rows = ROWS,
    .cols = 1,
    .top = 254,
    .scratch = scratch,
    .encode = encode,
    .decode = lbq_decode_bytes,
    .expand = expand,
    .fit = fit,
};
