/* OpenBLAS's buffers, and products cut into tiles.
 *
 * OpenBLAS keeps its buffers, so one for each concurrent call is enough. They are made while no
 * call is in progress: a matrix-vector product is called with two threads, and the callback that
 * gets its jobs makes the next such call, which needs another buffer because all earlier ones are
 * still in use. The jobs themselves are not run. */
#include "core/blas.h"

#include <pthread.h>
#include <stdbool.h>
#include <sys/mman.h>

#include "core/memory.h"
#include "core/threads.h"

enum {
    MAX_BUFFERS = 128, /* slots of OpenBLAS built for 64 threads; each nested call takes stack */
    SIDE = 1024,       /* of the matrix that makes buffers: large enough for two threads */
    EDGE = 512,        /* of the largest tile: at 2048 columns 2 % slower than a single tile */
    LEAST_EDGE = 64,
    TILES = 16,          /* in a product of few rows, for the threads to share */
    SMALL = 1 << 19,     /* fewer multiplications, some 10 us, make one tile */
    TILE_DEPTH = 1 << 13 /* above it tiles get smaller: they take 40 ms on a slow core */
};
#define BUFFER_BYTES ((size_t)32 << 20)

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER; /* guards users, closed and buffers */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int users;   /* calls in progress */
static bool closed; /* a thread waits for them to end, or needs none to be in progress */
static int buffers; /* made so far */

/* Whether there is memory for `count` more buffers. */
static bool
has_room(int count)
{
    const size_t bytes = (size_t)count * BUFFER_BYTES;
    void *const room =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED)
        return false;
    munmap(room, bytes);
    return true;
}

static const float *matrix; /* of the calls that make buffers */
static int reached, wanted;

static void
hold_one_more(void)
{
    static float x[SIDE], y[SIDE];
    BLAS(cblas_sgemv)(CblasRowMajor, CblasNoTrans, SIDE, SIDE, 1, matrix, SIDE, x, 1, 1, y, 1);
}

static void
instead_of_jobs(int sync, lbq_blas_job job, int jobs, size_t size, void *data, int extra)
{
    (void)sync, (void)job, (void)jobs, (void)size, (void)data, (void)extra;
    if (++reached < wanted)
        hold_one_more();
}

/* Raises the number of buffers to `count`, or as far as memory allows. */
static void
make_buffers(int count)
{
    /* One extra buffer must fit: OpenBLAS and other threads allocate memory too. */
    while (count > buffers && !has_room(count - buffers + 1))
        count--;
    if (count <= buffers)
        return;
    const size_t bytes = SIDE * SIDE * sizeof(float);
    void *const zeros = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (zeros == MAP_FAILED)
        return;
    if (BLAS(openblas_set_threads_callback_function)) {
        matrix = zeros;
        reached = 0;
        wanted = count;
        BLAS(openblas_set_threads_callback_function)(instead_of_jobs);
        BLAS(openblas_set_num_threads)(2);
        hold_one_more();
    }
    BLAS(openblas_set_num_threads)(1);
    buffers = count;
    munmap(zeros, bytes);
}

/* The caller holds `gate`. On return no call is in progress, and none begins before open_gate(). */
static void
close_gate(void)
{
    while (closed)
        pthread_cond_wait(&changed, &gate);
    closed = true;
    while (users > 0)
        pthread_cond_wait(&changed, &gate);
}

static void
open_gate(void)
{
    closed = false;
    pthread_cond_broadcast(&changed);
}

static void
before_fork(void)
{
    pthread_mutex_lock(&gate);
    close_gate();
}

static void
after_fork_in_parent(void)
{
    open_gate();
    pthread_mutex_unlock(&gate);
}

static void
after_fork_in_child(void)
{
    closed = false;
    pthread_mutex_init(&gate, NULL);
    pthread_cond_init(&changed, NULL);
}

static void
watch_forks(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

lbq_status
lbq_blas_enter(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&gate);
    while (closed || users >= buffers) {
        if (closed || users >= MAX_BUFFERS || (users > 0 && !has_room(2))) {
            pthread_cond_wait(&changed, &gate); /* for a call in progress to release its buffer */
            continue;
        }
        const int threads = lbq_threads() < MAX_BUFFERS ? lbq_threads() : MAX_BUFFERS;
        close_gate();
        make_buffers(buffers < threads ? threads : buffers + 1);
        open_gate();
        if (buffers == 0) {
            pthread_mutex_unlock(&gate);
            return lbq_fail(LBQ_NO_MEMORY, "cannot allocate a buffer for OpenBLAS");
        }
    }
    users++;
    pthread_mutex_unlock(&gate);
    return LBQ_OK;
}

