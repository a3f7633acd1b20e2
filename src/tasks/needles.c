/* A needle in a haystack, in tokens: digits are hidden at a random depth in filler, and asked for
 * at the end.
 *
 *   passkey   .. .. .. ! 4 2 7 1 5 .. .. .. .. ? 4 2 7 1     labels: 4 2 7 1 5, from the ? on
 *   niah3     .. ! b 8 0 3 3 .. ! a 5 1 9 9 .. ? b 8 0 3     labels: 8 0 3 3, from the last b on
 *
 * The answer is read along, as a text would go on: after each right digit the next is asked for.
 *
 *   passkey   K digits behind a mark, in random filler (arXiv 2305.16300)
 *   niah1     four digits behind a mark and a name; the filler is one sentence again and again
 *   niah2     the same in random filler
 *   niah3     K such needles with different names in random filler, of which one is asked for
 *
 * The first two of niah are in the manner of RULER's single needles, the last of its needles with
 * several keys (arXiv 2404.06654, section 3). Tokens: 0 .. 9 are digits, 10 is the mark (!), 11 the
 * question (?); of the others the first half (rounded down; none for passkey) are names, the rest
 * filler. Needles stand between any two tokens of filler, all choices alike.
 *
 *   pairs   passkey: K, digits; niah3: K, needles, at most as many as there are names */
#include "base/status.h"
#include "tasks/task.h"

enum {
  DIGITS = 10,
  MARK = DIGITS,
  QUESTION,
  OTHERS,
  VALUE_DIGITS = 4, /* of a needle with a name */
  SENTENCE = 24     /* tokens, if there are so many */
};

enum { PASSKEY = 0, SINGLE_IN_SENTENCES, SINGLE_IN_NOISE, SEVERAL_IN_NOISE };

typedef struct haystack {
  int64_t needles, digits; /* digits of each needle */
  bool named, sentences;
  int64_t names, fillers; /* tokens from OTHERS on, and those from OTHERS + names on */
} haystack;

static haystack haystack_of(const attn_task *task, const attn_task_options *o) {
  bool key = task->variant == PASSKEY;
  haystack h = {.needles = task->variant == SEVERAL_IN_NOISE ? o->pairs : 1,
                .digits = key ? o->pairs : VALUE_DIGITS,
                .named = !key,
                .sentences = task->variant == SINGLE_IN_SENTENCES};
  h.names = h.named ? (o->vocabulary - OTHERS) / 2 : 0;
  h.fillers = o->vocabulary - OTHERS - h.names;
  return h;
}

static int64_t needle_length(const haystack *h) {
  return 1 + h->named + h->digits;
}

/* The question, the name, and all digits but the last. */
static int64_t question_length(const haystack *h) {
  return h->named + h->digits;
}

static attn_status check(const attn_task *task, const attn_task_options *o) {
  haystack h = haystack_of(task, o);
  int64_t least = h.named ? OTHERS + 2 : OTHERS + 1; /* a name, a filler */
  if (o->vocabulary < least)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a vocabulary of %lld, expected at least %lld",
                     task->name, (long long)o->vocabulary, (long long)least);
  if (h.named && (h.needles < 1 || h.needles > h.names))
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "%s: %lld pairs (needles) of a vocabulary of %lld, expected 1 to %lld",
                     task->name, (long long)h.needles, (long long)o->vocabulary,
                     (long long)h.names);
  if (h.digits < 1)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: %lld pairs (digits), expected at least 1",
                     task->name, (long long)h.digits);
  int64_t shortest = h.needles * needle_length(&h) + question_length(&h);
  if (o->length >= shortest) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a length of %lld, expected at least %lld",
                   task->name, (long long)o->length, (long long)shortest);
}

/* The names of the needles, and room for as many as there are in all. */
static size_t scratch_bytes(const attn_task *task, const attn_task_options *o) {
  haystack h = haystack_of(task, o);
  return (size_t)(h.needles + h.names) * sizeof(int32_t);
}

