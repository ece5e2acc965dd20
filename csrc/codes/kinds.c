/* The table of codes. A new one needs a row here and a file that defines lbq_kind_<name>. */
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "codes/code.h"

#define KINDS(X)                                                                                   \
    X(int)                                                                                         \
    X(ternary)                                                                                     \
    X(binary)                                                                                      \
    X(nf)                                                                                          \
    X(log)                                                                                         \
    X(kmeans)                                                                                      \
    X(trellis)                                                                                     \
    X(trellis_pair)                                                                                \
    X(trellis_wide)                                                                                \
    X(lattice)

#define DECLARE(name) extern const lbq_code_kind lbq_kind_##name;
KINDS(DECLARE)
#undef DECLARE

#define ADDRESS(name) &lbq_kind_##name,
const lbq_code_kind *const lbq_code_kinds[] = {KINDS(ADDRESS) NULL};
#undef ADDRESS

/* The kind of code number `index`, and its rate as text; NULL past the last. */
static const lbq_code_kind *
kind_at(int index, const char **rate)
{
    for (const lbq_code_kind *const *kind = lbq_code_kinds; *kind; kind++) {
        *rate = (*kind)->rates;
        for (; index > 0 && strchr(*rate, ' '); index--)
            *rate = strchr(*rate, ' ') + 1;
        if (index-- == 0)
            return *kind;
    }
    return NULL;
}

bool
lbq_code_name(int index, char name[LBQ_NAME])
{
    const char *rate;
    const lbq_code_kind *const kind = kind_at(index, &rate);
    if (!kind)
        return false;
    const size_t length = strlen(kind->name), digits = strcspn(rate, " ");
    memcpy(name, kind->name, length);
    memcpy(name + length, rate, digits);
    name[length + digits] = 0;
    return true;
}

/* Bits of a word: a rate such as "2", "1.5" or "2w10" times the columns that share the word. */
static int
bits_of_word(const lbq_code_kind *kind, const char *rate)
{
    const bool half = strncmp(rate + strspn(rate, "0123456789"), ".5", 2) == 0;
    return lbq_word_cols(kind) * (2 * atoi(rate) + half) / 2;
}

/* The trellis of a rate: they come in the same order. */
static const lbq_trellis *
trellis_of(const lbq_code_kind *kind, const char *rate)
{
    const lbq_trellis *trellis = kind->trellises;
    for (const char *c = kind->rates; trellis && c < rate; c++)
        trellis += *c == ' ';
    return trellis;
}

lbq_status
lbq_code_find(const char *name, lbq_code *code)
{
    char known[LBQ_NAME];
    for (int index = 0; lbq_code_name(index, known); index++) {
        if (strcmp(name, known) != 0)
            continue;
        const char *rate;
        const lbq_code_kind *const kind = kind_at(index, &rate);
        const int count = kind->count ? kind->count : 1 << bits_of_word(kind, rate);
        int bits = 1;
        while (1 << bits < count)
            bits++;
        *code = (lbq_code){
            .kind = kind,
            .bits = bits <= 4 ? bits : 8,
            .count = count,
            .symmetric = true,
            .zero = kind->table ? 0 : 0.5f * (float)(kind->top ? kind->top : count - 1),
            .scale_bits = 16,
            .trellis = trellis_of(kind, rate),
        };
        return LBQ_OK;
    }
    return lbq_fail(LBQ_BAD_VALUE, "no code is called '%s'", name);
}

/* Levels of a table are rounded to multiples of 1/127 of the largest, as activations are, and 128
 * is added because the integer kernels take unsigned codes: off by at most half a step, and exact
 * for a zero level. Two levels are exactly base + step * code. */
static lbq_byte_levels
bytes_of(const lbq_code *code)
{
    const float *const levels = code->levels;
    if (!levels)
        return (lbq_byte_levels){.step = 1,
                                 .bits = code->kind->expand || code->kind->read ? 8 : code->bits};
    if (code->bits == 1)
        return (lbq_byte_levels){.base = levels[0], .step = levels[1] - levels[0], .bits = 1};
    float largest = 0;
    for (int i = 0; i < code->count; i++)
        largest = fmaxf(largest, fabsf(levels[i]));
    const float step = largest / 127;
    lbq_byte_levels result = {.base = -128 * step, .step = step, .bits = 8};
    for (int i = 0; i < (int)sizeof result.table; i++) {
        const float share = largest > 0 ? levels[i % code->count] / largest : 0;
        result.table[i] = (uint8_t)(128 + lrintf(127 * share));
    }
    return result;
}

lbq_status
lbq_code_set(lbq_code *code, const float *levels, ptrdiff_t level_count, bool symmetric, float zero,
             int scale_bits, float unit)
{
    const ptrdiff_t expected = code->kind->table ? code->count : 0;
    LBQ_REQUIRE(level_count == expected,
                LBQ_BAD_SHAPE,
                "levels has %td values, expected %td",
                level_count,
                expected);
    for (int i = 0; i < level_count; i++)
        LBQ_REQUIRE(isfinite(levels[i]),
                    LBQ_BAD_VALUE,
                    "levels has %g, expected finite numbers",
                    (double)levels[i]);
    LBQ_REQUIRE(scale_bits == 0 || scale_bits == 4 || scale_bits == 8 || scale_bits == 16,
                LBQ_BAD_VALUE,
                "scale_bits is %d, expected 16, 8, 4 or 0",
                scale_bits);
    LBQ_REQUIRE(symmetric || scale_bits == 16 || scale_bits == 0,
                LBQ_BAD_VALUE,
                "offsets need scale_bits = 16, got %d",
                scale_bits);
    LBQ_REQUIRE(isfinite(unit) && isfinite(zero),
                LBQ_BAD_VALUE,
                "unit is %g and zero is %g, expected finite numbers",
                (double)unit,
                (double)zero);
    code->levels = levels;
    code->symmetric = symmetric;
    code->zero = zero;
    code->scale_bits = scale_bits;
    code->unit = unit;
    code->bytes = bytes_of(code);
    return LBQ_OK;
}

lbq_packed
lbq_code_layout(const lbq_code *code, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t group)
{
    return (lbq_packed){
        .rows = rows,
        .cols = cols,
        .group = group,
        .block_rows = code->kind->rows,
        .block_cols = code->kind->cols,
        .word_cols = lbq_word_cols(code->kind),
        .bits = code->bits,
        .scale_bits = code->scale_bits,
        .has_offset = !code->symmetric && code->scale_bits == 16,
        .unit = code->unit,
        .zero = code->zero,
    };
}

lbq_status
lbq_code_check(const lbq_code *code, const lbq_search *search)
{
    LBQ_REQUIRE(!search || code->kind->ordered || search->method == LBQ_RANGE_MSE,
                LBQ_BAD_VALUE,
                "codes of kind %s have no range: method must be 'mse'",
                code->kind->name);
    LBQ_REQUIRE(!search || code->symmetric || code->kind->offsets,
                LBQ_BAD_VALUE,
                "codes of kind %s have no offsets to fit",
                code->kind->name);
    return code->kind->check ? code->kind->check(code) : LBQ_OK;
}

lbq_status
lbq_code_check_ordered(const lbq_code *code)
{
    LBQ_REQUIRE(code->kind->ordered,
                LBQ_BAD_VALUE,
                "words of kind %s have no neighbours to move to",
                code->kind->name);
    return lbq_code_check(code, NULL);
}
