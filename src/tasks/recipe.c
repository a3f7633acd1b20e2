#include "tasks/recipe.h"

#include <math.h>

static const uint64_t step = 0x9E3779B97F4A7C15u;

static uint64_t mix(uint64_t z) {
  z ^= z >> 30;
  z *= 0xBF58476D1CE4E5B9u;
  z ^= z >> 27;
  z *= 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

attn_recipe attn_recipe_of(uint64_t seed, uint64_t split, uint64_t index) {
  return (attn_recipe){mix(mix(seed + step) ^ (split << 40 | index))};
}

attn_recipe attn_recipe_from(attn_random *random) {
  return (attn_recipe){attn_random_u64(random)};
}

static uint64_t next(attn_recipe *r) {
  r->state += step;
  return mix(r->state);
}

float attn_recipe_uniform(attn_recipe *r) {
  return (float)(next(r) >> 40) * 0x1p-24F;
}

float attn_recipe_between(attn_recipe *r, float low, float high) {
  return low + (high - low) * attn_recipe_uniform(r);
}

int attn_recipe_below(attn_recipe *r, int n) {
  return (int)((next(r) >> 32) * (uint64_t)n >> 32);
}

float attn_recipe_normal(attn_recipe *r) {
  const float turn = 6.28318530717958647692F;
  float u = (float)((next(r) >> 40) + 1) * 0x1p-24F, v = attn_recipe_uniform(r);
  return sqrtf(-2 * logf(u)) * cosf(turn * v);
}