/* Number `number` of the filler of an example. */
static int32_t filler(const haystack *h, attn_random *random, int64_t number) {
  int64_t period = h->fillers < SENTENCE ? h->fillers : SENTENCE;
  int64_t which =
      h->sentences ? number % period : (int64_t)attn_random_below(random, (uint64_t)h->fillers);
  return (int32_t)(OTHERS + h->names + which);
}

/* Returns its first digit. */
static int32_t *put_needle(const haystack *h, attn_random *random, int32_t name, int32_t *at) {
  *at++ = MARK;
  if (h->named) *at++ = name;
  for (int64_t i = 0; i < h->digits; ++i) at[i] = (int32_t)attn_random_below(random, DIGITS);
  return at;
}

static void ask(const haystack *h, int32_t name, const int32_t *digits, int32_t *inputs,
                int32_t *labels) {
  *inputs = QUESTION;
  if (h->named) *++inputs = name, ++labels;
  for (int64_t i = 0; i < h->digits; ++i) {
    labels[i] = digits[i];
    if (i + 1 < h->digits) inputs[i + 1] = digits[i];
  }
}

static void example(const attn_task *task, const attn_task_options *o, attn_random *random,
                    void *scratch, int32_t *inputs, int32_t *labels) {
  haystack h = haystack_of(task, o);
  int64_t body = o->length - question_length(&h);
  int64_t fillers = body - h.needles * needle_length(&h), fill = 0, needle = 0;
  int32_t *names = scratch, *asked_digits = inputs;
  names[0] = 0; /* of a passkey: not written */
  if (h.named)
    attn_task_draw_distinct(random, names + h.needles, OTHERS, OTHERS + h.names, h.needles, names,
                            1);
  int64_t asked = (int64_t)attn_random_below(random, (uint64_t)h.needles);
  for (int64_t t = 0; t < body;) {
    int64_t left = h.needles - needle;
    if (!attn_task_takes_place(random, left, left + fillers - fill)) {
      inputs[t++] = filler(&h, random, fill++);
      continue;
    }
    int32_t *digits = put_needle(&h, random, names[needle], inputs + t);
    if (needle++ == asked) asked_digits = digits;
    t += needle_length(&h);
  }
  ask(&h, names[asked], asked_digits, inputs + body, labels + body);
}

static double chance(const attn_task_options *o) {
  (void)o;
  return 1 / (double)DIGITS;
}

const attn_task attn_task_passkey = {
    .name = "passkey",
    .summary = "find the digits hidden in filler (arXiv 2305.16300)",
    .variant = PASSKEY,
    .takes = ATTN_TAKES_PAIRS,
    .usual = {.vocabulary = 64, .length = 64, .pairs = 5},
    .check = check,
    .scratch = scratch_bytes,
    .example = example,
    .chance = chance,
};

const attn_task attn_task_niah1 = {
    .name = "niah1",
    .summary = "find the digits with a name, in a sentence repeated (RULER, arXiv 2404.06654)",
    .variant = SINGLE_IN_SENTENCES,
    .usual = {.vocabulary = 64, .length = 64},
    .check = check,
    .scratch = scratch_bytes,
    .example = example,
    .chance = chance,
};

const attn_task attn_task_niah2 = {
    .name = "niah2",
    .summary = "the same, in random filler",
    .variant = SINGLE_IN_NOISE,
    .usual = {.vocabulary = 64, .length = 64},
    .check = check,
    .scratch = scratch_bytes,
    .example = example,
    .chance = chance,
};

const attn_task attn_task_niah3 = {
    .name = "niah3",
    .summary = "the same, among several with other names",
    .variant = SEVERAL_IN_NOISE,
    .takes = ATTN_TAKES_PAIRS,
    .usual = {.vocabulary = 64, .length = 64, .pairs = 4},
    .check = check,
    .scratch = scratch_bytes,
    .example = example,
    .chance = chance,
};
