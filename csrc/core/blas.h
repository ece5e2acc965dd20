/* OpenBLAS: its routines under names without the build's prefix, and products cut into tasks.
 *
 * OpenBLAS runs in the calling thread. lbq_sgemm and lbq_dgemm share a product among the pool's
 * threads, in tiles that depend on its sizes only, so results do not depend on the number of
 * threads. Other routines are called through LBQ_BLAS or LBQ_CBLAS, at most some 50 ms each.
 *
 * OpenBLAS takes a buffer for each call in progress, and ends the process if it cannot allocate
 * one. So no call begins before its buffer exists, and a fork waits for the calls in progress,
 * whose locks the child would inherit.
 *
 * Fortran symbols are declared here because Debian's OpenBLAS has no LAPACKE. LAPACK's matrices are
 * column-major, so "L" names the upper triangle of a row-major matrix. */
#ifndef LBQ_BLAS_H
#define LBQ_BLAS_H

#include <stddef.h>

#include "core/status.h"

#define LBQ_BLAS_PASTE(prefix, name) prefix##name
#define LBQ_BLAS_NAME(prefix, name) LBQ_BLAS_PASTE(prefix, name)
#define BLAS(name) LBQ_BLAS_NAME(LBQ_BLAS_PREFIX, name)

enum { CblasRowMajor = 101 };
enum { CblasNoTrans = 111, CblasTrans = 112 };
enum { CblasUpper = 121, CblasLower = 122 };
enum { CblasNonUnit = 131 };
enum { CblasRight = 142 };

/* C (m, n) = alpha op(A) op(B) + beta C, all row-major, op(A) (m, k), op(B) (k, n), with row
 * strides lda, ldb, ldc; LBQ_NO_MEMORY, LBQ_INTERRUPTED. May be called in a task. */
lbq_status lbq_sgemm(int transa, int transb, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, float alpha,
                     const float *A, ptrdiff_t lda, const float *B, ptrdiff_t ldb, float beta,
                     float *C, ptrdiff_t ldc);
lbq_status lbq_dgemm(int transa, int transb, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, double alpha,
                     const double *A, ptrdiff_t lda, const double *B, ptrdiff_t ldb, double beta,
                     double *C, ptrdiff_t ldc);

/* Around each call of OpenBLAS; LBQ_NO_MEMORY if a buffer is needed and cannot be allocated. */
lbq_status lbq_blas_enter(void);
void lbq_blas_leave(void);

#define LBQ_BLAS(name, ...)                                                                        \
    do {                                                                                           \
        LBQ_TRY(lbq_blas_enter());                                                                 \
        BLAS(name)(__VA_ARGS__);                                                                   \
        lbq_blas_leave();                                                                          \
    } while (0)

/* The same for cblas_<name> on row-major matrices. */
#define LBQ_CBLAS(name, ...) LBQ_BLAS(cblas_##name, CblasRowMajor, __VA_ARGS__)

void BLAS(cblas_sgemm)(int order, int transa, int transb, int m, int n, int k, float alpha,
                       const float *a, int lda, const float *b, int ldb, float beta, float *c,
                       int ldc);
void BLAS(cblas_dgemm)(int order, int transa, int transb, int m, int n, int k, double alpha,
                       const double *a, int lda, const double *b, int ldb, double beta, double *c,
                       int ldc);
void BLAS(cblas_sgemv)(int order, int trans, int m, int n, float alpha, const float *a, int lda,
                       const float *x, int incx, float beta, float *y, int incy);
void BLAS(cblas_ssyrk)(int order, int uplo, int trans, int n, int k, float alpha, const float *a,
                       int lda, float beta, float *c, int ldc);
void BLAS(cblas_dsyrk)(int order, int uplo, int trans, int n, int k, double alpha, const double *a,
                       int lda, double beta, double *c, int ldc);
void BLAS(cblas_dsymm)(int order, int side, int uplo, int m, int n, double alpha, const double *a,
                       int lda, const double *b, int ldb, double beta, double *c, int ldc);
void BLAS(cblas_strsm)(int order, int side, int uplo, int trans, int diag, int m, int n,
                       float alpha, const float *a, int lda, float *b, int ldb);
void BLAS(cblas_dtrsm)(int order, int side, int uplo, int trans, int diag, int m, int n,
                       double alpha, const double *a, int lda, double *b, int ldb);
void BLAS(spotrf_)(const char *uplo, const int *n, float *a, const int *lda, int *info, size_t);
void BLAS(dpotrf_)(const char *uplo, const int *n, double *a, const int *lda, int *info, size_t);
void BLAS(dgeqrf_)(const int *m, const int *n, double *a, const int *lda, double *tau, double *work,
                   const int *lwork, int *info);
void BLAS(dorgqr_)(const int *m, const int *n, const int *k, double *a, const int *lda,
                   const double *tau, double *work, const int *lwork, int *info);
void BLAS(dormqr_)(const char *side, const char *trans, const int *m, const int *n, const int *k,
                   const double *a, const int *lda, const double *tau, double *c, const int *ldc,
                   double *work, const int *lwork, int *info, size_t, size_t);
void BLAS(dgesdd_)(const char *jobz, const int *m, const int *n, double *a, const int *lda,
                   double *s, double *u, const int *ldu, double *vt, const int *ldvt, double *work,
                   const int *lwork, int *iwork, int *info, size_t);
void BLAS(dsyevx_)(const char *jobz, const char *range, const char *uplo, const int *n, double *a,
                   const int *lda, const double *vl, const double *vu, const int *il, const int *iu,
                   const double *abstol, int *m, double *w, double *z, const int *ldz, double *work,
                   const int *lwork, int *iwork, int *ifail, int *info, size_t, size_t, size_t);
void BLAS(dsygvx_)(const int *itype, const char *jobz, const char *range, const char *uplo,
                   const int *n, double *a, const int *lda, double *b, const int *ldb,
                   const double *vl, const double *vu, const int *il, const int *iu,
                   const double *abstol, int *m, double *w, double *z, const int *ldz, double *work,
                   const int *lwork, int *iwork, int *ifail, int *info, size_t, size_t, size_t);

void BLAS(openblas_set_num_threads)(int threads);
char *BLAS(openblas_get_config)(void);
char *BLAS(openblas_get_corename)(void);

typedef void (*lbq_blas_job)(int thread, void *data, int extra);
typedef void (*lbq_blas_threads)(int sync, lbq_blas_job job, int jobs, size_t size, void *data,
                                 int extra);
/* Absent before OpenBLAS 0.3.27. */
__attribute__((weak)) void BLAS(openblas_set_threads_callback_function)(lbq_blas_threads callback);

#endif
