/* One kernel over chunks in parallel. */
#include "transformer/swiglu.h"

#include <string.h>

#include "core/threads.h"
#include "kernels/kernels.h"
#include "kernels/portable/exp_portable.h"

enum { CHUNK = 1 << 15 }; /* 128 KiB per array: about 20 us */

typedef struct {
    ptrdiff_t count;
    const float *gate, *up;
    float *y;
} swiglu;

static lbq_status
swiglu_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const swiglu *const s = context;
    const ptrdiff_t at = index * CHUNK, left = s->count - at;
    lbq_kernel.swiglu_f32(s->gate + at, s->up + at, left < CHUNK ? left : CHUNK, s->y + at);
    return LBQ_OK;
}

lbq_status
lbq_swiglu(ptrdiff_t count, const float *gate, const float *up, float *y)
{
    swiglu s = {.count = count, .gate = gate, .up = up, .y = y};
    return lbq_parallel(lbq_pieces(count, CHUNK), swiglu_task, &s);
}

/* --- backward --------------------------------------------------------------------------------- */

enum { LANES = 64 };

typedef struct {
    ptrdiff_t count;
    const float *gate, *up, *g;
    float *dgate, *dup;
} swiglu_backward;

static lbq_status
swiglu_backward_task(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const swiglu_backward *const b = context;
    const ptrdiff_t end = lbq_smaller((index + 1) * CHUNK, b->count);
    for (ptrdiff_t i = index * CHUNK; i < end; i += LANES) {
        float dgate[LANES], dup[LANES]; /* the results may lie where the arguments do */
        const ptrdiff_t count = lbq_smaller(LANES, end - i);
        for (ptrdiff_t j = 0; j < count; j++) {
            const float gate = b->gate[i + j], g = b->g[i + j];
            const float s = 1 / (1 + lbq_exp(-gate));
            dgate[j] = g * b->up[i + j] * s * (1 + gate * (1 - s));
            dup[j] = g * gate * s;
        }
        memcpy(b->dgate + i, dgate, (size_t)count * sizeof(float));
        memcpy(b->dup + i, dup, (size_t)count * sizeof(float));
    }
    return LBQ_OK;
}

lbq_status
lbq_swiglu_backward(ptrdiff_t count, const float *gate, const float *up, const float *g,
                    float *dgate, float *dup)
{
    swiglu_backward b = {count, gate, up, g, dgate, dup};
    return lbq_parallel(lbq_pieces(count, CHUNK), swiglu_backward_task, &b);
}
