/* What AVX2 does better than the instruction sets below it. */
#include "kernels/avx2/avx2.h"

void
lbq_table_avx2(lbq_kernels *table)
{
    table->narrow_f16 = lbq_narrow_f16_avx2;
    table->round_f16 = lbq_round_f16_avx2;
    table->cover_f16 = lbq_cover_f16_avx2;
    table->product_f32 = lbq_product_f32_avx2;
    table->product_i8_f32 = lbq_product_i8_f32_avx2;
    table->widen_i8 = lbq_widen_i8_avx2;
    table->range_f32 = lbq_range_f32_avx2;
    table->encode_f32 = lbq_encode_f32_avx2;
    table->round_panel = lbq_round_panel_avx2;
    table->to_lanes_f32 = lbq_to_lanes_f32_avx2;
    table->from_lanes_u8 = lbq_from_lanes_u8_avx2;
    table->lanes_range_f32 = lbq_lanes_range_f32_avx2;
    table->centre_f32 = lbq_centre_f32_avx2;
    table->grid_sums_f32 = lbq_grid_sums_f32_avx2;
    table->refit_f32 = lbq_refit_f32_avx2;
    table->improve_f32 = lbq_improve_f32_avx2;
    table->table_sums_f32 = lbq_table_sums_f32_avx2;
    table->feedback_f32 = lbq_feedback_f32_avx2;
    table->solve_f32 = lbq_solve_f32_avx2;
    table->add_rows_f32 = lbq_add_rows_f32_avx2;
    table->viterbi_f32 = lbq_viterbi_f32_avx2;
    table->round_f32 = lbq_round_f32_avx2;
    table->moments_f32 = lbq_moments_f32_avx2;
    table->rmsnorm_f32 = lbq_rmsnorm_f32_avx2;
    table->swiglu_f32 = lbq_swiglu_f32_avx2;
    table->softmax_f32 = lbq_softmax_f32_avx2;
    table->max_f32 = lbq_max_f32_avx2;
    table->exp_sum_f32 = lbq_exp_sum_f32_avx2;
    table->exp_gap_f32 = lbq_exp_gap_f32_avx2;
    table->hadamard_sylvester = lbq_hadamard_sylvester_avx2;
    table->hadamard_base = lbq_hadamard_base_avx2;
    table->quantize_i8 = lbq_quantize_i8_avx2;
    table->interleave = lbq_interleave_avx2;
    table->subset_sums = lbq_subset_sums_avx2;
    table->unpack_u1 = lbq_unpack_u1_avx2;
    table->unpack_u2 = lbq_unpack_u2_avx2;
    table->unpack_u3 = lbq_unpack_u3_avx2;
    table->unpack_u4 = lbq_unpack_u4_avx2;
    table->gemv_u1_i8 = lbq_gemv_u1_i8_avx2;
    table->gemv_u2_i8 = lbq_gemv_u2_i8_avx2;
    table->gemv_u3_i8 = lbq_gemv_u3_i8_avx2;
    table->gemv_u4_i8 = lbq_gemv_u4_i8_avx2;
    table->gemv_u8_i8 = lbq_gemv_u8_i8_avx2;
    table->gemv_t2_i8 = lbq_gemv_t2_i8_avx2;
    table->gemv_t3_i8 = lbq_gemv_t3_i8_avx2;
    table->gemv_t4_i8 = lbq_gemv_t4_i8_avx2;
    table->gemv_trellis_i8 = lbq_gemv_trellis_i8_avx2;
    table->expand_trellis = lbq_expand_trellis_avx2;
    table->lookup_u8 = lbq_lookup_u8_avx2;
    table->gemm_u8_i8 = lbq_gemm_u8_i8_avx2;
    table->store_tile = lbq_store_tile_avx2;
    table->decode_f32 = lbq_decode_f32_avx2;
}
