/* Ranges and order statistics of sixteen groups at once. */
#include "codes/range.h"

#include <math.h>
#include <string.h>

#include "core/interrupt.h"
#include "kernels/kernels.h"

enum { LANES = LBQ_PANEL };

typedef float lanes[LANES];

void
lbq_groups_range(const lbq_groups *groups, float *low, float *high)
{
    if (groups->low && groups->high) {
        memcpy(low, groups->low, LANES * sizeof *low);
        memcpy(high, groups->high, LANES * sizeof *high);
        return;
    }
    lbq_kernel.lanes_range_f32(groups->w, groups->count, low, high);
    if (!groups->together)
        return;
    float least = groups->w[0], most = groups->w[0];
    for (int l = 0; l < (groups->count > 0 ? LANES : groups->rest); l++) {
        least = fminf(least, low[l]);
        most = fmaxf(most, high[l]);
    }
    for (int l = 0; l < groups->rest; l++) {
        least = fminf(least, groups->w[groups->count * LANES + l]);
        most = fmaxf(most, groups->w[groups->count * LANES + l]);
    }
    for (int l = 0; l < LANES; l++) {
        low[l] = least;
        high[l] = most;
    }
}

/* An integer that sorts like the float. */
static int32_t
order_of(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits < 0 ? INT32_MIN - bits : bits;
}

static float
of_order(int32_t bits)
{
    float x;
    bits = bits < 0 ? INT32_MIN - bits : bits;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Number of weights in each group that do not exceed its pivot. */
static void
count_up_to(const lbq_groups *in, const float *pivot, ptrdiff_t *count)
{
    ptrdiff_t all = 0;
    memset(count, 0, LANES * sizeof *count);
    for (ptrdiff_t k = 0; k < in->count; k++)
        for (int l = 0; l < LANES; l++)
            count[l] += in->w[k * LANES + l] <= pivot[l];
    for (int l = 0; l < in->rest; l++)
        count[l] += in->w[in->count * LANES + l] <= pivot[l];
    for (int l = 0; in->together && l < LANES; l++)
        all += count[l];
    for (int l = 0; in->together && l < LANES; l++)
        count[l] = all;
}

/* The order statistic `rank`, found by bisection over the bits of a float, which needs neither
 * scratch nor a sort. */
static void
find_rank(const lbq_groups *groups, const float *least, const float *most, ptrdiff_t rank,
          float *found)
{
    int32_t low[LANES], high[LANES];
    for (int l = 0; l < LANES; l++) {
        low[l] = order_of(least[l]);
        high[l] = order_of(most[l]);
    }
    for (bool more = true; more && lbq_interrupted() == LBQ_OK;) {
        ptrdiff_t below[LANES];
        int32_t half[LANES];
        for (int l = 0; l < LANES; l++) {
            half[l] = low[l] + (int32_t)(((uint32_t)high[l] - (uint32_t)low[l]) / 2);
            found[l] = of_order(half[l]);
        }
        count_up_to(groups, found, below);
        more = false;
        for (int l = 0; l < LANES; l++) {
            if (low[l] == high[l])
                continue;
            if (below[l] > rank)
                high[l] = half[l];
            else
                low[l] = half[l] + 1;
            more = more || low[l] < high[l];
        }
    }
    for (int l = 0; l < LANES; l++)
        found[l] = of_order(low[l]);
}

void
lbq_groups_quantile(const lbq_groups *groups, const float *low, const float *high, double percent,
                    float *found)
{
    const ptrdiff_t count = groups->together ? groups->count * LANES + groups->rest : groups->count;
    const double position = percent / 100 * (double)(count - 1);
    const ptrdiff_t rank = (ptrdiff_t)position;
    lanes here, next;
    find_rank(groups, low, high, rank, here);
    find_rank(groups, low, high, rank + 1 < count ? rank + 1 : rank, next);
    for (int l = 0; l < LANES; l++)
        found[l] = (float)((double)here[l] +
                           ((double)next[l] - (double)here[l]) * (position - (double)rank));
}
