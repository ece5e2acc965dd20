/* A table of levels as bytes, for kernels that multiply integers. */
#ifndef LBQ_LEVELS_H
#define LBQ_LEVELS_H

#include <stdint.h>

#include "core/packed.h"

/* level[code] ~ base + step * byte[code], off by at most half of step = max |level| / 127, and
 * exact where a level is zero. Two levels are base + step * code itself, as they would be without
 * a table; so is everything if there is none, with base = 0 and step = 1. */
typedef struct {
    bool lookup;       /* bytes stand for codes; else codes for themselves */
    uint8_t bytes[16]; /* of code i % 2^bits */
    float base, step;
} lbq_byte_levels;

lbq_byte_levels lbq_byte_levels_of(const lbq_packed *packed);

#endif
