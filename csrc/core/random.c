/* The finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
 * generators", 2014) applied to each of the three integers in turn. */
#include "core/random.h"

#include <math.h>

static uint64_t
mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

uint64_t
lbq_random_bits(uint64_t seed, uint64_t stream, uint64_t index)
{
    return mix(mix(mix(seed) ^ stream) ^ index);
}

double
lbq_random_uniform(uint64_t seed, uint64_t stream, uint64_t index)
{
    return (double)(lbq_random_bits(seed, stream, index) >> 11) * 0x1p-53;
}

/* Box and Muller, "A note on the generation of random normal deviates", 1958. */
double
lbq_random_normal(uint64_t seed, uint64_t stream, uint64_t index)
{
    const double u = 1.0 - lbq_random_uniform(seed, stream, 2 * index);
    const double v = lbq_random_uniform(seed, stream, 2 * index + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586477 * v);
}
