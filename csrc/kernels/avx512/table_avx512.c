/* What AVX-512 does better than the instruction sets below it. */
#include "kernels/avx512/avx512.h"

void
lbq_table_avx512(lbq_kernels *table)
{
    table->narrow_f16 = lbq_narrow_f16_avx512;
    table->product_f32 = lbq_product_f32_avx512;
    table->product_i8_f32 = lbq_product_i8_f32_avx512;
    table->widen_i8 = lbq_widen_i8_avx512;
    table->range_f32 = lbq_range_f32_avx512;
    table->encode_f32 = lbq_encode_f32_avx512;
    table->cover_f16 = lbq_cover_f16_avx512;
    table->round_panel = lbq_round_panel_avx512;
    table->to_lanes_f32 = lbq_to_lanes_f32_avx512;
    table->lanes_range_f32 = lbq_lanes_range_f32_avx512;
    table->centre_f32 = lbq_centre_f32_avx512;
    table->grid_sums_f32 = lbq_grid_sums_f32_avx512;
    table->refit_f32 = lbq_refit_f32_avx512;
    table->improve_f32 = lbq_improve_f32_avx512;
    table->table_sums_f32 = lbq_table_sums_f32_avx512;
    table->feedback_f32 = lbq_feedback_f32_avx512;
    table->solve_f32 = lbq_solve_f32_avx512;
    table->add_rows_f32 = lbq_add_rows_f32_avx512;
    table->viterbi_f32 = lbq_viterbi_f32_avx512;
    table->round_f32 = lbq_round_f32_avx512;
    table->moments_f32 = lbq_moments_f32_avx512;
    table->rmsnorm_f32 = lbq_rmsnorm_f32_avx512;
    table->swiglu_f32 = lbq_swiglu_f32_avx512;
    table->softmax_f32 = lbq_softmax_f32_avx512;
    table->max_f32 = lbq_max_f32_avx512;
    table->exp_sum_f32 = lbq_exp_sum_f32_avx512;
    table->exp_gap_f32 = lbq_exp_gap_f32_avx512;
    table->hadamard_sylvester = lbq_hadamard_sylvester_avx512;
    table->hadamard_base = lbq_hadamard_base_avx512;
    table->quantize_i8 = lbq_quantize_i8_avx512;
    table->unpack_u1 = lbq_unpack_u1_avx512;
    table->unpack_u2 = lbq_unpack_u2_avx512;
    table->unpack_u3 = lbq_unpack_u3_avx512;
    table->unpack_u4 = lbq_unpack_u4_avx512;
    table->gemv_u1_i8 = lbq_gemv_u1_i8_avx512;
    table->gemv_u2_i8 = lbq_gemv_u2_i8_avx512;
    table->gemv_u3_i8 = lbq_gemv_u3_i8_avx512;
    table->gemv_u4_i8 = lbq_gemv_u4_i8_avx512;
    table->gemv_u8_i8 = lbq_gemv_u8_i8_avx512;
    table->gemv_t2_i8 = lbq_gemv_t2_i8_avx512;
    table->gemv_t3_i8 = lbq_gemv_t3_i8_avx512;
    table->gemv_t4_i8 = lbq_gemv_t4_i8_avx512;
    table->gemv_trellis_i8 = lbq_gemv_trellis_i8_avx512;
    table->expand_trellis = lbq_expand_trellis_avx512;
    table->lookup_u8 = lbq_lookup_u8_avx512;
    table->gemm_u8_i8 = lbq_gemm_u8_i8_avx512;
    table->store_tile = lbq_store_tile_avx512;
    table->decode_f32 = lbq_decode_f32_avx512;
}
