/* Counter-based random numbers: (seed, stream, index) -> number, with no state.
 *
 * The same three integers give the same bits on every machine, for any number of threads and any
 * order of calls. Streams separate the uses of one seed. */
#ifndef LBQ_RANDOM_H
#define LBQ_RANDOM_H

#include <stdint.h>

uint64_t lbq_random_bits(uint64_t seed, uint64_t stream, uint64_t index);
double lbq_random_uniform(uint64_t seed, uint64_t stream, uint64_t index); /* in [0, 1) */
double lbq_random_normal(uint64_t seed, uint64_t stream, uint64_t index);  /* mean 0, variance 1 */

#endif
