/* What the Reactive Transformer claims, in miniature (docs/claims.md): what a memory of some slots
 * still knows some turns later, what a turn costs beside a decoder that reads the history again,
 * and how gates keep the memory's size. Prints tables; takes about ten minutes.
 *
 *   bench_reactive [recall | time | norms] [steps]
 *
 * Without a name, all three. */
#include "attn/base.h"
#include "attn/reactive.h"
#include "tasks/dialogue.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void need(attn_status status) {
  if (status == ATTN_OK) return;
  fprintf(stderr, "bench_reactive: %s\n", attn_error_message());
  exit(1);
}

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Recall ------------------------------------------------------------------------------------------
 */

enum { BATCH = 16, TURNS = 8, FARTHEST = 7, TESTS = 200, LENGTH = ATTN_DIALOGUE_LENGTH };
static const attn_dialogue_options task = {
    .keys = 16, .values = 8, .turns = TURNS, .farthest = FARTHEST};

typedef struct kind {
  int slots;
  const char *memory, *gate, *activation;
  double initial;
} kind;

static attn_reactive *create(const kind *k, uint64_t seed) {
  char config[768];
  attn_reactive *m;
  snprintf(config, sizeof config,
           "{\"model_type\": \"reactive\", \"vocab_size\": %d, \"hidden_size\": 64, "
           "\"num_memory_slots\": %d, \"num_hidden_layers\": 2, \"num_attention_heads\": 2, "
           "\"intermediate_size\": 128, \"head_norm\": true, \"memory_attention\": \"%s\", "
           "\"memory_gate\": \"%s\", \"memory_gate_activation\": \"%s\", "
           "\"memory_gate_init\": %g}",
           (int)attn_dialogue_vocabulary(&task), k->slots, k->memory, k->gate, k->activation,
           k->initial);
  need(attn_reactive_create(config, seed, ATTN_F32, &m));
  return m;
}

typedef struct dialogues {
  int32_t *tokens, *targets, *distances, *offsets;
  attn_turns turns[TURNS];
} dialogues;

static dialogues dialogues_new(int count) {
  size_t rows = (size_t)TURNS * (size_t)count * LENGTH;
  dialogues d = {.tokens = malloc(rows * sizeof(int32_t)),
                 .targets = malloc(rows * sizeof(int32_t)),
                 .distances = malloc(rows * sizeof(int32_t)),
                 .offsets = malloc(((size_t)count + 1) * sizeof(int32_t))};
  if (!d.tokens || !d.targets || !d.distances || !d.offsets) exit(1);
  for (int b = 0; b <= count; ++b) d.offsets[b] = b * LENGTH;
  for (int t = 0; t < TURNS; ++t)
    d.turns[t] = (attn_turns){.tokens = d.tokens + t * count * LENGTH,
                              .targets = d.targets + t * count * LENGTH,
                              .offsets = d.offsets,
                              .sequences = count};
  return d;
}

static void dialogues_free(dialogues *d) {
  free(d->tokens), free(d->targets), free(d->distances), free(d->offsets);
}

/* Right answers by distance, of sessions, which took no part in training. */
static void test(attn_reactive *m, double right[FARTHEST + 1]) {
  dialogues d = dialogues_new(TESTS);
  int count[FARTHEST + 1] = {0};
  int vocabulary = (int)attn_dialogue_vocabulary(&task);
  float logits[64];
  for (int i = 0; i <= FARTHEST; ++i) right[i] = 0;
  need(attn_dialogue_generate(&task, 2, 0, TESTS, d.tokens, d.targets, d.distances));
  for (int b = 0; b < TESTS; ++b) {
    attn_reactive_session_options options = ATTN_REACTIVE_SESSION_INIT;
    attn_reactive_session *s;
    options.max_turn_tokens = LENGTH;
    options.seed = 1000 + (uint64_t)b;
    need(attn_reactive_session_create(m, &options, &s));
    for (int t = 0; t < TURNS; ++t) {
      const int32_t *turn = d.turns[t].tokens + b * LENGTH;
      int best = 0, asked = ATTN_DIALOGUE_ASKED + 1, distance = d.distances[t * TESTS + b];
      need(attn_reactive_session_feed(s, turn, asked, logits));
      for (int k = 1; k < vocabulary; ++k)
        if (logits[k] > logits[best]) best = k;
      right[distance] += best == turn[asked];
      ++count[distance];
      need(attn_reactive_session_feed(s, turn + asked, LENGTH - asked, NULL));
      need(attn_reactive_session_end_turn(s));
    }
    attn_reactive_session_destroy(s);
  }
  for (int i = 0; i <= FARTHEST; ++i) right[i] /= count[i] ? count[i] : 1;
  dialogues_free(&d);
}

