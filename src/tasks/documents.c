/* Long Range Arena's text tasks with texts by a recipe in place of reviews and papers (arXiv
 * 2011.04006, sections 2.1 and 2.2), in bytes.
 *
 * A text is words between single spaces. The lexicon has 256 words: 16 are good, 16 bad, 4 negate,
 * and the others are neutral, drawn by Zipf's law. Words that do not fit are left out; zeros
 * follow.
 *
 * text: whether good or bad words prevail. One in 17 words is good or bad, mostly the one or the
 *   other; one of them in the three words behind a negation counts the other way round. A draw is
 *   drawn again. Label: 2 (good) or 1.
 * retrieval: whether two texts, with a byte 1 between them, are about the same. Each has twelve
 *   topics of 400 further words, one in twelve words; they share five of them, or one or none.
 *   Label: 2 (the same) or 1.
 *
 * The label is at the last position. */
#include "base/status.h"
#include "tasks/recipe.h"
#include "tasks/task.h"

#include <pthread.h>
#include <string.h>

enum { TEXT, RETRIEVAL };
enum {
  GOOD = 16, /* words of the lexicon, in this order */
  BAD = 16,
  NEGATIONS = 4,
  WORDS = 256,
  NEUTRAL = GOOD + BAD + NEGATIONS, /* the first one */
  TOPICS = 400,
  OWN_TOPICS = 12, /* of a text */
  SHARED_TOPICS = 5,
  MOST_LETTERS = 7,
  REACH = 3, /* words behind a negation */
  BETWEEN = 1,
  LEAST_LENGTH = 64,
};

/* The same for all texts. */
static struct lexicon {
  char word[WORDS + TOPICS][MOST_LETTERS + 1];
  float neutral[WORDS]; /* the sum of the weights up to a word */
} lexicon;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_lexicon(void) {
  struct lexicon *all = &lexicon;
  attn_recipe r = attn_recipe_of(1, 7, 1);
  for (int w = 0; w < WORDS + TOPICS; ++w) {
    int letters = 2 + attn_recipe_below(&r, MOST_LETTERS - 1), before = 0;
    memset(all->word[w], 0, sizeof all->word[w]);
    for (int i = 0; i < letters; ++i) all->word[w][i] = (char)('a' + attn_recipe_below(&r, 26));
    while (before < w && strcmp(all->word[before], all->word[w]) != 0) ++before;
    if (before < w) --w; /* there is such a word */
  }
  float sum = 0;
  for (int w = NEUTRAL; w < WORDS; ++w) all->neutral[w] = sum += 1 / (float)(w - NEUTRAL + 1);
}

static int neutral_word(attn_recipe *r) {
  float x = attn_recipe_uniform(r) * lexicon.neutral[WORDS - 1];
  int w = NEUTRAL;
  while (w < WORDS - 1 && lexicon.neutral[w] <= x) ++w;
  return w;
}

/* A text that is being written, of at most `length` bytes. */
typedef struct page {
  int32_t *to;
  int64_t length, used;
} page;

static bool write_word(page *p, int number) {
  const char *word = lexicon.word[number];
  int64_t letters = (int64_t)strlen(word), space = p->used > 0;
  if (p->used + space + letters > p->length) return false;
  if (space) p->to[p->used++] = ' ';
  for (int64_t i = 0; i < letters; ++i) p->to[p->used++] = word[i];
  return true;
}

static void erase(page *p) {
  for (int64_t i = 0; i < p->used; ++i) p->to[i] = 0;
  p->used = 0;
}

