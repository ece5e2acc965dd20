/* Packed weights times int8 activations: quantize all tokens, then panels in parallel.
 *
 * Up to four tokens a panel is read once, straight from its codes (gemv). More come in tiles of
 * LBQ_TILE tokens: a pair of panels is unpacked a few hundred columns at a time into the L1 cache,
 * where it meets tile after tile (gemm). The order of the float operations is the same. */
#include "linear/quantized.h"

#include <string.h>

#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"
#include "linear/levels.h"

enum {
    FEW = 4,              /* tokens that gemv takes at once */
    UNPACKED_COLS = 512,  /* two panels of so many columns take half of a 32 KiB L1 */
    PAIR = 2,             /* panels unpacked at a time */
    BAND = 8,             /* panels of a gemm task: it writes half a kilobyte of y at once */
    BLOCK = 32,           /* tiles of a gemm task; its sums take half of a 256 KiB L2 */
    SPLIT = 1 << 22,      /* fewer multiplications, some 50 us, stay on one thread */
    SPLIT_TASK = 1 << 20, /* and a task has at least so many */
    TILE_SUMS = LBQ_TILE * LBQ_PANEL,
};

typedef struct {
    const lbq_packed *packed;
    lbq_packed_geometry geometry;
    lbq_byte_levels levels;
    int limit; /* of the quantized activations */
    const float *bias;
    ptrdiff_t tokens;
    const float *x;
    float *y;
    ptrdiff_t width, tiles; /* tokens per tile */
    ptrdiff_t padded;       /* columns in whole steps */
    ptrdiff_t tile_bytes;   /* padded * width */
    ptrdiff_t tile_factors; /* steps * 3 * width */
    int8_t *values;         /* per tile as in lbq_activations */
    float *factors;         /* likewise */
    char *scratch;          /* scratch_bytes for each worker */
    size_t scratch_bytes;
    ptrdiff_t per_task; /* pieces, in the loop that runs */
} product;

static ptrdiff_t
smaller(ptrdiff_t a, ptrdiff_t b)
{
    return a < b ? a : b;
}

static ptrdiff_t
pieces(ptrdiff_t whole, ptrdiff_t size)
{
    return (whole + size - 1) / size;
}

void
lbq_step_unpack_fast(int bits, const uint8_t *codes, ptrdiff_t columns, uint8_t *out)
{
    switch (bits) {
    case 1:
        lbq_kernel.unpack_u1(codes, columns, out);
        break;
    case 2:
        lbq_kernel.unpack_u2(codes, columns, out);
        break;
    case 3:
        lbq_kernel.unpack_u3(codes, columns, out);
        break;
    case 4:
        lbq_kernel.unpack_u4(codes, columns, out);
        break;
    default:
        memcpy(out, codes, (size_t)(columns * LBQ_PANEL));
    }
}

static lbq_activations
tile_at(const product *job, ptrdiff_t tile)
{
    return (lbq_activations){
        .values = job->values + tile * job->tile_bytes,
        .factors = job->factors + tile * job->tile_factors,
        .width = job->width,
    };
}

/* Scratch of a quantizing worker: the values of a tile's tokens, one after the other, and the
 * scales and totals of one. */
static size_t
quantizing_bytes(const product *job)
{
    const size_t scales = 2 * sizeof(float) * (size_t)job->geometry.steps;
    return lbq_padded((size_t)job->tile_bytes) + scales;
}

static void
quantize_tile(const product *job, ptrdiff_t tile, char *scratch)
{
    const ptrdiff_t steps = job->geometry.steps, width = job->width, cols = job->packed->cols;
    const lbq_byte_levels *const levels = &job->levels;
    const float base = levels->base - (job->packed->has_offset ? 0 : job->packed->zero);
    int8_t *const q = (int8_t *)scratch;
    float *const scale = (float *)(scratch + lbq_padded((size_t)job->tile_bytes));
    float *const total = scale + steps;
    memset(scratch, 0, quantizing_bytes(job));
    for (ptrdiff_t t = 0; t < width; t++) {
        const ptrdiff_t token = tile * width + t;
        float *factors = job->factors + tile * job->tile_factors + t;
        if (token < job->tokens)
            lbq_kernel.quantize_i8(job->x + token * cols,
                                   cols,
                                   job->geometry.step,
                                   job->limit,
                                   q + t * job->padded,
                                   scale,
                                   total);
        else
            memset(scale, 0, 2 * sizeof(float) * (size_t)steps);
        for (ptrdiff_t s = 0; s < steps; s++, factors += 3 * width) {
            factors[0] = levels->step * scale[s];
            factors[width] = total[s];
            factors[2 * width] = base * total[s];
        }
    }
    lbq_kernel.interleave(q, job->padded, width, job->values + tile * job->tile_bytes);
}

