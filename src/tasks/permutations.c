/* State tracking: the word problem of the symmetric group (arXiv 2404.08819). Inputs are random
 * permutations of n things, and at each position the label is the product of all so far.
 *
 *   P_0 = p_0,   P_t = p_t P_{t-1},   (p q)(x) = p(q(x)): what is read last is applied last
 *
 * n is 5 (S5, 120 elements, not solvable: out of reach of one pass of constant depth whose
 * recurrences are diagonal) where the vocabulary has at least 120 tokens, else 3 (S3, 6 elements,
 * solvable). A token is the number of a permutation in lexicographic order of its images p(0) p(1)
 * .. p(n - 1), from 0, the identity, on: its digits in the factorial number system (Lehmer code)
 * say of each image how many smaller ones follow it. */
#include "base/status.h"
#include "tasks/task.h"

enum { MOST_THINGS = 5, OF_FIVE = 120, OF_THREE = 6 };

static int things(const attn_task_options *o) {
  return o->vocabulary >= OF_FIVE ? 5 : 3;
}

static int order(const attn_task_options *o) {
  return o->vocabulary >= OF_FIVE ? OF_FIVE : OF_THREE;
}

static attn_status check(const attn_task *task, const attn_task_options *o) {
  (void)task;
  if (o->vocabulary >= OF_THREE) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "permutations: a vocabulary of %lld, expected at least %d (of three things), or "
                   "%d (of five)",
                   (long long)o->vocabulary, OF_THREE, OF_FIVE);
}

/* The images [n] of permutation `number`. */
static void unpack(int number, int n, int *images) {
  for (int i = n - 1, base = 1; i >= 0; --i, ++base) {
    images[i] = number % base;
    number /= base;
    for (int j = i + 1; j < n; ++j) images[j] += images[j] >= images[i];
  }
}

static int pack(const int *images, int n) {
  int number = 0;
  for (int i = 0; i < n; ++i) {
    int smaller = 0;
    for (int j = i + 1; j < n; ++j) smaller += images[j] < images[i];
    number = number * (n - i) + smaller;
  }
  return number;
}

static void example(const attn_task *task, const attn_task_options *o, attn_random *random,
                    void *scratch, int32_t *inputs, int32_t *labels) {
  int n = things(o), product[MOST_THINGS], p[MOST_THINGS];
  (void)task, (void)scratch;
  unpack(0, n, product);
  for (int64_t t = 0; t < o->length; ++t) {
    inputs[t] = (int32_t)attn_random_below(random, (uint64_t)order(o));
    unpack(inputs[t], n, p);
    for (int x = 0; x < n; ++x) product[x] = p[product[x]];
    labels[t] = pack(product, n);
  }
}

static double chance(const attn_task_options *o) {
  return 1 / (double)order(o);
}

const attn_task attn_task_permutations = {
    .name = "permutations",
    .summary = "the product of all permutations so far, at every position (arXiv 2404.08819)",
    .usual = {.vocabulary = OF_FIVE, .length = 32},
    .check = check,
    .example = example,
    .chance = chance,
};
