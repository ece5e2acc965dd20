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

enum {
    UNPACKED_COLS = 512,  /* two panels of so many columns take half of a 32 KiB L1 */
    BLOCK_TILES = 32,     /* tiles that one unpacking serves: their sums take 32 KiB */
    PAIR = 2,             /* panels per gemm task */
    SPLIT = 1 << 22,      /* fewer multiplications, some 50 us, stay on one thread */
    SPLIT_TASK = 1 << 20, /* and a task has at least so many */
    TILE_SUMS = LBQ_TILE * LBQ_PANEL,
};

typedef struct {
    const lbq_packed *packed;
    lbq_packed_geometry geometry;
    int limit; /* of the quantized activations */
    const float *bias;
    ptrdiff_t tokens;
    const float *x;
    float *y;
    ptrdiff_t width, tiles;       /* tokens per tile */
    ptrdiff_t padded;             /* columns in whole steps */
    ptrdiff_t scales_per_tile;    /* steps * width */
    int8_t *values;               /* [tile][padded / 4][width][4] */
    float *scale, *total, *shift; /* [tile][step][width] */
    char *scratch;                /* scratch_bytes for each worker */
    size_t scratch_bytes;
    ptrdiff_t per_task; /* of the running loop */
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
        .values = job->values + tile * job->padded * job->width,
        .scale = job->scale + tile * job->scales_per_tile,
        .total = job->total + tile * job->scales_per_tile,
        .shift = job->shift + tile * job->scales_per_tile,
        .width = job->width,
    };
}

/* Scratch of a quantizing worker: one token's values, scales and totals. */
static size_t
quantizing_bytes(const product *job)
{
    return lbq_padded((size_t)job->padded) + 2 * sizeof(float) * (size_t)job->geometry.steps;
}

static void
quantize_token(const product *job, ptrdiff_t token, char *scratch)
{
    const ptrdiff_t tile = token / job->width, t = token % job->width;
    const ptrdiff_t steps = job->geometry.steps, width = job->width;
    int8_t *const q = (int8_t *)scratch;
    float *const scale = (float *)(scratch + lbq_padded((size_t)job->padded));
    float *const total = scale + steps;
    if (token < job->tokens) {
        const float *const x = job->x + token * job->packed->cols;
        lbq_kernel.quantize_i8(
            x, job->packed->cols, job->geometry.step, job->limit, q, scale, total);
    } else {
        memset(scratch, 0, quantizing_bytes(job));
    }
    int8_t *const values = job->values + tile * job->padded * width + 4 * t;
    for (ptrdiff_t k = 0; k < job->padded; k += 4)
        memcpy(values + k * width, q + k, 4);
    const float zero = job->packed->has_offset ? 0 : job->packed->zero;
    const ptrdiff_t at = tile * job->scales_per_tile + t;
    for (ptrdiff_t s = 0; s < steps; s++) {
        job->scale[at + s * width] = scale[s];
        job->total[at + s * width] = total[s];
        job->shift[at + s * width] = -zero * total[s];
    }
}

static lbq_status
quantize_task(void *context, ptrdiff_t index, int worker)
{
    const product *const job = context;
    const ptrdiff_t tokens = job->tiles * job->width;
    const ptrdiff_t end = smaller((index + 1) * job->per_task, tokens);
    for (ptrdiff_t token = index * job->per_task; token < end; token++)
        quantize_token(job, token, job->scratch + (size_t)worker * job->scratch_bytes);
    return LBQ_OK;
}

/* Sums [token][row] of one panel start at the bias ... */
static void
start_sums(const product *job, ptrdiff_t panel, ptrdiff_t width, float *sums)
{
    const ptrdiff_t row = panel * LBQ_PANEL, rows = smaller(LBQ_PANEL, job->packed->rows - row);
    memset(sums, 0, sizeof(float) * LBQ_PANEL * (size_t)width);
    for (ptrdiff_t t = 0; job->bias && t < width; t++)
        memcpy(sums + t * LBQ_PANEL, job->bias + row, sizeof(float) * (size_t)rows);
}

/* ... and end in y. */
static void
store_sums(const product *job, ptrdiff_t panel, ptrdiff_t first, ptrdiff_t width, const float *sums)
{
    const ptrdiff_t row = panel * LBQ_PANEL, rows = smaller(LBQ_PANEL, job->packed->rows - row);
    for (ptrdiff_t t = 0; t < smaller(width, job->tokens - first); t++) {
        float *const y = job->y + (first + t) * job->packed->rows + row;
        if (rows == LBQ_PANEL)
            memcpy(y, sums + t * LBQ_PANEL, sizeof(float) * LBQ_PANEL);
        else
            memcpy(y, sums + t * LBQ_PANEL, sizeof(float) * (size_t)rows);
    }
}

typedef void (*gemv_kernel)(const lbq_panel *, const lbq_activations *, float *);

static gemv_kernel
gemv_for(int bits)
{
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
    const gemv_kernel gemv = gemv_for(job->packed->bits);
    const lbq_activations x = tile_at(job, 0);
    const ptrdiff_t end = smaller((index + 1) * job->per_task, job->geometry.panels);
    for (ptrdiff_t p = index * job->per_task; p < end; p++) {
        const lbq_panel panel = lbq_packed_panel(job->packed, &job->geometry, p);
        float sums[TILE_SUMS];
        start_sums(job, p, job->width, sums);
        gemv(&panel, &x, sums);
        store_sums(job, p, 0, job->width, sums);
    }
    return LBQ_OK;
}

static ptrdiff_t
unpacked_steps(const product *job)
{
    return smaller(UNPACKED_COLS / job->geometry.step, job->geometry.steps);
}