static lbq_status
quantize_task(void *context, ptrdiff_t index, int worker)
{
    const product *const job = context;
    const ptrdiff_t end = smaller((index + 1) * job->per_task, job->tiles);
    for (ptrdiff_t tile = index * job->per_task; tile < end; tile++)
        quantize_tile(job, tile, job->scratch + (size_t)worker * job->scratch_bytes);
    return LBQ_OK;
}

/* A token's sums of one panel into y, with the bias. */
static void
store_sums(const product *job, ptrdiff_t panel, ptrdiff_t token, const float *sums)
{
    const ptrdiff_t row = panel * LBQ_PANEL, rows = smaller(LBQ_PANEL, job->packed->rows - row);
    float *const y = job->y + token * job->packed->rows + row;
    if (rows == LBQ_PANEL)
        memcpy(y, sums, sizeof(float) * LBQ_PANEL);
    else
        memcpy(y, sums, sizeof(float) * (size_t)rows);
    for (ptrdiff_t r = 0; job->bias && r < rows; r++)
        y[r] += job->bias[row + r];
}

typedef void (*gemv_kernel)(const lbq_panel *, const lbq_activations *, float *);

static gemv_kernel
gemv_for(int bits, bool lookup)
{
    if (lookup)
        return bits == 2   ? lbq_kernel.gemv_t2_i8
               : bits == 3 ? lbq_kernel.gemv_t3_i8
                           : lbq_kernel.gemv_t4_i8;
    switch (bits) {
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

static lbq_status
gemv_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const product *const job = context;
    const gemv_kernel gemv = gemv_for(job->packed->bits, job->levels.lookup);
    const lbq_activations x = tile_at(job, 0);
    const ptrdiff_t end = smaller((index + 1) * job->per_task, job->geometry.panels);
    for (ptrdiff_t p = index * job->per_task; p < end; p++) {
        lbq_panel panel = lbq_packed_panel(job->packed, &job->geometry, p);
        panel.bytes = job->levels.bytes;
        _Alignas(64) float sums[FEW * LBQ_PANEL];
        gemv(&panel, &x, sums);
        for (ptrdiff_t t = 0; t < job->tokens; t++)
            store_sums(job, p, t, sums + t * LBQ_PANEL);
    }
    return LBQ_OK;
}

static ptrdiff_t
unpacked_steps(const product *job)
{
    return smaller(UNPACKED_COLS / job->geometry.step, job->geometry.steps);
}

/* Scratch of a gemm worker: the codes of a pair of panels, the sums of a band times a block. */
static size_t
gemm_bytes(const product *job)
{
    const size_t codes = (size_t)(PAIR * LBQ_PANEL * unpacked_steps(job) * job->geometry.step);
    return lbq_padded(codes) + sizeof(float) * BAND * BLOCK * TILE_SUMS;
}

/* `count` panels, one or two, times `tiles` tiles: sums as [tile][panel][token][row]. */
static void
multiply_pair(const product *job, const lbq_panel panel[PAIR], ptrdiff_t count,
              ptrdiff_t first_tile, ptrdiff_t tiles, uint8_t *codes, float *sums)
{
    const int stored_bits = job->packed->bits, bits = job->levels.lookup ? 8 : stored_bits;
    const ptrdiff_t step = job->geometry.step, steps = unpacked_steps(job);
    for (ptrdiff_t s = 0; s < panel->steps; s += steps) {
        const ptrdiff_t end = smaller(s + steps, panel->steps);
        uint8_t *to = codes;
        for (ptrdiff_t p = 0; p < count; p++)
            for (ptrdiff_t i = s; i < end; i++, to += step * LBQ_PANEL)
                lbq_step_unpack_fast(stored_bits, panel[p].codes + i * panel->step_bytes, step, to);
        if (job->levels.lookup)
            lbq_kernel.lookup_u8(job->levels.bytes, to - codes, codes);
        for (ptrdiff_t i = 0; i < tiles; i++) {
            const lbq_activations x = tile_at(job, first_tile + i);
            float *const y = sums + i * PAIR * TILE_SUMS;
            lbq_kernel.gemm_u8_i8(panel, count, bits, codes, s, end, &x, y);
        }
    }
}

/* A band of panels times a block of tiles. */
static void
multiply_band(const product *job, ptrdiff_t first, ptrdiff_t first_tile, char *scratch)
{
    const ptrdiff_t panels = smaller(BAND, job->geometry.panels - first);
    const ptrdiff_t tiles = smaller(BLOCK, job->tiles - first_tile);
    float *const sums = (float *)scratch;
    uint8_t *const codes = (uint8_t *)(sums + BAND * BLOCK * TILE_SUMS);
    for (ptrdiff_t at = 0; at < panels; at += PAIR) {
        const ptrdiff_t count = smaller(PAIR, panels - at);
        lbq_panel panel[PAIR];
        for (ptrdiff_t p = 0; p < count; p++)
            panel[p] = lbq_packed_panel(job->packed, &job->geometry, first + at + p);
        multiply_pair(job, panel, count, first_tile, tiles, codes, sums + at * BLOCK * TILE_SUMS);
    }
    const ptrdiff_t first_token = first_tile * LBQ_TILE;
    for (ptrdiff_t t = 0; t < smaller(tiles * LBQ_TILE, job->tokens - first_token); t++)
        for (ptrdiff_t p = 0; p < panels; p++) {
            const ptrdiff_t pair = p / PAIR * BLOCK + t / LBQ_TILE;
            const float *const of_panel = sums + (pair * PAIR + p % PAIR) * TILE_SUMS;
            store_sums(job, first + p, first_token + t, of_panel + t % LBQ_TILE * LBQ_PANEL);
        }
}

static lbq_status
gemm_task(void *context, ptrdiff_t index, int worker)
{
    const product *const job = context;
    const ptrdiff_t bands = pieces(job->geometry.panels, BAND);
    const ptrdiff_t end = smaller((index + 1) * job->per_task, bands * pieces(job->tiles, BLOCK));
    for (ptrdiff_t i = index * job->per_task; i < end; i++)
        multiply_band(job,
                      i % bands * BAND,
                      i / bands * BLOCK,
                      job->scratch + (size_t)worker * job->scratch_bytes);
    return LBQ_OK;
}

/* Runs `task` over `count` pieces of `work` operations each, on one thread if that is little. */
static lbq_status
split(product *job, lbq_task task, ptrdiff_t count, double work)
{
    job->per_task = work * (double)count < SPLIT ? count
                    : work < SPLIT_TASK          ? (ptrdiff_t)(SPLIT_TASK / work) + 1
                                                 : 1;
    return lbq_parallel(pieces(count, job->per_task), task, job);
}

static lbq_status
run(product *job)
{
    const ptrdiff_t panels = job->geometry.panels;
    const double row = (double)job->padded; /* multiplications of one row and token */
    const double width = (double)job->width;
    /* Quantizing a number takes about as long as sixteen multiplications. */
    LBQ_TRY(split(job, quantize_task, job->tiles, 16 * row * width));
    if (job->width < LBQ_TILE)
        return split(job, gemv_task, panels, LBQ_PANEL * row * width);
    const ptrdiff_t tasks = pieces(panels, BAND) * pieces(job->tiles, BLOCK);
    const double tiles = (double)smaller(job->tiles, BLOCK);
    return split(job, gemm_task, tasks, BAND * LBQ_PANEL * row * width * tiles);
}

lbq_status
lbq_multiply_quantized(const lbq_packed *packed, int activation_bits, const float *bias,
                       ptrdiff_t tokens, const float *x, float *y)
{
    product job = {
        .packed = packed,
        .levels = lbq_byte_levels_of(packed),
        .limit = (1 << (activation_bits - 1)) - 1,
        .bias = bias,
        .tokens = tokens,
        .x = x,
        .y = y,
        .width = tokens == 1     ? 1
                 : tokens <= FEW ? FEW
                                 : LBQ_TILE,
    };
    LBQ_TRY(lbq_packed_geometry_of(packed, &job.geometry));
    job.tiles = pieces(tokens, job.width);
    job.padded = job.geometry.steps * job.geometry.step;
    job.tile_bytes = job.padded * job.width;
    job.tile_factors = job.geometry.steps * 3 * job.width;
    const size_t values = (size_t)(job.tiles * job.tile_bytes);
    const size_t factors = sizeof(float) * (size_t)(job.tiles * job.tile_factors);
    const size_t quantizing = quantizing_bytes(&job);
    const size_t gemm = job.width < LBQ_TILE ? 0 : gemm_bytes(&job);
    job.scratch_bytes = lbq_padded(gemm > quantizing ? gemm : quantizing);
    const size_t scratch = (size_t)lbq_threads() * job.scratch_bytes;

    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded(values) + lbq_padded(factors) + scratch));
    job.values = lbq_arena_take(&arena, values);
    job.factors = lbq_arena_take(&arena, factors);
    job.scratch = lbq_arena_take(&arena, scratch);
    const lbq_status status = run(&job);
    lbq_arena_close(&arena);
    return status;
}
