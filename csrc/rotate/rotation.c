/* Rotations of many rows: Hadamard rows in parallel, dense ones by BLAS. */
#include "rotate/rotation.h"

#include <string.h>

#include "core/blas.h"
#include "core/memory.h"
#include "core/threads.h"
#include "kernels/kernels.h"

/* G. Fowler, L. C. Noll, P. Vo: FNV-1a, on words instead of bytes. */
static uint64_t
digest_of(uint64_t digest, const void *data, size_t words)
{
    const unsigned char *at = data;
    for (size_t i = 0; i < words; i++, at += sizeof(uint32_t)) {
        uint32_t word;
        memcpy(&word, at, sizeof word);
        digest = (digest ^ word) * 0x100000001b3u;
    }
    return digest;
}

void
lbq_rotation_identify(lbq_rotation *rotation)
{
    const size_t n = (size_t)rotation->n;
    const lbq_hadamard *const hadamard = &rotation->hadamard;
    uint64_t digest = 0xcbf29ce484222325u;
    if (rotation->dense) {
        rotation->digest = digest_of(digest, rotation->dense, n * n);
        return;
    }
    for (int j = 0; j < hadamard->factors; j++)
        digest = (digest ^ (uint64_t)hadamard->orders[j]) * 0x100000001b3u;
    rotation->digest = digest_of(digest, hadamard->diagonal, n);
}

bool
lbq_same_rotation(const lbq_rotation *a, const lbq_rotation *b)
{
    if (a == b || !a || !b)
        return a == b;
    return a->n == b->n && !a->dense == !b->dense && a->digest == b->digest;
}

/* Additions in a chunk of rows: about 50 us on one core, below which a thread costs more than it
 * saves. */
enum { CHUNK_WORK = 1 << 20 };

/* Rows that a dense rotation copies at a time. */
enum { DENSE_ROWS = 128 };

typedef struct {
    const lbq_hadamard *hadamard;
    bool back;
    ptrdiff_t rows, chunk;
    float *X;
} hadamard_rows;

static lbq_status
rotate_chunk(void *context, ptrdiff_t index, int worker)
{
    (void)worker;
    const hadamard_rows *const task = context;
    const ptrdiff_t first = index * task->chunk, left = task->rows - first;
    const ptrdiff_t rows = left < task->chunk ? left : task->chunk;
    const size_t bytes = lbq_hadamard_scratch(task->hadamard) * sizeof(float);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    (task->back ? lbq_hadamard_backward : lbq_hadamard_forward)(
        task->hadamard, rows, task->X + first * task->hadamard->n, lbq_arena_take(&arena, bytes));
    lbq_arena_close(&arena);
    return LBQ_OK;
}

static lbq_status
rotate_hadamard(const lbq_hadamard *hadamard, bool back, ptrdiff_t rows, float *X)
{
    const ptrdiff_t chunk = 1 + CHUNK_WORK / (hadamard->n * (1 + hadamard->cost));
    hadamard_rows task = {.hadamard = hadamard, .back = back, .rows = rows, .chunk = chunk, .X = X};
    if (rows <= chunk)
        return rotate_chunk(&task, 0, 0);
    return lbq_parallel(lbq_pieces(rows, chunk), rotate_chunk, &task);
}

static lbq_status
rotate_dense(const lbq_rotation *rotation, bool back, ptrdiff_t rows, float *X)
{
    const ptrdiff_t n = rotation->n, most = rows < DENSE_ROWS ? rows : DENSE_ROWS;
    const size_t bytes = (size_t)most * (size_t)n * sizeof(float);
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, bytes));
    float *const copy = lbq_arena_take(&arena, bytes);
    lbq_status status = LBQ_OK;
    for (ptrdiff_t first = 0; first < rows && status == LBQ_OK; first += DENSE_ROWS) {
        const ptrdiff_t count = lbq_smaller(DENSE_ROWS, rows - first);
        float *const to = X + first * n;
        memcpy(copy, to, (size_t)count * (size_t)n * sizeof(float));
        status = lbq_sgemm(CblasNoTrans,
                           back ? CblasNoTrans : CblasTrans,
                           count,
                           n,
                           n,
                           1,
                           copy,
                           n,
                           rotation->dense,
                           n,
                           0,
                           to,
                           n);
    }
    lbq_arena_close(&arena);
    return status;
}

static lbq_status
rotate(const lbq_rotation *rotation, bool back, ptrdiff_t rows, float *X)
{
    if (rows == 0)
        return LBQ_OK;
    return rotation->dense ? rotate_dense(rotation, back, rows, X)
                           : rotate_hadamard(&rotation->hadamard, back, rows, X);
}

lbq_status
lbq_rotate(const lbq_rotation *rotation, ptrdiff_t rows, float *X)
{
    return rotate(rotation, false, rows, X);
}

lbq_status
lbq_rotate_back(const lbq_rotation *rotation, ptrdiff_t rows, float *X)
{
    return rotate(rotation, true, rows, X);
}