/* Scratch of a gemm worker: codes of a pair of panels, sums of a block of tiles. */
static size_t
gemm_bytes(const product *job)
{
    const size_t codes = (size_t)(PAIR * LBQ_PANEL * unpacked_steps(job) * job->geometry.step);
    return lbq_padded(codes) + sizeof(float) * BLOCK_TILES * PAIR * TILE_SUMS;
}

/* A pair of panels times a block of tiles. */
static void
gemm_block(const product *job, ptrdiff_t first_panel, ptrdiff_t first_tile, char *scratch)
{
    const lbq_packed_geometry *const g = &job->geometry;
    const ptrdiff_t count = smaller(PAIR, g->panels - first_panel);
    const ptrdiff_t tiles = smaller(BLOCK_TILES, job->tiles - first_tile);
    const ptrdiff_t steps = unpacked_steps(job), step_codes = g->step * LBQ_PANEL;
    uint8_t *const codes = (uint8_t *)scratch;
    float *const sums = (float *)(scratch + lbq_padded((size_t)(PAIR * steps * step_codes)));
    lbq_panel panel[PAIR];
    for (ptrdiff_t p = 0; p < count; p++) {
        panel[p] = lbq_packed_panel(job->packed, g, first_panel + p);
        for (ptrdiff_t i = 0; i < tiles; i++)
            start_sums(job, first_panel + p, LBQ_TILE, sums + (i * PAIR + p) * TILE_SUMS);
    }
    for (ptrdiff_t s = 0; s < g->steps; s += steps) {
        const ptrdiff_t end = smaller(s + steps, g->steps);
        for (ptrdiff_t p = 0; p < count; p++)
            for (ptrdiff_t i = s; i < end; i++)
                lbq_step_unpack_fast(job->packed->bits,
                                     panel[p].codes + i * g->step_bytes,
                                     g->step,
                                     codes + (p * (end - s) + i - s) * step_codes);
        for (ptrdiff_t i = 0; i < tiles; i++) {
            const lbq_activations x = tile_at(job, first_tile + i);
            lbq_kernel.gemm_u8_i8(
                panel, count, job->packed->bits, codes, s, end, &x, sums + i * PAIR * TILE_SUMS);
        }
    }
    for (ptrdiff_t p = 0; p < count; p++)
        for (ptrdiff_t i = 0; i < tiles; i++)
            store_sums(job,
                       first_panel + p,
                       (first_tile + i) * LBQ_TILE,
                       LBQ_TILE,
                       sums + (i * PAIR + p) * TILE_SUMS);
}

static lbq_status
gemm_task(void *context, ptrdiff_t index, int worker)
{
    const product *const job = context;
    const ptrdiff_t pairs = pieces(job->geometry.panels, PAIR);
    const ptrdiff_t blocks = pieces(job->tiles, BLOCK_TILES);
    const ptrdiff_t end = smaller((index + 1) * job->per_task, pairs * blocks);
    for (ptrdiff_t i = index * job->per_task; i < end; i++)
        gemm_block(job,
                   i % pairs * PAIR,
                   i / pairs * BLOCK_TILES,
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

lbq_status
lbq_multiply_quantized(const lbq_packed *packed, int activation_bits, const float *bias,
                       ptrdiff_t tokens, const float *x, float *y)
{
    product job = {
        .packed = packed,
        .limit = (1 << (activation_bits - 1)) - 1,
        .bias = bias,
        .tokens = tokens,
        .x = x,
        .y = y,
        .width = tokens <= 2   ? tokens
                 : tokens <= 4 ? 4
                               : LBQ_TILE,
    };
    LBQ_TRY(lbq_packed_geometry_of(packed, &job.geometry));
    const lbq_packed_geometry *const g = &job.geometry;
    job.tiles = pieces(tokens, job.width);
    job.padded = g->steps * g->step;
    job.scales_per_tile = g->steps * job.width;
    const size_t scales = sizeof(float) * (size_t)(job.tiles * job.scales_per_tile);
    const size_t values = (size_t)(job.tiles * job.width * job.padded);
    const size_t gemm = job.width < LBQ_TILE ? 0 : gemm_bytes(&job);
    const size_t quantizing = quantizing_bytes(&job);
    job.scratch_bytes = lbq_padded(gemm > quantizing ? gemm : quantizing);

    lbq_arena arena;
    const size_t workers = (size_t)lbq_threads() * job.scratch_bytes;
    LBQ_TRY(lbq_arena_open(&arena, lbq_padded(values) + 3 * lbq_padded(scales) + workers));
    job.values = lbq_arena_take(&arena, values);
    job.scale = lbq_arena_take(&arena, scales);
    job.total = lbq_arena_take(&arena, scales);
    job.shift = lbq_arena_take(&arena, scales);
    job.scratch = lbq_arena_take(&arena, workers);

    /* Quantizing a number takes about as long as sixteen multiplications. */
    lbq_status status = split(&job, quantize_task, job.tiles * job.width, 16 * (double)job.padded);
    if (status == LBQ_OK && job.width < LBQ_TILE)
        status =
            split(&job, gemv_task, g->panels, (double)LBQ_PANEL * (double)(job.padded * job.width));
    else if (status == LBQ_OK)
        status = split(&job,
                       gemm_task,
                       pieces(g->panels, PAIR) * pieces(job.tiles, BLOCK_TILES),
                       (double)(PAIR * LBQ_PANEL * LBQ_TILE) * (double)job.padded *
                           (double)smaller(job.tiles, BLOCK_TILES));
    lbq_arena_close(&arena);
    return status;
}
