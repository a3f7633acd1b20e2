#include "tasks/dialogue.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/status.h"
#include "tasks/task.h"

enum { LENGTH = ATTN_DIALOGUE_LENGTH, MOST = 1 << 20 };

static attn_status check(const attn_dialogue_options *o) {
  const struct {
    const char *name;
    int64_t value, most;
  } fields[] = {{"keys", o->keys, MOST},
                {"values", o->values, MOST},
                {"turns", o->turns, o->keys},
                {"farthest", o->farthest, MOST}};
  for (int i = 0; i < 4; ++i)
    if (fields[i].value < 1 || fields[i].value > fields[i].most)
      return attn_fail(ATTN_INVALID_ARGUMENT, "dialogue: %s is %lld, expected 1 to %lld",
                       fields[i].name, (long long)fields[i].value, (long long)fields[i].most);
  return ATTN_OK;
}

/* One dialogue; its turns are `step` turns apart. */
static void write_dialogue(const attn_dialogue_options *o, attn_random *random, int32_t *pool,
                           int32_t *told, int64_t step, int32_t *tokens, int32_t *targets,
                           int32_t *distances) {
  int32_t *keys = told, *values = told + o->turns;
  int64_t first_value = ATTN_DIALOGUE_MARKS + o->keys;
  attn_task_draw_distinct(random, pool, ATTN_DIALOGUE_MARKS, first_value, o->turns, keys, 1);
  for (int64_t t = 0; t < o->turns; ++t) {
    int64_t most = t < o->farthest ? t : o->farthest;
    int64_t d = most ? 1 + (int64_t)attn_random_below(random, (uint64_t)most) : 0;
    values[t] = (int32_t)(first_value + (int64_t)attn_random_below(random, (uint64_t)o->values));
    const int32_t turn[LENGTH] = {ATTN_DIALOGUE_BOS, ATTN_DIALOGUE_QUERY, keys[t],
                                  values[t],         keys[t - d],         ATTN_DIALOGUE_ANSWER,
                                  values[t - d],     ATTN_DIALOGUE_EOS};
    for (int i = 0; i < LENGTH; ++i) {
      tokens[t * step * LENGTH + i] = turn[i];
      targets[t * step * LENGTH + i] = i == ATTN_DIALOGUE_ASKED ? values[t - d] : ATTN_NO_LABEL;
    }
    distances[t * step] = (int32_t)d;
  }
}

attn_status attn_dialogue_generate(const attn_dialogue_options *o, uint64_t seed, int64_t first,
                                   int64_t count, int32_t *tokens, int32_t *targets,
                                   int32_t *distances) {
  ATTN_TRY(check(o));
  int32_t *pool = attn_alloc_array((size_t)o->keys, sizeof *pool);
  int32_t *told = attn_alloc_array(2 * (size_t)o->turns, sizeof *told);
  for (int64_t i = 0; i < count && pool && told; ++i) {
    attn_random random = {.seed = seed, .stream = (uint64_t)(first + i)};
    write_dialogue(o, &random, pool, told, count, tokens + i * LENGTH, targets + i * LENGTH,
                   distances + i);
  }
  attn_status status = pool && told ? ATTN_OK : ATTN_OUT_OF_MEMORY;
  attn_free(pool);
  attn_free(told);
  return status;
}
