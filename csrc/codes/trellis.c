/* A trellis: the 64 rows of a column are a ring of words, and a row's level follows from the window
 * of twelve bits that begins with its own word, going down the rows. At half-bit rates two columns
 * share a ring: a window has a level for each.
 *
 * A. Tseng, Q. Sun, D. Hou, C. De Sa, "QTIP: Quantization with Trellises and Incoherence
 * Processing", 2024, whose computed codes the level resembles: two bytes of a 16-bit product, seven
 * bits of each, added. Viterbi's algorithm finds the words, twice: where the first pass, over a
 * turn that begins half a turn early, has row 0, the second one begins and ends. Distortion of a
 * normal variable, below it what no code of that rate can undercut:
 *
 *     bits a weight   1       1.5     2
 *     this            0.299   0.145   0.0765
 *     bound           0.250   0.125   0.0625
 */
#include <math.h>
#include <string.h>

#include "codes/code.h"
#include "codes/stored.h"
#include "core/pack.h"

enum { ROWS = 64, WINDOW = 12, STATES = 1 << WINDOW, MAX_COLS = 2 };

/* The best of those tried, for each column; others gave up to a tenth more. */
static const uint32_t MULTIPLIER[MAX_COLS] = {0xC6A7, 0x528F};

static inline int
level_of(uint32_t window, int column)
{
    const uint32_t product = window * MULTIPLIER[column] & 0x7F7F;
    return (int)((product & 0xFF) + (product >> 8));
}

/* Numbers of windows that share all but their first word lie side by side: metric_of(). */
typedef struct {
    float level[MAX_COLS][STATES];
    float metric[ROWS][STATES]; /* least squared error of the rows so far that ends in a window */
    float best[STATES];         /* least metric of the windows before one, by what they share */
    float target[MAX_COLS][ROWS], scale[ROWS]; /* in the unit of the largest scale */
    int bits, cols;
} search;

static size_t
scratch(const lbq_code *code)
{
    (void)code;
    return sizeof(search);
}

static inline uint32_t
place(const search *s, uint32_t window)
{
    const uint32_t first = window & ((1u << s->bits) - 1);
    return first << (WINDOW - s->bits) | window >> s->bits;
}

/* Metrics of a row from those of the row before. Windows that end alike have the same ones before
 * them: their first words go, and any last word comes. */
static void
advance(search *s, int before, int row)
{
    const int words = 1 << s->bits, shared = STATES >> s->bits, tails = shared >> s->bits;
    const float *const m = s->metric[before];
    float best[STATES / 2];
    memcpy(best, m, (size_t)shared * sizeof *best);
    for (int word = 1; word < words; word++)
        for (int i = 0; i < shared; i++)
            best[i] = m[word * shared + i] < best[i] ? m[word * shared + i] : best[i];
    for (int i = 0; i < tails; i++)
        for (int word = 0; word < words; word++)
            s->best[word * tails + i] = best[words * i + word];
    float *const to = s->metric[row];
    for (int word = 0; word < words; word++)
        for (int i = 0; i < shared; i++)
            to[word * shared + i] = s->best[word * tails + i % tails];
    for (int c = 0; c < s->cols; c++)
        for (int i = 0; i < STATES; i++) {
            const float e = s->target[c][row] - s->scale[row] * s->level[c][i];
            to[i] += e * e;
        }
}

/* The window of the row `before` that has led to `window`. */
static uint32_t
step_back(const search *s, int before, uint32_t window)
{
    const float *const metric = s->metric[before];
    const uint32_t first = window << s->bits & (STATES - 1);
    uint32_t found = first;
    for (uint32_t w = first + 1; w < first + (1u << s->bits); w++)
        found = metric[place(s, w)] < metric[place(s, found)] ? w : found;
    return found;
}

/* The window of row 0 on the best way through a turn that has it in the middle. */
static uint32_t
find_start(search *s)
{
    const float *const last = s->metric[ROWS / 2 - 1];
    memset(s->metric[ROWS / 2 - 1], 0, sizeof s->metric[0]);
    for (int i = 0; i < ROWS; i++)
        advance(s, (i + ROWS / 2 + ROWS - 1) % ROWS, (i + ROWS / 2) % ROWS);
    uint32_t window = 0;
    for (uint32_t w = 1; w < STATES; w++)
        window = last[place(s, w)] < last[place(s, window)] ? w : window;
    for (int row = ROWS / 2 - 1; row > 0; row--)
        window = step_back(s, row - 1, window);
    return window;
}

