/* Prototypes of the AVX-512 kernels: lbq_<kernel>_avx512 for those that table_avx512.c lists. */
#ifndef LBQ_AVX512_H
#define LBQ_AVX512_H

#include "kernels/kernels.h"

#define X(name, result, parameters) result lbq_##name##_avx512 parameters;
#include "kernels/list.h"

#endif
