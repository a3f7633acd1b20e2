#include "models/sampling.h"
#include "base/random.h"
#include "base/status.h"

#include <float.h>
#include <math.h>
#include <string.h>

typedef struct candidate {
  float logit;
  int32_t id;
} candidate;

/* Keeps these numbers apart from those that other parts draw with the same seed. */
static const uint64_t sampling_stream = UINT64_C(0x5a3e) << 48;

attn_status attn_sampling_check(const attn_sampling *s) {
  if (!s) return attn_fail(ATTN_INVALID_ARGUMENT, "sampling: no options were given (NULL)");
  if (s->struct_size != sizeof *s)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "sampling: struct_size is %zu, expected %zu: begin with ATTN_SAMPLING_INIT",
                     s->struct_size, sizeof *s);
  const struct {
    const char *name, *range;
    bool good;
    double value;
  } checks[] = {
      {"temperature", "[0, inf)", s->temperature >= 0 && isfinite(s->temperature), s->temperature},
      {"top_k", "0 or more", s->top_k >= 0, (double)s->top_k},
      {"top_p", "(0, 1]", s->top_p > 0 && s->top_p <= 1, s->top_p},
      {"min_p", "[0, 1]", s->min_p >= 0 && s->min_p <= 1, s->min_p},
      {"repetition_penalty", "(0, inf)",
       s->repetition_penalty > 0 && isfinite(s->repetition_penalty), s->repetition_penalty},
      {"repetition_window", "0 or more", s->repetition_window >= 0, (double)s->repetition_window},
  };
  for (size_t i = 0; i < sizeof checks / sizeof *checks; ++i)
    if (!checks[i].good)
      return attn_fail(ATTN_INVALID_ARGUMENT, "sampling: %s %g is not in %s", checks[i].name,
                       checks[i].value, checks[i].range);
  return ATTN_OK;
}

/* The workspace: the candidates, then one bit a token: whether it was penalised. */
static size_t candidate_bytes(int64_t vocabulary) {
  return (size_t)vocabulary * sizeof(candidate);
}

static size_t bitmap_bytes(int64_t vocabulary) {
  return (size_t)(vocabulary + 7) / 8;
}

size_t attn_sample_workspace(int64_t vocabulary) {
  return candidate_bytes(vocabulary) + bitmap_bytes(vocabulary);
}

/* -- Logits -- */

static float clamp(float logit) {
  return logit > FLT_MAX ? FLT_MAX : logit; /* NaN stays, for keep_finite */
}

/* Each token once, however often it stands in the history. */
static attn_status penalise(const attn_sampling *sampling, candidate *candidates,
                            int64_t vocabulary, const int32_t *history, int64_t length,
                            unsigned char *penalised) {
  float penalty = (float)sampling->repetition_penalty;
  int64_t window = sampling->repetition_window, first = 0;
  if (window > 0 && length > window) first = length - window;
  memset(penalised, 0, bitmap_bytes(vocabulary));
  for (int64_t i = first; i < length; ++i) {
    int32_t id = history[i];
    if (id < 0 || id >= vocabulary)
      return attn_fail(ATTN_INVALID_ARGUMENT, "sampling: history token %d is not in 0 to %lld", id,
                       (long long)vocabulary - 1);
    if (penalised[id / 8] >> id % 8 & 1) continue;
    penalised[id / 8] |= (unsigned char)(1 << id % 8);
    float logit = candidates[id].logit;
    candidates[id].logit = clamp(logit > 0 ? logit / penalty : logit * penalty);
  }
  return ATTN_OK;
}

/* -- Order: larger logit first, then lower id -- */

