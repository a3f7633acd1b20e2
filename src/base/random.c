#include "base/random.h"

#include <math.h>

enum { PHILOX_ROUNDS = 10 };

void attn_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u; /* golden ratio */
    k1 += 0xBB67AE85u; /* sqrt(3) - 1 */
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

/* Words 4 block .. 4 block + 3 of a stream. */
static void words_of_block(const attn_random *random, uint64_t block, uint32_t words[4]) {
  uint32_t counter[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)random->stream,
                         (uint32_t)(random->stream >> 32)};
  uint32_t key[2] = {(uint32_t)random->seed, (uint32_t)(random->seed >> 32)};
  attn_philox(counter, key, words);
}

uint32_t attn_random_u32(attn_random *random) {
  uint32_t words[4];
  words_of_block(random, random->index / 4, words);
  return words[random->index++ % 4];
}

static uint64_t join(uint32_t low, uint32_t high) {
  return low | (uint64_t)high << 32;
}

uint64_t attn_random_u64(attn_random *random) {
  uint32_t low = attn_random_u32(random);
  return join(low, attn_random_u32(random));
}

static double uniform_of(uint64_t bits) {
  return (double)(bits >> 11) * 0x1p-53;
}

double attn_random_uniform(attn_random *random) {
  return uniform_of(attn_random_u64(random));
}

/* Box-Muller over the next four words, which are one block when no other number came before. */
double attn_random_normal(attn_random *random) {
  uint64_t first, second;
  if (random->index % 4 == 0) {
    uint32_t words[4];
    words_of_block(random, random->index / 4, words);
    random->index += 4;
    first = join(words[0], words[1]), second = join(words[2], words[3]);
  } else {
    first = attn_random_u64(random), second = attn_random_u64(random);
  }
  double u = 1.0 - uniform_of(first); /* (0, 1]: the logarithm stays finite */
  double angle = 6.283185307179586 * uniform_of(second);
  return sqrt(-2.0 * log(u)) * cos(angle);
}

uint64_t attn_random_below(attn_random *random, uint64_t n) {
  uint64_t limit = UINT64_MAX - UINT64_MAX % n; /* a multiple of n: rejects the uneven tail */
  uint64_t value;
  do value = attn_random_u64(random);
  while (value >= limit);
  return value % n;
}
