/* Fixed tables of levels: NF4 and signed powers of two. */
#include "codes/code.h"

#include <math.h>
#include <string.h>

void
lbq_levels_nf4(float *levels)
{
    /* T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E:
     * quantiles of the normal distribution, with an exact zero, the ends moved to +-1. */
    static const float NF4[LBQ_MAX_LEVELS] = {
        -1.0f,
        -0.6961928009986877f,
        -0.5250730514526367f,
        -0.39491748809814453f,
        -0.28444138169288635f,
        -0.18477343022823334f,
        -0.09105003625154495f,
        0.0f,
        0.07958029955625534f,
        0.16093020141124725f,
        0.24611230194568634f,
        0.33791524171829224f,
        0.44070982933044434f,
        0.5626170039176941f,
        0.7229568362236023f,
        1.0f,
    };
    memcpy(levels, NF4, sizeof NF4);
}

void
lbq_levels_log(int count, float *levels)
{
    const int zero = count / 2 - 1;
    levels[zero] = 0;
    for (int i = 0; i < zero; i++)
        levels[i] = -ldexpf(1, -i);
    for (int i = zero + 1; i < count; i++)
        levels[i] = ldexpf(1, i - count + 1);
}
