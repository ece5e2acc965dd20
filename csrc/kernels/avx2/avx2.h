/* Prototypes of the AVX2 kernels: lbq_<kernel>_avx2 for those that table_avx2.c lists. */
#ifndef LBQ_AVX2_H
#define LBQ_AVX2_H

#include "kernels/kernels.h"

#define X(name, result, parameters) result lbq_##name##_avx2 parameters;
#include "kernels/list.h"

#endif
