/* Randomised Hadamard matrices of any order n, and their fast transform.
 *
 *     R = (B_1 (x) ... (x) B_m (x) H) D,    n = c_1 ... c_m 2^k
 *
 * H is Sylvester's matrix of order 2^k; B_j of order c_j has B_j B_j^T = c_j I and is a Hadamard
 * matrix (entries +-1) if Paley's constructions give one, else Hartley's matrix with entries below
 * 1.42 in magnitude; D = diag(s) / sqrt(n) with signs s. No B_j at all if n = 2^k. */
#ifndef LBQ_HADAMARD_H
#define LBQ_HADAMARD_H

#include <stddef.h>

#include "core/status.h"

enum { LBQ_MAX_FACTORS = 8, LBQ_MAX_ORDER = 4096 };

typedef struct {
    ptrdiff_t n;
    int factors;                       /* m */
    ptrdiff_t orders[LBQ_MAX_FACTORS]; /* c_j */
    const float *bases;                /* B_1 (c_1, c_1), B_1^T, B_2, B_2^T, ..., in one array */
    const float *diagonal;             /* of D (n) */
    ptrdiff_t length;                  /* 2^k; this and `cost` are set by lbq_hadamard_prepare() */
    ptrdiff_t cost;                    /* additions per element: c_1 + ... + c_m + k */
} lbq_hadamard;

/* The orders c_j of the cheapest among the transforms that use Hartley's matrices least, then
 * zeros. LBQ_BAD_VALUE if an order would have to exceed LBQ_MAX_ORDER. */
lbq_status lbq_hadamard_orders(ptrdiff_t n, ptrdiff_t orders[LBQ_MAX_FACTORS]);

/* B (order, order). LBQ_NO_MEMORY, or LBQ_BAD_VALUE if order is not 1 to LBQ_MAX_ORDER. */
lbq_status lbq_hadamard_base(ptrdiff_t order, float *B);

/* Fills in length and cost; LBQ_BAD_VALUE unless n = c_1 ... c_m 2^k. */
lbq_status lbq_hadamard_prepare(lbq_hadamard *hadamard);

/* Replaces each row x of X (rows, n) by R x, or R^T x, one at a time in the calling thread.
 * `scratch` has lbq_hadamard_scratch() floats and is 64-byte aligned. */
size_t lbq_hadamard_scratch(const lbq_hadamard *hadamard);
void lbq_hadamard_forward(const lbq_hadamard *hadamard, ptrdiff_t rows, float *X, float *scratch);
void lbq_hadamard_backward(const lbq_hadamard *hadamard, ptrdiff_t rows, float *X, float *scratch);

#endif