static void recall(const kind *k, int steps) {
  attn_reactive *m = create(k, 1);
  attn_reactive_trainer *trainer;
  attn_reactive_training options = ATTN_REACTIVE_TRAINING_INIT;
  dialogues d = dialogues_new(BATCH);
  double loss = 0, right[FARTHEST + 1];
  need(attn_reactive_trainer_create(m, &options, &trainer));
  for (int step = 0; step < steps; ++step) {
    double t = (double)step / steps, rate = 3e-3 * fmin(1, (step + 1) / 50.0) * (1 - t);
    need(attn_dialogue_generate(&task, 1, (int64_t)step * BATCH, BATCH, d.tokens, d.targets,
                                d.distances));
    need(attn_reactive_train_dialogues(trainer, d.turns, TURNS, rate, &loss));
  }
  attn_reactive_trainer_destroy(trainer);
  test(m, right);
  printf("| %d | %s | ", k->slots, k->memory);
  if (strcmp(k->gate, "none") == 0)
    printf("none |");
  else
    printf("%s %s, w from %g |", k->gate, k->activation, k->initial);
  for (int i = 1; i <= FARTHEST; ++i) printf(" %.0f %% |", 100 * right[i]);
  printf("\n");
  fflush(stdout);
  attn_reactive_destroy(m);
  dialogues_free(&d);
}

static void recalls(int steps) {
  static const kind kinds[] = {
      {1, "interlayer", "static", "sigmoid", 3},  {4, "interlayer", "static", "sigmoid", 3},
      {16, "interlayer", "static", "sigmoid", 3}, {4, "interlayer", "static", "sigmoid", 0},
      {4, "interlayer", "none", "sigmoid", 3},    {4, "interlayer", "static", "tanh", 3},
      {4, "interlayer", "linear", "sigmoid", 3},  {4, "simple", "static", "sigmoid", 3}};
  printf("Right answers about what was told some turns ago (chance %.0f %%), after %d steps\n\n",
         100.0 / (double)task.values, steps);
  printf("| slots | memory | gate |");
  for (int i = 1; i <= FARTHEST; ++i) printf(" %d |", i);
  printf("\n|---|---|---|");
  for (int i = 1; i <= FARTHEST; ++i) printf("---|");
  printf("\n");
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; ++i) recall(&kinds[i], steps);
}

/* Time --------------------------------------------------------------------------------------------
 */

enum { QUERY = 32, REPLY = 32, LONG_TURNS = 32, WORDS = 512 };

static int32_t word(int64_t at) {
  return (int32_t)((at * 7919 + at * at % 31) % WORDS);
}

/* QUERY tokens at once and REPLY by themselves, from the at-th of the dialogue on. */
static void take_turn(attn_reactive_session *s, int64_t at) {
  int32_t query[QUERY];
  float logits[WORDS];
  for (int i = 0; i < QUERY; ++i) query[i] = word(at + i);
  need(attn_reactive_session_feed(s, query, QUERY, logits));
  for (int i = 0; i < REPLY; ++i)
    need(attn_reactive_session_feed(s, (int32_t[]){word(at + QUERY + i)}, 1, logits));
}

/* Of one decoder: with its memory; with all turns as one, whose keys are kept; and with all that
 * was said before read again. */
static double turn_time(attn_reactive_session *s, int way, int64_t turn) {
  int64_t at = turn * (QUERY + REPLY);
  static int32_t history[LONG_TURNS * (QUERY + REPLY)];
  double start = seconds();
  if (way == 2 && turn > 0) {
    attn_reactive_session_drop_turn(s);
    for (int64_t i = 0; i < at; ++i) history[i] = word(i);
    need(attn_reactive_session_feed(s, history, at, NULL));
  }
  take_turn(s, at);
  if (way == 0) need(attn_reactive_session_end_turn(s));
  return seconds() - start;
}

