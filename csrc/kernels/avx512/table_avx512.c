/* What AVX-512 does better than the instruction sets below it. */
#include "kernels/avx512/avx512.h"

void
lbq_table_avx512(lbq_kernels *table)
{
    table->widen_f16 = lbq_widen_f16_avx512;
    table->product_f32 = lbq_product_f32_avx512;
    table->rmsnorm_f32 = lbq_rmsnorm_f32_avx512;
    table->swiglu_f32 = lbq_swiglu_f32_avx512;
    table->softmax_f32 = lbq_softmax_f32_avx512;
    table->max_f32 = lbq_max_f32_avx512;
    table->exp_sum_f32 = lbq_exp_sum_f32_avx512;
    table->exp_gap_f32 = lbq_exp_gap_f32_avx512;
    table->hadamard_sylvester = lbq_hadamard_sylvester_avx512;
    table->hadamard_base = lbq_hadamard_base_avx512;
}
