/* One-dimensional k-means: the table of levels that fits a set of numbers best.
 *
 * After sorting, clusters are intervals, and the best k intervals of the first i points extend the
 * best k - 1 intervals of fewer points. This is a dynamic programme whose split points rise with i,
 * so divide and conquer takes O(k n log n) (H. Wang, M. Song, "Ckmeans.1d.dp: Optimal k-means
 * clustering in one dimension by dynamic programming", 2011; X. Wu, "Optimal quantization by matrix
 * searching", 1991). Many points are first gathered into bins; Lloyd's iteration on prefix sums,
 * O(k log n) per step, then moves the boundaries between single points. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "codes/code.h"
#include "core/interrupt.h"
#include "core/memory.h"

enum {
    BINS = 2048,
    LLOYD_STEPS = 200,
    DIGIT_BITS = 11, /* counts fit in the first-level cache; six digits, an even number */
    DIGIT_MASK = (1 << DIGIT_BITS) - 1,
};

typedef struct {
    double value, weight;
} point;

/* An unsigned integer that sorts like the double. */
static inline uint64_t
order_of(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits >> 63 ? ~bits : bits | UINT64_C(1) << 63;
}

/* Radix sort by value, lowest digit first; `room` holds n points. It takes a quarter of the time of
 * qsort, which calls a function for each comparison. */
static lbq_status
sort(point *points, point *room, ptrdiff_t n)
{
    for (int shift = 0; shift < 64; shift += DIGIT_BITS) {
        ptrdiff_t at[1 << DIGIT_BITS] = {0}, before = 0;
        LBQ_TRY(lbq_interrupted());
        for (ptrdiff_t i = 0; i < n; i++)
            at[order_of(points[i].value) >> shift & DIGIT_MASK]++;
        for (int digit = 0; digit <= DIGIT_MASK; digit++) {
            const ptrdiff_t count = at[digit];
            at[digit] = before;
            before += count;
        }
        for (ptrdiff_t i = 0; i < n; i++)
            room[at[order_of(points[i].value) >> shift & DIGIT_MASK]++] = points[i];
        point *const sorted = room;
        room = points;
        points = sorted;
    }
    return LBQ_OK;
}

/* Prefix sums of weight, weight x and weight x^2, x measured from the mean. */
typedef struct {
    double *w, *wx, *wxx;
} prefix;

/* Squared error of points [begin, end) around their mean. */
static double
cost(const prefix *sum, ptrdiff_t begin, ptrdiff_t end)
{
    const double w = sum->w[end] - sum->w[begin], wx = sum->wx[end] - sum->wx[begin];
    return w > 0 ? fmax(sum->wxx[end] - sum->wxx[begin] - wx * wx / w, 0) : 0;
}

typedef struct {
    const prefix *sum;
    const double *before; /* best error of the first i points with one cluster fewer */
    double *error;
    int *split; /* where the last cluster of the first i points begins */
} layer;

/* Fills error and split for ends in [first, last], whose splits lie in [low, high]. */
static void
fill_layer(const layer *l, int first, int last, int low, int high)
{
    if (first > last)
        return;
    const int end = first + (last - first) / 2;
    double least = HUGE_VAL;
    int at = low;
    for (int begin = low; begin <= high && begin <= end; begin++) {
        const double error = l->before[begin] + cost(l->sum, begin, end);
        if (error < least) {
            least = error;
            at = begin;
        }
    }
    l->error[end] = least;
    l->split[end] = at;
    fill_layer(l, first, end - 1, low, at);
    fill_layer(l, end + 1, last, at, high);
}

/* The ends of the best `count` intervals of `bins` bins. */
static void
best_intervals(const prefix *sum, int bins, int count, double *errors, int *splits, int *ends)
{
    double *before = errors, *error = errors + bins + 1;
    for (int end = 0; end <= bins; end++)
        before[end] = cost(sum, 0, end);
    for (int k = 1; k < count; k++) {
        const layer l = {
            .sum = sum, .before = before, .error = error, .split = splits + k * (bins + 1)};
        fill_layer(&l, 0, bins, 0, bins);
        error = before;
        before = l.error;
    }
    ends[count - 1] = bins;
    for (int k = count - 1; k > 0; k--)
        ends[k - 1] = splits[k * (bins + 1) + ends[k]];
}

static void
fill_prefix(const prefix *sum, const point *points, ptrdiff_t n, double mean)
{
    sum->w[0] = sum->wx[0] = sum->wxx[0] = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        const double x = points[i].value - mean, w = points[i].weight;
        sum->w[i + 1] = sum->w[i] + w;
        sum->wx[i + 1] = sum->wx[i] + w * x;
        sum->wxx[i + 1] = sum->wxx[i] + w * x * x;
    }
}

