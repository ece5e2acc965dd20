/* Instruction sets: their names, and which of them this CPU and operating system can run.
 *
 * The order is the order of dispatch: a kernel table is filled from LBQ_PORTABLE upwards. */
#ifndef LBQ_CPU_H
#define LBQ_CPU_H

typedef enum { LBQ_PORTABLE, LBQ_AVX2, LBQ_AVX512, LBQ_ISA_COUNT } lbq_isa;

/* "portable", "avx2", "avx512": AVX2 includes FMA and F16C; AVX-512 is F, BW, VL, DQ and VNNI. */
const char *lbq_isa_name(lbq_isa isa);

/* The instruction set with this name, or -1. */
int lbq_isa_find(const char *name);

/* The strongest instruction set that both the CPU and the operating system support. */
lbq_isa lbq_cpu_isa(void);

#endif
