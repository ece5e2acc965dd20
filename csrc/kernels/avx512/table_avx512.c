/* What AVX-512 does better than the instruction sets below it. */
#include "kernels/avx512/avx512.h"

void
lbq_table_avx512(lbq_kernels *table)
{
    table->widen_f16 = lbq_widen_f16_avx512;
}
