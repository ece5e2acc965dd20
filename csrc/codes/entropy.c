/* The clipping range that loses the least information, after S. Migacz, "8-bit inference with
 * TensorRT", GTC 2017. */
#include <math.h>

#include "codes/code.h"
#include "core/interrupt.h"

/* Sum over the bins of P log(P / Q) when the first `kept` bins are cut into `levels` runs. P is the
 * histogram with all counts beyond the last kept bin moved into it; Q spreads the mass of each run
 * evenly over its bins with P > 0 and is normalised again. Infinite if a run without mass has a bin
 * with P > 0. */
static double
divergence(const double *counts, int kept, int levels, double total, double beyond)
{
    const double inside = total - beyond;
    double sum = 0;
    for (int run = 0, begin = 0; run < levels; run++) {
        const int end = (int)((long)(run + 1) * kept / levels);
        double mass = 0;
        int used = 0;
        for (int i = begin; i < end; i++) {
            mass += counts[i];
            used += counts[i] > 0 || (i == kept - 1 && beyond > 0);
        }
        for (int i = begin; i < end; i++) {
            const double p = (counts[i] + (i == kept - 1 ? beyond : 0)) / total;
            if (p > 0)
                sum += mass > 0 ? p * log(p * used * inside / mass) : HUGE_VAL;
        }
        begin = end;
    }
    return sum;
}

lbq_status
lbq_entropy_range(const double *counts, int bins, int levels, int *kept)
{
    LBQ_REQUIRE(levels >= 1 && levels <= bins,
                LBQ_BAD_VALUE,
                "levels is %d, expected 1 to the number of bins, %d",
                levels,
                bins);
    double total = 0;
    for (int i = 0; i < bins; i++) {
        LBQ_REQUIRE(counts[i] >= 0 && isfinite(counts[i]),
                    LBQ_BAD_VALUE,
                    "counts[%d] is %g, expected finite numbers >= 0",
                    i,
                    counts[i]);
        total += counts[i];
    }
    LBQ_REQUIRE(total > 0, LBQ_BAD_VALUE, "the histogram is empty");
    double least = HUGE_VAL, inside = 0;
    *kept = bins;
    for (int i = 0; i < levels - 1; i++)
        inside += counts[i];
    for (int end = levels; end <= bins; end++) {
        LBQ_TRY(lbq_interrupted());
        inside += counts[end - 1];
        if (inside <= 0)
            continue;
        const double loss = divergence(counts, end, levels, total, total - inside);
        if (loss <= least) {
            least = loss;
            *kept = end;
        }
    }
    return LBQ_OK;
}
