/* A trellis: the 64 rows of a column are a ring of words, and a row's level follows from the window
 * of bits that begins with its own word (kernels/trellis.h). At half-bit rates two columns share a
 * ring: a window has a level for each.
 *
 * A. Tseng, Q. Sun, D. Hou, C. De Sa, "QTIP: Quantization with Trellises and Incoherence
 * Processing", 2024, whose computed codes the levels resemble. Viterbi's algorithm finds the words.
 * A first pass goes twice around the ring, from any state; what it has between the turns is where
 * the second pass, once around, begins and ends. (One turn and a half, which begins and ends half a
 * turn away, errs by 0.5 % more; a single one by 2 %.) Mean squared error for a normal variable,
 * below it what no code of that rate can undercut:
 *
 *     bits a weight   1       1.5     2        3        4
 *     12 bits         0.287   0.144   0.0749   0.0194   0.0050
 *     10 bits         0.288           0.0762
 *     14 bits                                  0.0186   0.0048
 *     bound           0.250   0.125   0.0625   0.0156   0.0039
 *
 * Windows have 12 bits, or 10 at low rates: a quarter of the time. 14 bits take four times as long;
 * at 2 bits they gain nothing, in rings of 64. */
#include <math.h>
#include <string.h>

#include "codes/code.h"
#include "codes/stored.h"

enum { HISTORY = LBQ_RING + 1 };

/* The best of some hundred random multipliers each (benchmarks/search_trellis.py); others give up
 * to a tenth more. `normal` is the deviation of the normal variable that the levels suit best: at
 * low rates averages of many weights need less range than theirs, at high rates tails need more. */
static const lbq_trellis NARROW[] = {
    {.bits = 1, .window = 12, .cols = 1, .multiplier = {0xC853}, .normal = 60},
    {.bits = 1, .window = 10, .cols = 1, .multiplier = {0x53C9}, .normal = 60},
    {.bits = 2, .window = 12, .cols = 1, .multiplier = {0xE169}, .normal = 50},
    {.bits = 2, .window = 10, .cols = 1, .multiplier = {0x19A1}, .normal = 50},
};
static const lbq_trellis PAIR[] = {
    {.bits = 3, .window = 12, .cols = 2, .multiplier = {0x0D47, 0xA371}, .normal = 53},
};
static const lbq_trellis WIDE[] = {
    {.bits = 3, .window = 12, .cols = 1, .wide = 1, .multiplier = {0x9D8B, 0x7681}, .normal = 36},
    {.bits = 3, .window = 14, .cols = 1, .wide = 1, .multiplier = {0xC561, 0xE11F}, .normal = 35},
    {.bits = 4, .window = 12, .cols = 1, .wide = 1, .multiplier = {0x5FED, 0xC23F}, .normal = 33},
    {.bits = 4, .window = 14, .cols = 1, .wide = 1, .multiplier = {0x77C1, 0xBC13}, .normal = 34},
};

/* A state is the part of a window that the next row's window has too: its upper bits there, its
 * lower bits here. */
typedef struct {
    const lbq_trellis *trellis;
    ptrdiff_t states;
    float *levels; /* [column][word][state] */
    float *sums;   /* (HISTORY, states): least squared error of all ways to each state */
    float target[LBQ_RING][LBQ_RING_COLS], scale[LBQ_RING]; /* by places; in the unit of the
                                                               largest scale */
} search;

/* Scratch of a search, in bytes; and its parts. */
static size_t
layout_of(const lbq_trellis *trellis, char *base, search *s)
{
    const size_t states = (size_t)1 << (trellis->window - trellis->bits);
    const size_t levels = states * sizeof(float) * (size_t)(trellis->cols << trellis->bits);
    if (s) {
        s->trellis = trellis;
        s->states = (ptrdiff_t)states;
        s->levels = (float *)base;
        s->sums = (float *)(base + levels);
    }
    return levels + states * sizeof(float) * HISTORY;
}

static size_t
scratch(const lbq_code *code)
{
    return layout_of(code->trellis, NULL, NULL);
}

/* Sums before the row that is number `step` of a pass. */
static float *
sums_at(const search *s, int step)
{
    return s->sums + step % HISTORY * s->states;
}

static void
advance(const search *s, int step)
{
    const int place = step % LBQ_RING;
    lbq_kernel.viterbi_f32(s->trellis->bits,
                           s->trellis->cols,
                           s->states,
                           s->levels,
                           s->scale[place],
                           s->target[place],
                           sums_at(s, step),
                           sums_at(s, step + 1));
}

/* The window of row number `step` on the best way to the state after it. */
static uint32_t
step_back(const search *s, int step, uint32_t state)
{
    const int place = step % LBQ_RING, words = 1 << s->trellis->bits;
    const float *const before = sums_at(s, step);
    float least = 0;
    uint32_t found = 0;
    for (int word = 0; word < words; word++) {
        const uint32_t window = state << s->trellis->bits | (uint32_t)word;
        float sum = 0;
        for (int c = 0; c < s->trellis->cols; c++) {
            const float level = s->levels[(c * words + word) * s->states + state];
            const float e = s->target[place][c] - s->scale[place] * level;
            sum += e * e;
        }
        sum += before[window & (uint32_t)(s->states - 1)];
        if (word == 0 || sum < least) {
            least = sum;
            found = window;
        }
    }
    return found;
}