/* Levels, and the weights of a block in the unit of its largest scale. */
static void
prepare(search *s, const lbq_code *code, const lbq_grid *grid, const float *w, const float *shift,
        ptrdiff_t pitch)
{
    const float *const scale = grid->lanes, *const offset = scale + ROWS;
    s->bits = code->bits;
    s->cols = code->kind->cols;
    for (int c = 0; c < s->cols; c++)
        for (uint32_t window = 0; window < STATES; window++)
            s->level[c][place(s, window)] = (float)level_of(window, c);
    float unit = 0;
    for (ptrdiff_t r = 0; r < grid->rows; r++)
        unit = scale[r] > unit ? scale[r] : unit;
    for (ptrdiff_t r = 0; r < ROWS; r++) { /* padding costs nothing */
        const bool here = r < grid->rows && unit > 0;
        s->scale[r] = here ? scale[r] / unit : 0;
        for (int c = 0; c < s->cols; c++) {
            const float there = w[c * ROWS + r] + shift[c * pitch + r];
            s->target[c][r] = here ? (there - offset[r]) / unit : 0;
        }
    }
}

static void
encode(const lbq_code *code, const lbq_grid *grid, const float *w, const float *shift,
       ptrdiff_t pitch, uint8_t *words, float *e, void *memory)
{
    search *const s = memory;
    const float *const scale = grid->lanes, *const offset = scale + ROWS;
    prepare(s, code, grid, w, shift, pitch);
    const uint32_t start = find_start(s);
    for (uint32_t i = 0; i < STATES; i++)
        s->metric[0][i] = i == place(s, start) ? 0 : HUGE_VALF;
    for (int row = 1; row < ROWS; row++)
        advance(s, row - 1, row);
    uint32_t window = start;
    for (int row = ROWS - 1; row >= 0; row--) {
        window = row ? step_back(s, row, window) : start;
        for (int c = 0; c < s->cols; c++) {
            const float level = (float)level_of(window, c);
            words[c * ROWS + row] = c ? 0 : (uint8_t)(window & ((1u << s->bits) - 1));
            e[c * pitch + row] = w[c * ROWS + row] - (scale[row] * level + offset[row]);
        }
    }
}

static void
expand(const lbq_code *code, ptrdiff_t columns, uint8_t *words)
{
    for (ptrdiff_t k = 0; k < columns; k += code->kind->cols) {
        uint8_t *at[ROWS];
        uint32_t window = 0;
        for (ptrdiff_t r = ROWS - 1; r >= 0; r--) {
            at[r] = words + r / LBQ_PANEL * columns * LBQ_PANEL + lbq_word_at(k, r % LBQ_PANEL);
            window = (window << code->bits | *at[r]) & (STATES - 1);
        }
        for (ptrdiff_t r = ROWS - 1; r >= 0; r--) {
            window = (window << code->bits | *at[r]) & (STATES - 1);
            for (int c = 0; c < code->kind->cols; c++) /* c < 4 columns lie side by side */
                at[r][c] = (uint8_t)level_of(window, c);
        }
    }
}

static void
fit(const lbq_code *code, const lbq_search *how, const lbq_groups *groups, float *scale,
    float *offset)
{
    /* Standard deviation of the levels, 52.25, changed to what errs least on a normal variable. */
    static const double deviation[] = {0, 58, 50, 53};
    (void)how;
    lbq_fit_deviation(code, groups, deviation[code->bits], scale, offset);
}

const lbq_code_kind lbq_kind_trellis = {
    .name = "trellis",
    .rates = "1 2",
    .rows = ROWS,
    .cols = 1,
    .top = 254,
    .scratch = scratch,
    .encode = encode,
    .decode = lbq_decode_bytes,
    .expand = expand,
    .fit = fit,
};

const lbq_code_kind lbq_kind_trellis_pair = {
    .name = "trellis",
    .rates = "1.5",
    .rows = ROWS,
    .cols = MAX_COLS,
    .word_cols = MAX_COLS,
    .top = 254,
    .scratch = scratch,
    .encode = encode,
    .decode = lbq_decode_bytes,
    .expand = expand,
    .fit = fit,
};
