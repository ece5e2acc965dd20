/* A lattice: eight columns of a row are one of 2^16 points near the origin of E8 + 1/4, in a 16-bit
 * word stored as eight 2-bit words.
 *
 * A. Tseng, J. Chee, Q. Sun, V. Kuleshov, C. De Sa, "QuIP#: Even Better LLM Quantization with
 * Hadamard Incoherence and Lattice Codebooks", 2024, section 4.2 (E8P): a point of D8 + 1/2 with
 * even sum, given by one of 256 vectors of magnitudes and seven signs (the sum determines the
 * eighth), plus or minus 1/4 in all coordinates. The distortion of a normal variable is 0.092.
 * Levels are twice the coordinates plus 5.5, which makes them integers from 0 to 11. */
#include <math.h>
#include <string.h>

#include "codes/code.h"
#include "codes/stored.h"
#include "core/pack.h"

enum { COLS = 8, COUNT = 256, SIGNS = 8 /* the lowest bit of the signs */, SHIFT = 15 };

/* Standard deviation of the normal variable that the points fit best. */
#define DEVIATION 2.1

/* Magnitudes m = 0, 1, 2, for 1/2, 3/2, 5/2, two bits per coordinate: all 227 with norm up to 10,
 * and 29 with norm 12. */
static const uint16_t MAGNITUDES[COUNT] = {
    0x0000, 0x4000, 0x8000, 0x1000, 0x5000, 0x9000, 0x2000, 0x6000, 0x0400, 0x4400, 0x8400, 0x1400,
    0x5400, 0x2400, 0x0800, 0x4800, 0x1800, 0x0100, 0x4100, 0x8100, 0x1100, 0x5100, 0x2100, 0x0500,
    0x4500, 0x1500, 0x5500, 0x0900, 0x0200, 0x4200, 0x1200, 0x0600, 0x0040, 0x4040, 0x8040, 0x1040,
    0x5040, 0x2040, 0x0440, 0x4440, 0x1440, 0x5440, 0x0840, 0x0140, 0x4140, 0x1140, 0x5140, 0x0540,
    0x4540, 0x1540, 0x0240, 0x0080, 0x4080, 0x1080, 0x0480, 0x0180, 0x0010, 0x4010, 0x8010, 0x1010,
    0x5010, 0x2010, 0x0410, 0x4410, 0x1410, 0x5410, 0x0810, 0x0110, 0x4110, 0x1110, 0x5110, 0x0510,
    0x4510, 0x1510, 0x0210, 0x0050, 0x4050, 0x1050, 0x5050, 0x0450, 0x4450, 0x1450, 0x0150, 0x4150,
    0x1150, 0x0550, 0x0090, 0x0020, 0x4020, 0x1020, 0x0420, 0x0120, 0x0060, 0x0004, 0x4004, 0x8004,
    0x1004, 0x5004, 0x2004, 0x0404, 0x4404, 0x1404, 0x5404, 0x0804, 0x0104, 0x4104, 0x1104, 0x5104,
    0x0504, 0x4504, 0x1504, 0x0204, 0x0044, 0x4044, 0x1044, 0x5044, 0x0444, 0x4444, 0x1444, 0x0144,
    0x4144, 0x1144, 0x0544, 0x0084, 0x0014, 0x4014, 0x1014, 0x5014, 0x0414, 0x4414, 0x1414, 0x0114,
    0x4114, 0x1114, 0x0514, 0x0054, 0x4054, 0x1054, 0x0454, 0x0154, 0x0024, 0x0008, 0x4008, 0x1008,
    0x0408, 0x0108, 0x0048, 0x0018, 0x0001, 0x4001, 0x8001, 0x1001, 0x5001, 0x2001, 0x0401, 0x4401,
    0x1401, 0x5401, 0x0801, 0x0101, 0x4101, 0x1101, 0x5101, 0x0501, 0x4501, 0x1501, 0x0201, 0x0041,
    0x4041, 0x1041, 0x5041, 0x0441, 0x4441, 0x1441, 0x0141, 0x4141, 0x1141, 0x0541, 0x0081, 0x0011,
    0x4011, 0x1011, 0x5011, 0x0411, 0x4411, 0x1411, 0x0111, 0x4111, 0x1111, 0x0511, 0x0051, 0x4051,
    0x1051, 0x0451, 0x0151, 0x0021, 0x0005, 0x4005, 0x1005, 0x5005, 0x0405, 0x4405, 0x1405, 0x0105,
    0x4105, 0x1105, 0x0505, 0x0045, 0x4045, 0x1045, 0x0445, 0x0145, 0x0015, 0x4015, 0x1015, 0x0415,
    0x0115, 0x0055, 0x0009, 0x0002, 0x4002, 0x1002, 0x0402, 0x0102, 0x0042, 0x0012, 0x0006, 0x5540,
    0x5450, 0x4550, 0x5504, 0x5144, 0x1544, 0x5114, 0x1514, 0x4454, 0x4154, 0x0554, 0x5441, 0x4541,
    0x5411, 0x4511, 0x5051, 0x1451, 0x1151, 0x5405, 0x4505, 0x5045, 0x1445, 0x1145, 0x5015, 0x1415,
    0x1115, 0x4055, 0x0455, 0x0155};