/* The state before the first row on the best way through two turns that has it in the middle. */
static uint32_t
find_start(const search *s)
{
    const uint32_t mask = (uint32_t)(s->states - 1);
    memset(sums_at(s, 0), 0, (size_t)s->states * sizeof(float));
    for (int step = 0; step < 2 * LBQ_RING; step++)
        advance(s, step);
    const float *const last = sums_at(s, 2 * LBQ_RING);
    uint32_t state = 0;
    for (uint32_t i = 1; i <= mask; i++)
        state = last[i] < last[state] ? i : state;
    for (int step = 2 * LBQ_RING - 1; step >= LBQ_RING; step--)
        state = step_back(s, step, state) & mask;
    return state;
}

/* Levels, and the weights of a block in the unit of its largest scale. */
static void
prepare(search *s, const lbq_grid *grid, const float *w, const float *shift, ptrdiff_t pitch)
{
    const float *const scale = grid->lanes, *const offset = scale + LBQ_RING;
    const int cols = s->trellis->cols, words = 1 << s->trellis->bits;
    float *level = s->levels;
    for (int c = 0; c < cols; c++)
        for (int word = 0; word < words; word++)
            for (ptrdiff_t state = 0; state < s->states; state++) {
                const uint32_t window = (uint32_t)(state << s->trellis->bits | word);
                *level++ = (float)lbq_trellis_level(s->trellis, window, c);
            }
    float unit = 0;
    for (ptrdiff_t r = 0; r < grid->rows; r++)
        unit = scale[r] > unit ? scale[r] : unit;
    for (int place = 0; place < LBQ_RING; place++) { /* padding costs nothing */
        const int r = lbq_ring_row(place);
        const bool here = r < grid->rows && unit > 0;
        s->scale[place] = here ? scale[r] / unit : 0;
        for (int c = 0; c < cols; c++) {
            const float there = w[c * LBQ_RING + r] + shift[c * pitch + r];
            s->target[place][c] = here ? (there - offset[r]) / unit : 0;
        }
    }
}

static void
encode(const lbq_code *code, const lbq_grid *grid, const float *w, const float *shift,
       ptrdiff_t pitch, uint8_t *words, float *e, void *memory)
{
    const lbq_trellis *const trellis = code->trellis;
    const float *const scale = grid->lanes, *const offset = scale + LBQ_RING;
    search s;
    layout_of(trellis, memory, &s);
    prepare(&s, grid, w, shift, pitch);
    const uint32_t start = find_start(&s);
    float *const first = sums_at(&s, 0);
    for (ptrdiff_t i = 0; i < s.states; i++)
        first[i] = i == (ptrdiff_t)start ? 0 : HUGE_VALF;
    for (int step = 0; step < LBQ_RING; step++)
        advance(&s, step);
    uint32_t state = start;
    for (int place = LBQ_RING - 1; place >= 0; place--) {
        const uint32_t window = step_back(&s, place, state);
        const int r = lbq_ring_row(place);
        for (int c = 0; c < trellis->cols; c++) {
            const float level = (float)lbq_trellis_level(trellis, window, c);
            words[c * LBQ_RING + r] = c ? 0 : (uint8_t)(window & ((1u << trellis->bits) - 1));
            e[c * pitch + r] = w[c * LBQ_RING + r] - (scale[r] * level + offset[r]);
        }
        state = window & (uint32_t)(s.states - 1);
    }
}

static void
read_levels(const lbq_code *code, const uint8_t *codes, ptrdiff_t panel_bytes, ptrdiff_t columns,
            ptrdiff_t pitch, uint8_t *bytes)
{
    lbq_kernel.expand_trellis(code->trellis, codes, panel_bytes, columns, pitch, bytes);
}

static lbq_gemv
gemv(const lbq_code *code)
{
    (void)code;
    return lbq_kernel.gemv_trellis_i8;
}

/* By the deviation of the weights as they are, though error feedback widens what is coded: on eight
 * layers of SmolLM2, scales times 1.03 changed the error of the outputs by -0.8 to 0.3 %, times 1.1
 * by -1 to 2.3 % (2 bits; 3 bits alike). */
static void
fit(const lbq_code *code, const lbq_search *how, const lbq_groups *groups, float *scale,
    float *offset)
{
    (void)how;
    lbq_fit_deviation(code, groups, (double)code->trellis->normal, scale, offset);
}

#define TRELLIS                                                                                    \
    .name = "trellis", .rows = LBQ_RING, .scratch = scratch, .encode = encode,                     \
    .read = read_levels, .gemv = gemv, .fit = fit

const lbq_code_kind lbq_kind_trellis = {
    .rates = "1 1w10 2 2w10", .cols = 1, .top = 254, .trellises = NARROW, TRELLIS};

const lbq_code_kind lbq_kind_trellis_pair = {.rates = "1.5",
                                             .cols = LBQ_RING_COLS,
                                             .word_cols = LBQ_RING_COLS,
                                             .top = 254,
                                             .trellises = PAIR,
                                             TRELLIS};

const lbq_code_kind lbq_kind_trellis_wide = {
    .rates = "3 3w14 4 4w14", .cols = 1, .top = 252, .trellises = WIDE, TRELLIS};