void
lbq_blas_leave(void)
{
    pthread_mutex_lock(&gate);
    users--;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&gate);
}

/* A product and its tiles of `height` x `width`, `across` of them side by side. */
typedef struct {
    int transa, transb;
    ptrdiff_t m, n, k, lda, ldb, ldc;
    ptrdiff_t height, width, across;
    double alpha, beta;
    const void *A, *B;
    void *C;
} product;

/* Size of roughly equal pieces of at most `edge`: all of it, or a multiple of 16. */
static ptrdiff_t
even_piece(ptrdiff_t whole, ptrdiff_t edge)
{
    return whole <= edge ? whole : (lbq_pieces(whole, lbq_pieces(whole, edge)) + 15) / 16 * 16;
}

/* Cuts the product; returns the number of tiles. */
static ptrdiff_t
cut(product *p)
{
    ptrdiff_t edge = EDGE;
    for (ptrdiff_t depth = p->k; depth > TILE_DEPTH && edge > LEAST_EDGE; depth /= 2)
        edge /= 2;
    const bool small = (double)p->m * (double)p->n * (double)p->k < SMALL;
    p->height = even_piece(p->m, edge);
    ptrdiff_t wide = edge;
    if (p->height == p->m && lbq_pieces(p->n, TILES) < edge)
        wide = lbq_pieces(p->n, TILES) > LEAST_EDGE ? lbq_pieces(p->n, TILES) : LEAST_EDGE;
    p->width = even_piece(p->n, small ? p->n : wide);
    p->across = lbq_pieces(p->n, p->width);
    return lbq_pieces(p->m, p->height) * p->across;
}

#define PRODUCT(name, task, real, gemm)                                                            \
    static lbq_status task(void *context, ptrdiff_t index, int worker)                             \
    {                                                                                              \
        (void)worker;                                                                              \
        const product *const p = context;                                                          \
        const ptrdiff_t row = index / p->across * p->height;                                       \
        const ptrdiff_t column = index % p->across * p->width;                                     \
        LBQ_CBLAS(gemm,                                                                            \
                  p->transa,                                                                       \
                  p->transb,                                                                       \
                  (int)lbq_smaller(p->height, p->m - row),                                         \
                  (int)lbq_smaller(p->width, p->n - column),                                       \
                  (int)p->k,                                                                       \
                  (real)p->alpha,                                                                  \
                  (const real *)p->A + (p->transa == CblasTrans ? row : row * p->lda),             \
                  (int)p->lda,                                                                     \
                  (const real *)p->B + (p->transb == CblasTrans ? column * p->ldb : column),       \
                  (int)p->ldb,                                                                     \
                  (real)p->beta,                                                                   \
                  (real *)p->C + row * p->ldc + column,                                            \
                  (int)p->ldc);                                                                    \
        return LBQ_OK;                                                                             \
    }                                                                                              \
    lbq_status name(int transa,                                                                    \
                    int transb,                                                                    \
                    ptrdiff_t m,                                                                   \
                    ptrdiff_t n,                                                                   \
                    ptrdiff_t k,                                                                   \
                    real alpha,                                                                    \
                    const real *A,                                                                 \
                    ptrdiff_t lda,                                                                 \
                    const real *B,                                                                 \
                    ptrdiff_t ldb,                                                                 \
                    real beta,                                                                     \
                    real *C,                                                                       \
                    ptrdiff_t ldc)                                                                 \
    {                                                                                              \
        product p = {                                                                              \
            .transa = transa,                                                                      \
            .transb = transb,                                                                      \
            .m = m,                                                                                \
            .n = n,                                                                                \
            .k = k,                                                                                \
            .lda = lda,                                                                            \
            .ldb = ldb,                                                                            \
            .ldc = ldc,                                                                            \
            .alpha = (double)alpha,                                                                \
            .beta = (double)beta,                                                                  \
            .A = A,                                                                                \
            .B = B,                                                                                \
            .C = C,                                                                                \
        };                                                                                         \
        const ptrdiff_t tiles = cut(&p);                                                           \
        return lbq_parallel(tiles, task, &p);                                                      \
    }

PRODUCT(lbq_sgemm, multiply_tile_f32, float, sgemm)
PRODUCT(lbq_dgemm, multiply_tile_f64, double, dgemm)
