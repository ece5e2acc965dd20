/* The kernels: inner loops that exist once per instruction set, and the table of those in use.
 *
 * list.h has their contracts. */
#ifndef LBQ_KERNELS_H
#define LBQ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "core/cpu.h"
#include "core/packed.h"
#include "core/status.h"

enum { LBQ_TILE = 8 /* tokens of a gemm_u8_i8 call */ };

/* Quantized activations of `width` tokens, interleaved: x[t,k] ~ scale[k / step][t] * q[t,k]. */
typedef struct {
    const int8_t *values; /* q as [k / 4][width][k % 4], -127 to 127, zero beyond the last column */
    /* [step][3][width]: scale; total = scale * sum of q over the step; shift = -zero * total with
     * the zero of the weight, or 0 if it has offsets. For a table of levels (lbq_byte_levels),
     * step * scale and (base - zero) * total replace scale and shift */
    const float *factors;
    ptrdiff_t width;
    const uint8_t *sums; /* subset_sums of one token after another; for gemv_u1_i8 only */
} lbq_activations;

/* How float16 grids cover ranges: with low and high times `clip`, in float32,
 *     start = the largest float16 <= low if there are offsets, else 0
 *     scale = the smallest float16 >= 2^-24, (high - start) / above and (start - low) / below
 *     offset = start - zero * scale
 * saturating at 65504. Rounding in float32 may leave an end just outside its grid, which changes no
 * code. */
typedef struct {
    float clip;
    int has_offset;
    float zero;         /* the level that means 0; 0 if there are offsets */
    float above, below; /* steps from start to either end, infinite where there are none */
} lbq_cover;

enum { LBQ_HADAMARD_LANES = 32 /* at a time in hadamard_base: two AVX-512 registers */ };

typedef struct {
#define X(name, result, parameters) result(*name) parameters;
#include "kernels/list.h"
} lbq_kernels;

/* The table in use, filled by lbq_use_isa. */
extern lbq_kernels lbq_kernel;

/* Fills the table from the portable kernels up to `isa`; LBQ_BAD_VALUE if the CPU lacks it.
 * Must not be called while kernels run. */
lbq_status lbq_use_isa(lbq_isa isa);

/* The instruction set of the table. */
lbq_isa lbq_isa_in_use(void);

/* Names of all kernels, and the instruction set whose version of a kernel is in use. */
extern const char *const lbq_kernel_names[];
extern const int lbq_kernel_count;
lbq_isa lbq_kernel_isa(int kernel);

/* Each instruction set overwrites the entries that it improves. */
void lbq_table_portable(lbq_kernels *table);
void lbq_table_avx2(lbq_kernels *table);
void lbq_table_avx512(lbq_kernels *table);

#endif
