/* OpenBLAS: the routines that are used, under names without the build's prefix.
 *
 * Fortran symbols are declared here because Debian's OpenBLAS has no LAPACKE. Matrices given to
 * cblas_ are row-major where CblasRowMajor says so; LAPACK's are column-major, so "L" names the
 * upper triangle of a row-major matrix. Call BLAS from the calling thread or in tasks of
 * lbq_parallel_blas, never inside other tasks. */
#ifndef LBQ_BLAS_H
#define LBQ_BLAS_H

#include <stddef.h>

#define LBQ_BLAS_PASTE(prefix, name) prefix##name
#define LBQ_BLAS_NAME(prefix, name) LBQ_BLAS_PASTE(prefix, name)
#define BLAS(name) LBQ_BLAS_NAME(LBQ_BLAS_PREFIX, name)

enum { CblasRowMajor = 101, CblasColMajor = 102 };
enum { CblasNoTrans = 111, CblasTrans = 112 };
enum { CblasUpper = 121, CblasLower = 122 };
enum { CblasNonUnit = 131, CblasUnit = 132 };
enum { CblasLeft = 141, CblasRight = 142 };

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
void BLAS(dgesdd_)(const char *jobz, const int *m, const int *n, double *a, const int *lda,
                   double *s, double *u, const int *ldu, double *vt, const int *ldvt, double *work,
                   const int *lwork, int *iwork, int *info, size_t);

void BLAS(openblas_set_num_threads)(int threads);
char *BLAS(openblas_get_config)(void);
char *BLAS(openblas_get_corename)(void);

typedef void (*lbq_blas_job)(int thread, void *data, int extra);
typedef void (*lbq_blas_threads)(int sync, lbq_blas_job job, int jobs, size_t size, void *data,
                                 int extra);
/* Absent before OpenBLAS 0.3.27: then it keeps its own threads. */
__attribute__((weak)) void BLAS(openblas_set_threads_callback_function)(lbq_blas_threads callback);

#endif