/* Good words minus bad ones. */
static int write_opinion(attn_recipe *r, page *p) {
  const float polar = .06F, negations = .04F, lean = .12F;
  int mood = attn_recipe_below(r, 2) ? 1 : -1, total = 0, negated = 0;
  for (;;) {
    float x = attn_recipe_uniform(r);
    int word, counts = 0, reach = negated > 0 ? negated - 1 : 0;
    if (x < polar) {
      counts = attn_recipe_uniform(r) < .5F + lean * (float)mood ? 1 : -1;
      word = counts > 0 ? attn_recipe_below(r, GOOD) : GOOD + attn_recipe_below(r, BAD);
      if (negated) counts = -counts;
    } else if (x < polar + negations) {
      word = GOOD + BAD + attn_recipe_below(r, NEGATIONS);
      reach = REACH;
    } else {
      word = neutral_word(r);
    }
    if (!write_word(p, word)) return total;
    total += counts;
    negated = reach;
  }
}

static void write_about(attn_recipe *r, const int32_t *topics, page *p) {
  const float share = .08F;
  for (;;) {
    int word = attn_recipe_uniform(r) < share ? WORDS + topics[attn_recipe_below(r, OWN_TOPICS)]
                                              : neutral_word(r);
    if (!write_word(p, word)) return;
  }
}

/* Brings a random choice of `count` to the front, of topics [0, all). */
static void shuffle(attn_recipe *r, int32_t *topics, int count, int all) {
  for (int i = 0; i < count; ++i) {
    int j = i + attn_recipe_below(r, all - i);
    int32_t chosen = topics[j];
    topics[j] = topics[i];
    topics[i] = chosen;
  }
}

static void write_pair(attn_recipe *r, bool same, page *first, page *second) {
  int32_t topics[TOPICS];
  for (int i = 0; i < TOPICS; ++i) topics[i] = i;
  shuffle(r, topics, OWN_TOPICS, TOPICS);
  write_about(r, topics, first);
  /* Some of the first text's topics stay in front; behind them come new ones. */
  int shared = same ? SHARED_TOPICS : attn_recipe_below(r, 2);
  shuffle(r, topics, shared, OWN_TOPICS);
  shuffle(r, topics + OWN_TOPICS, OWN_TOPICS - shared, TOPICS - OWN_TOPICS);
  for (int i = shared; i < OWN_TOPICS; ++i) topics[i] = topics[OWN_TOPICS + i - shared];
  write_about(r, topics, second);
}

static attn_status check(const attn_task *task, const attn_task_options *o) {
  if (o->vocabulary < 128)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a vocabulary of %lld, expected at least 128",
                     task->name, (long long)o->vocabulary);
  if (o->length >= LEAST_LENGTH) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a length of %lld, expected at least %d", task->name,
                   (long long)o->length, LEAST_LENGTH);
}

static void example(const attn_task *task, const attn_task_options *o, attn_random *random,
                    void *scratch, int32_t *inputs, int32_t *labels) {
  attn_recipe r = attn_recipe_from(random);
  (void)scratch;
  pthread_once(&once, make_lexicon);
  if (task->variant == TEXT) {
    page p = {.to = inputs, .length = o->length};
    int total;
    while ((total = write_opinion(&r, &p)) == 0) erase(&p);
    labels[o->length - 1] = total > 0 ? 2 : 1;
    return;
  }
  int64_t half = (o->length - 1) / 2;
  bool same = attn_recipe_below(&r, 2);
  page first = {.to = inputs, .length = half}, second = {.to = inputs + half + 1, .length = half};
  write_pair(&r, same, &first, &second);
  inputs[half] = BETWEEN;
  labels[o->length - 1] = same ? 2 : 1;
}

static double chance(const attn_task_options *o) {
  (void)o;
  return 0.5;
}

const attn_task attn_task_text = {
    .name = "text",
    .summary = "whether a text's good or bad words prevail, as Long Range Arena's (2011.04006)",
    .variant = TEXT,
    .usual = {.vocabulary = 128, .length = 1024},
    .check = check,
    .example = example,
    .chance = chance,
};
const attn_task attn_task_retrieval = {
    .name = "retrieval",
    .summary = "whether two texts share their topics, as Long Range Arena's (2011.04006)",
    .variant = RETRIEVAL,
    .usual = {.vocabulary = 128, .length = 2048},
    .check = check,
    .example = example,
    .chance = chance,
};
