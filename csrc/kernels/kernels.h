/* The kernels: inner loops that exist once per instruction set, and the table that holds the
 * chosen ones.
 *
 * LBQ_KERNELS(X) lists each as X(name, result, (parameters)). A kernel checks nothing, allocates
 * nothing and cannot fail. Its portable version is the specification: every other one gives the
 * same bits for integer kernels and for those said to be exact, and else agrees to rounding. */
#ifndef LBQ_KERNELS_H
#define LBQ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "core/cpu.h"
#include "core/status.h"

/* X(name, result, (parameters)), each with its contract in the comment above it. */
#define LBQ_KERNELS(X)                                                                             \
    /* y[i] = half x[i] widened to float32; exact. */                                              \
    X(widen_f16, void, (const uint16_t *x, ptrdiff_t count, float *y))

typedef struct {
#define LBQ_KERNEL_POINTER(name, result, parameters) result(*name) parameters;
    LBQ_KERNELS(LBQ_KERNEL_POINTER)
#undef LBQ_KERNEL_POINTER
} lbq_kernels;

/* The table in use: filled for this CPU, or for a weaker one by lbq_use_isa. */
extern lbq_kernels lbq_kernel;

/* Fills the table from the portable kernels up to `isa`; LBQ_BAD_VALUE if the CPU lacks it.
 * Not while kernels run. */
lbq_status lbq_use_isa(lbq_isa isa);

/* The instruction set of the table. */
lbq_isa lbq_isa_in_use(void);

/* Names of all kernels; and for each the instruction set whose version is in use. */
extern const char *const lbq_kernel_names[];
extern const int lbq_kernel_count;
lbq_isa lbq_kernel_isa(int kernel);

/* Each instruction set overwrites the entries that it does better. */
void lbq_table_portable(lbq_kernels *table);
void lbq_table_avx2(lbq_kernels *table);
void lbq_table_avx512(lbq_kernels *table);

#endif
