/* Sums of magnitudes, for every instruction set. */
#ifndef LBQ_ROW_MOMENTS_H
#define LBQ_ROW_MOMENTS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

enum { LBQ_MOMENT_LANES = 16 };

/* moments_f32: every sixteenth number goes to the same lane, and lanes are added in order. */
static inline ptrdiff_t
lbq_moments_row(const float *x, ptrdiff_t count, float threshold, float *sum, float *largest)
{
    float total[LBQ_MOMENT_LANES] = {0}, most[LBQ_MOMENT_LANES] = {0};
    int32_t above[LBQ_MOMENT_LANES] = {0};
    ptrdiff_t i = 0;
    for (; i + LBQ_MOMENT_LANES <= count; i += LBQ_MOMENT_LANES)
        for (int j = 0; j < LBQ_MOMENT_LANES; j++) {
            const float magnitude = fabsf(x[i + j]);
            total[j] += magnitude;
            most[j] = magnitude > most[j] ? magnitude : most[j];
            above[j] += magnitude > threshold;
        }
    for (int j = 0; i + j < count; j++) {
        const float magnitude = fabsf(x[i + j]);
        total[j] += magnitude;
        most[j] = magnitude > most[j] ? magnitude : most[j];
        above[j] += magnitude > threshold;
    }
    float whole = 0, maximum = 0;
    ptrdiff_t exceeding = 0;
    for (int j = 0; j < LBQ_MOMENT_LANES; j++) {
        whole += total[j];
        maximum = most[j] > maximum ? most[j] : maximum;
        exceeding += above[j];
    }
    *sum = whole;
    *largest = maximum;
    return exceeding;
}

#endif
