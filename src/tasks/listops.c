/* ListOps as Long Range Arena has it (arXiv 1804.06028, 2011.04006): the value of a nested
 * expression over digits, asked for at its end.
 *
 *   0 0 0 [MAX 4 [SM 7 5 ] 1 0 ]      label: 4, at the last bracket
 *
 * An expression is a digit with probability 3/4, or at the greatest depth, else an operator (MIN,
 * MAX, MED: the median rounded down, SM: the sum modulo 10) of 2 to C expressions, and is drawn
 * until it has between L / 4 (a fifth below 150) and L tokens. From 400 tokens on depth and C are
 * 10, as there; below they are 6 and 5, from 75 down 4 and 4. It stands at the end of the row.
 * Tokens: 0 is padding, 1 .. 10 are the digits, 11 .. 14 the operators with their brackets, 15 the
 * closing one. */
#include "base/status.h"
#include "tasks/task.h"

enum { DIGIT = 1, OPERATOR = 11, CLOSE = 15, SYMBOLS = 16, OPERATORS = 4, MOST_CHILDREN = 10 };
enum { MIN, MAX, MED, SM };

typedef struct shape {
  int depth, children;
  int64_t least, most; /* tokens of an expression, both ends left out */
} shape;

static shape shape_of(const attn_task_options *o) {
  shape s = {.depth = 10, .children = 10, .least = o->length / 4, .most = o->length + 1};
  if (o->length < 400) s.depth = 6, s.children = 5;
  if (o->length < 150) s.least = o->length / 5;
  if (o->length <= 75) s.depth = s.children = 4;
  return s;
}

static attn_status check(const attn_task *task, const attn_task_options *o) {
  const int64_t least_length = 10; /* shorter ones are hardly ever drawn */
  if (o->vocabulary < SYMBOLS)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a vocabulary of %lld, expected at least %d",
                     task->name, (long long)o->vocabulary, SYMBOLS);
  if (o->length >= least_length) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a length of %lld, expected at least %lld",
                   task->name, (long long)o->length, (long long)least_length);
}

static size_t scratch_bytes(const attn_task *task, const attn_task_options *o) {
  (void)task;
  return (size_t)(o->length + 1) * sizeof(int32_t);
}

/* An expression that is being drawn. */
typedef struct draft {
  shape shape;
  attn_random *random;
  int32_t *tokens;
  int64_t count; /* shape.most: it is too long, and given up */
} draft;

static int by_value(const int *values, int count, int which) {
  for (int i = 0; i < count; ++i) { /* the one with `which` values before it in their order */
    int before = 0;
    for (int j = 0; j < count; ++j)
      before += values[j] < values[i] || (values[j] == values[i] && j < i);
    if (before == which) return values[i];
  }
  return 0;
}

static int apply(int kind, const int *values, int count) {
  int sum = 0;
  if (kind == MIN) return by_value(values, count, 0);
  if (kind == MAX) return by_value(values, count, count - 1);
  if (kind == MED)
    return (by_value(values, count, (count - 1) / 2) + by_value(values, count, count / 2)) / 2;
  for (int i = 0; i < count; ++i) sum += values[i];
  return sum % 10;
}

static void put(draft *d, int32_t token) {
  if (d->count < d->shape.most - 1)
    d->tokens[d->count++] = token;
  else
    d->count = d->shape.most;
}

/* Writes an expression of this depth and returns its value. */
static int grow(draft *d, int depth) {
  const double digits = 0.75;
  int values[MOST_CHILDREN];
  if (depth >= d->shape.depth || attn_random_uniform(d->random) < digits) {
    values[0] = (int)attn_random_below(d->random, 10);
    put(d, DIGIT + values[0]);
    return values[0];
  }
  int count = 2 + (int)attn_random_below(d->random, (uint64_t)d->shape.children - 1);
  int kind = (int)attn_random_below(d->random, OPERATORS);
  put(d, OPERATOR + kind);
  for (int i = 0; i < count && d->count < d->shape.most; ++i) values[i] = grow(d, depth + 1);
  if (d->count >= d->shape.most) return 0;
  put(d, CLOSE);
  return apply(kind, values, count);
}

static void example(const attn_task *task, const attn_task_options *o, attn_random *random,
                    void *scratch, int32_t *inputs, int32_t *labels) {
  draft d = {.shape = shape_of(o), .random = random, .tokens = scratch};
  int value;
  (void)task;
  do {
    d.count = 0;
    value = grow(&d, 1);
  } while (d.count <= d.shape.least || d.count >= d.shape.most);
  for (int64_t i = 0; i < d.count; ++i) inputs[o->length - d.count + i] = d.tokens[i];
  labels[o->length - 1] = DIGIT + value;
}

static double chance(const attn_task_options *o) {
  (void)o;
  return 0.1;
}

const attn_task attn_task_listops = {
    .name = "listops",
    .summary = "the value of a nested expression, Long Range Arena's ListOps (arXiv 2011.04006)",
    .usual = {.vocabulary = SYMBOLS, .length = 200},
    .check = check,
    .scratch = scratch_bytes,
    .example = example,
    .chance = chance,
};
