/* Counter-based random numbers: Philox-4x32-10 (Salmon et al., SC 2011).
 *
 * A number is a function of (seed, stream, index) alone, so that parallel code needs no shared
 * generator and a resumed run continues with the same numbers. */
#ifndef ATTN_BASE_RANDOM_H
#define ATTN_BASE_RANDOM_H

#include <stdint.h>

/* The raw function: 128-bit counter and 64-bit key in, 128 bits out. */
void attn_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

typedef struct attn_random {
  uint64_t seed, stream;
  uint64_t index; /* of the next 32-bit word */
} attn_random;

uint32_t attn_random_u32(attn_random *random);
uint64_t attn_random_u64(attn_random *random);
double attn_random_uniform(attn_random *random); /* [0, 1), 53 bits */
double attn_random_normal(attn_random *random);  /* mean 0, deviation 1 (Box-Muller) */
/* Uniform in [0, n), without bias; n >= 1. */
uint64_t attn_random_below(attn_random *random, uint64_t n);

#endif