static void times(void) {
  static const int shown[] = {1, 2, 4, 8, 16, 32};
  double best[3][LONG_TURNS];
  attn_reactive *m;
  need(attn_reactive_create("{\"model_type\": \"reactive\", \"vocab_size\": 512, \"hidden_size\": "
                            "256, \"num_memory_slots\": 64, \"num_hidden_layers\": 4, "
                            "\"num_attention_heads\": 4, \"intermediate_size\": 512}",
                            1, ATTN_F32, &m));
  for (int way = 0; way < 3; ++way)
    for (int again = 0; again < 3; ++again) {
      attn_reactive_session *s;
      need(attn_reactive_session_create(m, NULL, &s));
      for (int t = 0; t < LONG_TURNS; ++t) {
        double time = turn_time(s, way, t);
        if (again == 0 || time < best[way][t]) best[way][t] = time;
      }
      attn_reactive_session_destroy(s);
    }
  printf("A turn of %d tokens and %d more one by one, milliseconds, best of 3\n\n", QUERY, REPLY);
  printf("| turn | with the memory | keys of all turns kept | the history read again |\n"
         "|---|---|---|---|\n");
  for (int i = 0; i < 6; ++i)
    printf("| %d | %.1f | %.1f | %.1f |\n", shown[i], 1e3 * best[0][shown[i] - 1],
           1e3 * best[1][shown[i] - 1], 1e3 * best[2][shown[i] - 1]);
  attn_reactive_destroy(m);
}

/* Norms -------------------------------------------------------------------------------------------
 */

/* The memory's root mean square after so many turns. */
static void norm(const kind *k) {
  static const int shown[] = {0, 1, 2, 5, 10, 20, 50, 100};
  attn_reactive *m = create(k, 1);
  attn_reactive_session_options options = ATTN_REACTIVE_SESSION_INIT;
  attn_reactive_session *s;
  int64_t count = (int64_t)2 * k->slots * 64;
  float *memory = malloc((size_t)count * sizeof *memory);
  options.seed = 7;
  need(attn_reactive_session_create(m, &options, &s));
  printf("| %s |", strcmp(k->gate, "none") ? k->activation : "none");
  printf(strcmp(k->gate, "none") ? " %g |" : " |", k->initial);
  for (int t = 0, next = 0; t <= 100 && memory; ++t) {
    double sum = 0;
    need(attn_reactive_session_get_memory(s, memory));
    for (int64_t i = 0; i < count; ++i) sum += (double)memory[i] * memory[i];
    if (t == shown[next]) printf(" %.2g |", sqrt(sum / (double)count)), ++next;
    int32_t turn[LENGTH];
    for (int i = 0; i < LENGTH; ++i)
      turn[i] = word(t * LENGTH + i) % (int32_t)attn_dialogue_vocabulary(&task);
    need(attn_reactive_session_feed(s, turn, LENGTH, NULL));
    need(attn_reactive_session_end_turn(s));
  }
  printf("\n");
  free(memory);
  attn_reactive_session_destroy(s);
  attn_reactive_destroy(m);
}

static void norms(void) {
  static const kind kinds[] = {
      {8, "interlayer", "static", "sigmoid", 3},  {8, "interlayer", "static", "sigmoid", 0},
      {8, "interlayer", "static", "sigmoid", -3}, {8, "interlayer", "static", "tanh", 3},
      {8, "interlayer", "static", "tanh", 0},     {8, "interlayer", "static", "tanh", -0.5},
      {8, "interlayer", "none", "sigmoid", 0}};
  printf("Root mean square of an untrained memory after some turns\n\n"
         "| gate | w | 0 | 1 | 2 | 5 | 10 | 20 | 50 | 100 "
         "|\n|---|---|---|---|---|---|---|---|---|---|\n");
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; ++i) norm(&kinds[i]);
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  int steps = argc > 2 ? atoi(argv[2]) : 400;
  bool all = argc < 2;
  if ((!all && strcmp(what, "recall") && strcmp(what, "time") && strcmp(what, "norms")) ||
      steps < 1) {
    fprintf(stderr, "usage: bench_reactive [recall | time | norms] [steps]\n");
    return 2;
  }
  need(attn_set_threads(1)); /* all of it is too small for more */
  if (all || strcmp(what, "recall") == 0) recalls(steps);
  if (all) printf("\n");
  if (all || strcmp(what, "time") == 0) times();
  if (all) printf("\n");
  if (all || strcmp(what, "norms") == 0) norms();
  return 0;
}