/* The first point at or above `value`. */
static ptrdiff_t
first_from(const point *points, ptrdiff_t n, double value)
{
    ptrdiff_t low = 0, high = n;
    while (low < high) {
        const ptrdiff_t middle = low + (high - low) / 2;
        if (points[middle].value < value)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Means of the intervals that end at `ends`, clamped to their points in case of rounding errors, so
 * that they ascend. An empty interval takes the point at its position. */
static void
means(const prefix *sum, const point *points, ptrdiff_t n, double mean, int count,
      const ptrdiff_t *ends, double *levels)
{
    ptrdiff_t begin = 0;
    for (int k = 0; k < count; k++) {
        const ptrdiff_t end = ends[k];
        const double w = sum->w[end] - sum->w[begin];
        const double low = points[begin < n ? begin : n - 1].value;
        const double high = end > begin ? points[end - 1].value : low;
        levels[k] = w > 0 ? mean + (sum->wx[end] - sum->wx[begin]) / w : low;
        levels[k] = fmin(fmax(levels[k], low), high);
        begin = end;
    }
}

static void
settle(const prefix *sum, const point *points, ptrdiff_t n, double mean, int count, ptrdiff_t *ends,
       double *levels)
{
    means(sum, points, n, mean, count, ends, levels);
    for (int step = 0; step < LLOYD_STEPS; step++) {
        bool moved = false;
        for (int k = 0; k + 1 < count; k++) {
            const ptrdiff_t end = first_from(points, n, 0.5 * (levels[k] + levels[k + 1]));
            moved = moved || end != ends[k];
            ends[k] = end;
        }
        if (!moved)
            break;
        means(sum, points, n, mean, count, ends, levels);
    }
}

lbq_status
lbq_kmeans(ptrdiff_t n, const double *values, const double *weights, int count, double *levels)
{
    LBQ_REQUIRE(n > 0, LBQ_BAD_SHAPE, "there are no values");
    LBQ_REQUIRE(count >= 1 && count <= LBQ_MAX_LEVELS,
                LBQ_BAD_VALUE,
                "count is %d, expected 1 to %d",
                count,
                LBQ_MAX_LEVELS);
    const int bins = n < BINS ? (int)n : BINS;
    const size_t sum_bytes = lbq_padded(((size_t)n + 1) * sizeof(double));
    const size_t error_bytes = lbq_padded(2 * ((size_t)bins + 1) * sizeof(double));
    const size_t split_bytes = lbq_padded((size_t)count * ((size_t)bins + 1) * sizeof(int));
    const size_t point_bytes = lbq_padded((size_t)n * sizeof(point));
    lbq_arena arena;
    LBQ_TRY(lbq_arena_open(&arena, 2 * point_bytes + 3 * sum_bytes + error_bytes + split_bytes));
    point *const points = lbq_arena_take(&arena, point_bytes);
    point *const room = lbq_arena_take(&arena, point_bytes);
    const prefix sum = {
        .w = lbq_arena_take(&arena, sum_bytes),
        .wx = lbq_arena_take(&arena, sum_bytes),
        .wxx = lbq_arena_take(&arena, sum_bytes),
    };
    double *const errors = lbq_arena_take(&arena, error_bytes);
    int *const splits = lbq_arena_take(&arena, split_bytes);

    lbq_status status = LBQ_OK;
    double total = 0, mean = 0;
    for (ptrdiff_t i = 0; i < n && status == LBQ_OK; i++) {
        const point p = {.value = values[i], .weight = weights ? weights[i] : 1};
        if (!isfinite(p.value) || !isfinite(p.weight) || p.weight < 0)
            status = lbq_fail(LBQ_BAD_VALUE,
                              "value %td is %g with weight %g, expected finite numbers",
                              i,
                              p.value,
                              p.weight);
        points[i] = p;
        total += p.weight;
        mean += p.weight * p.value;
    }
    if (status == LBQ_OK)
        status = sort(points, room, n);
    if (status == LBQ_OK) {
        mean = total > 0 ? mean / total : 0;
        /* Bins: prefix sums at `bins` places, gathered at the front. */
        fill_prefix(&sum, points, n, mean);
        for (int i = 0; i <= bins && bins < n; i++) {
            const ptrdiff_t at = i * n / bins;
            sum.w[i] = sum.w[at];
            sum.wx[i] = sum.wx[at];
            sum.wxx[i] = sum.wxx[at];
        }
        int bin_ends[LBQ_MAX_LEVELS];
        ptrdiff_t ends[LBQ_MAX_LEVELS];
        best_intervals(&sum, bins, count, errors, splits, bin_ends);
        for (int k = 0; k < count; k++)
            ends[k] = bin_ends[k] * n / bins;
        fill_prefix(&sum, points, n, mean);
        settle(&sum, points, n, mean, count, ends, levels);
    }
    lbq_arena_close(&arena);
    return status;
}