static bool before(candidate a, candidate b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

/* Restores the heap (the first candidate on top) below `root`. */
static void sift_down(candidate *heap, int64_t size, int64_t root) {
  candidate moving = heap[root];
  for (int64_t child; (child = 2 * root + 1) < size; root = child) {
    if (child + 1 < size && before(heap[child + 1], heap[child])) ++child;
    if (!before(heap[child], moving)) break;
    heap[root] = heap[child];
  }
  heap[root] = moving;
}

static void make_heap(candidate *heap, int64_t size) {
  for (int64_t root = size / 2 - 1; root >= 0; --root) sift_down(heap, size, root);
}

/* Takes the top off and puts it behind the shrunken heap, so that after n calls the last n places
 * hold the n first candidates, the very first at the end. */
static candidate pop(candidate *heap, int64_t *size) {
  candidate top = heap[0];
  heap[0] = heap[--*size];
  heap[*size] = top;
  sift_down(heap, *size, 0);
  return top;
}

static candidate first_of(const candidate *candidates, int64_t count) {
  candidate first = candidates[0];
  for (int64_t i = 1; i < count; ++i)
    if (before(candidates[i], first)) first = candidates[i];
  return first;
}

/* -- Filters: each returns how many candidates stay, at the front -- */

/* Probability at temperature 1, relative to that of the largest logit. */
static double relative(float logit, float largest) {
  return exp((double)logit - (double)largest);
}

/* Brings the n candidates that pops have left at the end, last one first, to the front in order. */
static void gather_popped(candidate *candidates, int64_t count, int64_t n) {
  for (int64_t i = 0; i < n && i < count / 2; ++i) {
    candidate other = candidates[i];
    candidates[i] = candidates[count - 1 - i];
    candidates[count - 1 - i] = other;
  }
}

static int64_t keep_top_k(candidate *candidates, int64_t count, int64_t k) {
  int64_t size = count;
  make_heap(candidates, count);
  while (count - size < k) pop(candidates, &size);
  gather_popped(candidates, count, k);
  return k;
}

/* `total`: of the relative probabilities of all `count` candidates. Rounding may leave the sum of
 * all of them below p * total; then all stay. */
static int64_t keep_top_p(candidate *candidates, int64_t count, float largest, double p) {
  double total = 0, sum = 0;
  for (int64_t i = 0; i < count; ++i) total += relative(candidates[i].logit, largest);
  int64_t size = count;
  make_heap(candidates, count);
  while (size > 0 && sum < p * total) sum += relative(pop(candidates, &size).logit, largest);
  gather_popped(candidates, count, count - size);
  return count - size;
}

static int64_t keep_min_p(candidate *candidates, int64_t count, float largest, double min_p) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i)
    if (relative(candidates[i].logit, largest) >= min_p) candidates[kept++] = candidates[i];
  return kept;
}

/* -- Drawing -- */

static double weight(candidate c, float largest, double temperature) {
  return exp(((double)c.logit - (double)largest) / temperature);
}

static int32_t draw(const candidate *candidates, int64_t count, float largest, double temperature,
                    double uniform) {
  double total = 0, sum = 0;
  for (int64_t i = 0; i < count; ++i) total += weight(candidates[i], largest, temperature);
  int32_t last = candidates[0].id;
  for (int64_t i = 0; i < count; ++i) {
    double w = weight(candidates[i], largest, temperature);
    if (w > 0) last = candidates[i].id; /* rounding may leave the sum just below the mark */
    sum += w;
    if (sum > uniform * total) break;
  }
  return last;
}

static double uniform_at(uint64_t seed, uint64_t position) {
  enum { WORDS_PER_POSITION = 4 }; /* one block of Philox */
  attn_random random = {
      .seed = seed, .stream = sampling_stream, .index = position * WORDS_PER_POSITION};
  return attn_random_uniform(&random);
}

/* Removes -infinity and NaN (which compares false), so that what follows sees finite numbers. */
static int64_t keep_finite(candidate *candidates, int64_t count) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i)
    if (candidates[i].logit >= -FLT_MAX) candidates[kept++] = candidates[i];
  return kept;
}

attn_status attn_sample(const attn_sampling *sampling, const float *logits, int64_t vocabulary,
                        const int32_t *history, int64_t history_length, uint64_t position,
                        void *workspace, int32_t *token) {
  ATTN_TRY(attn_sampling_check(sampling));
  if (vocabulary < 1 || vocabulary > INT32_MAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "sampling: a vocabulary of %lld is not 1 to %d",
                     (long long)vocabulary, INT32_MAX);
  candidate *candidates = workspace;
  for (int64_t i = 0; i < vocabulary; ++i)
    candidates[i] = (candidate){clamp(logits[i]), (int32_t)i};
  if (sampling->repetition_penalty != 1)
    ATTN_TRY(penalise(sampling, candidates, vocabulary, history, history_length,
                      (unsigned char *)workspace + candidate_bytes(vocabulary)));
  int64_t count = keep_finite(candidates, vocabulary);
  if (count == 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "sampling: all %lld logits are NaN or -infinity",
                     (long long)vocabulary);
  candidate first = first_of(candidates, count);
  *token = first.id;
  if (sampling->temperature == 0) return ATTN_OK;

  float largest = first.logit;
  if (sampling->top_k > 0 && sampling->top_k < count)
    count = keep_top_k(candidates, count, sampling->top_k);
  if (sampling->top_p < 1) count = keep_top_p(candidates, count, largest, sampling->top_p);
  if (sampling->min_p > 0) count = keep_min_p(candidates, count, largest, sampling->min_p);
  *token =
      draw(candidates, count, largest, sampling->temperature, uniform_at(sampling->seed, position));
  return ATTN_OK;
}
