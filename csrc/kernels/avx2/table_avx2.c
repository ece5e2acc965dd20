/* What AVX2 does better than the instruction sets below it. */
#include "kernels/avx2/avx2.h"

void
lbq_table_avx2(lbq_kernels *table)
{
    table->widen_f16 = lbq_widen_f16_avx2;
}
