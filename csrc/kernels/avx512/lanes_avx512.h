/* Masks for the end of an array. */
#ifndef LBQ_LANES_AVX512_H
#define LBQ_LANES_AVX512_H

#include <immintrin.h>
#include <stddef.h>

/* Mask of the first `left` lanes, all of them if left >= 16. */
static inline __mmask16
lbq_lanes_avx512(ptrdiff_t left)
{
    return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
}

#endif
