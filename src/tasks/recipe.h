/* Random numbers of the recipes by which images and texts are drawn: SplitMix64 (Steele, Lea and
 * Flood, OOPSLA 2014), so that whoever follows a recipe gets the same example. */
#ifndef ATTN_TASKS_RECIPE_H
#define ATTN_TASKS_RECIPE_H

#include "base/random.h"

typedef struct attn_recipe {
  uint64_t state;
} attn_recipe;

/* Example `index` of a split (training 0, validation 1, test 2; others for what examples share). */
attn_recipe attn_recipe_of(uint64_t seed, uint64_t split, uint64_t index);
/* One of its own for each example of a task. */
attn_recipe attn_recipe_from(attn_random *random);
float attn_recipe_uniform(attn_recipe *r); /* [0, 1), 24 bits */
float attn_recipe_between(attn_recipe *r, float low, float high);
int attn_recipe_below(attn_recipe *r, int n); /* 0 .. n - 1 */
float attn_recipe_normal(attn_recipe *r);     /* mean 0, deviation 1; one value a call */

#endif