/* Twice the magnitude of a coordinate; whether the sum of all requires an odd number of minus
 * signs. */
static inline int
magnitude(int index, int c)
{
    return 2 * (MAGNITUDES[index] >> 2 * c & 3) + 1;
}

static inline int
parity(int index)
{
    int sum = 0;
    for (int c = 0; c < COLS; c++)
        sum += magnitude(index, c);
    return sum / 2 & 1;
}

static void
levels_of(uint32_t word, uint8_t *level)
{
    const int index = (int)(word & (COUNT - 1)), more = (int)(word >> SHIFT & 1);
    int odd = parity(index);
    for (int c = 0; c < COLS; c++) {
        const int negative = c < COLS - 1 ? (int)(word >> (SIGNS + c) & 1) : odd;
        const int size = magnitude(index, c);
        odd ^= negative;
        level[c] = (uint8_t)(5 + more + (negative ? -size : size));
    }
}

/* Shared by all rows: magnitudes as floats, their squared norms and parities. */
typedef struct {
    float size[COLS][COUNT], norm[COUNT];
    int odd[COUNT];
} points;

static size_t
scratch(const lbq_code *code)
{
    (void)code;
    return sizeof(points);
}

/* The point nearest to x, in levels about zero. For given magnitudes, signs are taken from x; if
 * that makes the sum odd, the sign that costs least is flipped. */
static uint32_t
nearest(const points *p, const float *x)
{
    uint32_t best = 0;
    float least = HUGE_VALF;
    for (uint32_t more = 0; more < 2; more++) {
        float y[COLS], square = 0, product[COUNT] = {0}, smallest[COUNT];
        uint32_t signs = 0;
        int odd = 0;
        for (int i = 0; i < COUNT; i++)
            smallest[i] = HUGE_VALF;
        for (int c = 0; c < COLS; c++) {
            const float there = x[c] - (more ? 0.5f : -0.5f);
            signs |= (uint32_t)(there < 0) << c;
            odd ^= there < 0;
            y[c] = fabsf(there);
            square += y[c] * y[c];
            for (int i = 0; i < COUNT; i++) {
                const float one = y[c] * p->size[c][i];
                product[i] += one;
                smallest[i] = one < smallest[i] ? one : smallest[i];
            }
        }
        int found = -1;
        for (int i = 0; i < COUNT; i++) {
            const float flip = p->odd[i] == odd ? 0 : 4 * smallest[i];
            const float error = square + p->norm[i] - 2 * product[i] + flip;
            if (error < least) {
                least = error;
                found = i;
            }
        }
        if (found < 0)
            continue;
        int c = 0;
        while (y[c] * p->size[c][found] != smallest[found])
            c++;
        signs ^= p->odd[found] == odd ? 0 : 1u << c;
        best = (uint32_t)found | (signs & 0x7F) << SIGNS | more << SHIFT;
    }
    return best;
}

static void
encode(const lbq_code *code, const lbq_grid *grid, const float *w, const float *shift,
       ptrdiff_t pitch, uint8_t *words, float *e, void *memory)
{
    (void)code;
    points *const p = memory;
    for (int i = 0; i < COUNT; i++) {
        p->norm[i] = 0;
        p->odd[i] = parity(i);
        for (int c = 0; c < COLS; c++) {
            p->size[c][i] = (float)magnitude(i, c);
            p->norm[i] += p->size[c][i] * p->size[c][i];
        }
    }
    for (int r = 0; r < LBQ_PANEL; r++) {
        const float scale = grid->lanes[r], offset = grid->lanes[LBQ_PANEL + r];
        float x[COLS];
        uint8_t level[COLS];
        for (int c = 0; c < COLS; c++) {
            const float there = w[c * LBQ_PANEL + r] + shift[c * pitch + r];
            x[c] = r < grid->rows ? there * grid->lanes[2 * LBQ_PANEL + r] : 0;
        }
        const uint32_t word = nearest(p, x);
        levels_of(word, level);
        for (int c = 0; c < COLS; c++) {
            words[c * LBQ_PANEL + r] = word >> 2 * c & 3;
            e[c * pitch + r] = w[c * LBQ_PANEL + r] - (scale * (float)level[c] + offset);
        }
    }
}

static void
expand(const lbq_code *code, ptrdiff_t columns, uint8_t *words)
{
    (void)code;
    for (ptrdiff_t k = 0; k < columns; k += COLS)
        for (ptrdiff_t r = 0; r < LBQ_PANEL; r++) {
            uint32_t word = 0;
            uint8_t level[COLS];
            for (int c = 0; c < COLS; c++)
                word |= (uint32_t)words[lbq_word_at(k + c, r)] << 2 * c;
            levels_of(word, level);
            for (int c = 0; c < COLS; c++)
                words[lbq_word_at(k + c, r)] = level[c];
        }
}

static void
fit(const lbq_code *code, const lbq_search *how, const lbq_groups *groups, float *scale,
    float *offset)
{
    (void)how;
    lbq_fit_deviation(code, groups, DEVIATION, scale, offset);
}

const lbq_code_kind lbq_kind_lattice = {
    .name = "lattice",
    .rates = "2",
    .rows = 1,
    .cols = COLS,
    .top = 11,
    .scratch = scratch,
    .encode = encode,
    .expand = expand,
    .fit = fit,
};
