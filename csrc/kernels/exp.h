/* Constants of exp(x) and 2^x in float32, shared by all instruction sets.
 *
 * x = n ln 2 + r with |r| <= 0.35, and exp(r) = 1 + r + r^2 (C2 + r C3 + ... + r^4 C6), the minimax
 * polynomial of its relative error (4e-9). ln 2 is split so that n LN2_HIGH is exact (Cody and
 * Waite, "Software Manual for the Elementary Functions", 1980). Including rounding, the relative
 * error stays below 2^-22; results below the smallest normal number may be rounded to zero. exp(0)
 * is 1. Arguments are clamped to LOW and HIGH, which give 0 and infinity.
 *
 * 2^x needs no such care: x = n + r is exact, |r| <= 0.5, and 2^r = 1 + r (C1 + r C2 + ... + r^5
 * C6) likewise (3e-9). For x <= 0, as in a softmax: base-2 logarithms save the two products that
 * split off n ln 2. */
#ifndef LBQ_EXP_H
#define LBQ_EXP_H

#define LBQ_EXP_LOW -104.0f
#define LBQ_EXP_HIGH 89.0f
#define LBQ_EXP_LOG2E 1.44269504f
#define LBQ_EXP_LN2_HIGH 0.693359375f
#define LBQ_EXP_LN2_LOW -2.12194440e-4f
#define LBQ_EXP_C2 0.49999994f
#define LBQ_EXP_C3 0.1666652f
#define LBQ_EXP_C4 0.0416684f
#define LBQ_EXP_C5 0.00836885f
#define LBQ_EXP_C6 0.001381432f

#define LBQ_EXP2_LOW -150.0f
#define LBQ_EXP2_C1 0.693147182f
#define LBQ_EXP2_C2 0.240226477f
#define LBQ_EXP2_C3 0.0555035993f
#define LBQ_EXP2_C4 0.00961850584f
#define LBQ_EXP2_C5 0.00133908074f
#define LBQ_EXP2_C6 0.000153264700f

#endif
