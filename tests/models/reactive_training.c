/* Training of the Reactive Transformer: the losses of every stage against the oracle, gradients
 * through the memory against differences, what learns and what does not, and that it learns. */
#include "support/test.h"

#include "base/fault.h"
#include "base/memory.h"
#include "support/reactive.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum {
  VOCABULARY = REACTIVE_VOCABULARY,
  HIDDEN = REACTIVE_HIDDEN,
  SLOTS = REACTIVE_SLOTS,
  LAYERS = REACTIVE_LAYERS,
  TURNS = 3,
  DIALOGUES = 2,
  LONGEST = 9,
  MOST_ROWS = DIALOGUES * LONGEST
};

typedef enum stage { JOINT_DECODER, JOINT_ENCODER, MEMORY, DIALOGUE } stage;

/* Turns of two dialogues of unequal lengths; for the memory's stage, of as many tokens as slots. */
typedef struct talk {
  int32_t tokens[TURNS][MOST_ROWS], targets[TURNS][MOST_ROWS], offsets[TURNS][DIALOGUES + 1];
  attn_turns turns[TURNS];
} talk;

static void make_talk(talk *t, bool of_slots) {
  static const int32_t offsets[TURNS][DIALOGUES + 1] = {{0, 6, 9}, {0, 4, 8}, {0, 1, 9}};
  static const int32_t equal[DIALOGUES + 1] = {0, SLOTS, 2 * SLOTS};
  for (int n = 0; n < TURNS; ++n) {
    memcpy(t->offsets[n], of_slots ? equal : offsets[n], sizeof equal);
    int64_t rows = t->offsets[n][DIALOGUES];
    reactive_tokens(t->tokens[n], rows, n);
    reactive_tokens(t->targets[n], rows, n + 3);
    t->targets[n][2] = t->targets[n][5] = -1;
    t->turns[n] = (attn_turns){.tokens = t->tokens[n],
                               .targets = n == 1 ? NULL : t->targets[n],
                               .offsets = t->offsets[n],
                               .sequences = DIALOGUES};
  }
}

/* A loss of the model as it is; every call draws the same random numbers. Gradients, if wanted, as
 * arrays to be freed. */
static double loss_of(attn_reactive *m, stage stage, const attn_reactive_training *options,
                      const talk *t, int64_t turns, double **gradients) {
  attn_reactive_trainer *trainer;
  double loss[2];
  assert_ok(attn_reactive_trainer_create(m, options, &trainer));
  if (stage == DIALOGUE)
    assert_ok(attn_reactive_train_dialogues(trainer, t->turns, turns, 0, loss));
  else if (stage == MEMORY)
    assert_ok(attn_reactive_train_memory(trainer, t->turns, turns, 0, loss));
  else
    assert_ok(attn_reactive_train_joint(trainer, t->turns, 0, loss));
  for (int64_t i = 0; gradients && i < m->list.count; ++i)
    gradients[i] = m->list.parameters[i].gradient.data
                       ? test_to_doubles(&m->list.parameters[i].gradient)
                       : NULL;
  attn_reactive_trainer_destroy(trainer);
  return loss[stage == JOINT_ENCODER];
}

/* Gradients -------------------------------------------------------------------------------------
 */

/* Of parameters whose name has `part` in it. */
static void compare_slopes(attn_reactive *m, stage stage, const attn_reactive_training *options,
                           const talk *t, int64_t turns, const char *part) {
  double *gradients[512];
  const double h = 1e-5;
  int compared = 0;
  assert_in_range(m->list.count, 1, 512);
  loss_of(m, stage, options, t, turns, gradients);
  for (int64_t i = 0; i < m->list.count; ++i) {
    attn_parameter *p = &m->list.parameters[i];
    int64_t count = attn_tensor_count(&p->value);
    if (strstr(p->name, part)) {
      int64_t at = count * 2 / 3;
      double *x = test_to_doubles(&p->value), before = x[at], losses[2];
      assert_non_null(gradients[i]);
      for (int side = 0; side < 2; ++side) {
        x[at] = before + (side ? h : -h);
        reactive_set(p, x);
        losses[side] = loss_of(m, stage, options, t, turns, NULL);
      }
      x[at] = before;
      reactive_set(p, x);
      free(x);
      double slope = (losses[1] - losses[0]) / (2 * h);
      if (!(fabs(slope - gradients[i][at]) < 1e-7 * (1 + fabs(slope))))
        fail_msg("stage %d: the gradient of %s is %.9g, by differences %.9g", (int)stage, p->name,
                 gradients[i][at], slope);
      ++compared;
    }
  }
  assert_true(compared > 0);
  for (int64_t i = 0; i < m->list.count; ++i) free(gradients[i]);
}

static void gradients_go_through_the_memory(void **state) {
  (void)state;
  talk t;
  make_talk(&t, false);
  for (int gate = 0; gate < REACTIVE_GATES; ++gate) {
    attn_reactive *m = reactive_make((gate + 2) % REACTIVE_MEMORIES, gate, ATTN_F64);
    attn_reactive_training options = ATTN_REACTIVE_TRAINING_INIT;
    options.deviation = 0.7;
    compare_slopes(m, DIALOGUE, &options, &t, TURNS, ""); /* every parameter */
    attn_reactive_destroy(m);
  }
}

/* Each loss by itself, of what its gradient goes into: the memory is detached. */
static void gradients_of_the_first_stages(void **state) {
  (void)state;
  talk t;
  attn_reactive *m = reactive_make(4, 3, ATTN_F64);
  attn_reactive_training options = ATTN_REACTIVE_TRAINING_INIT;
  options.noise = 0.15;
  options.mask_rate = 0.4;
  make_talk(&t, false);
  compare_slopes(m, JOINT_DECODER, &options, &t, 1, "decoder.");
  compare_slopes(m, JOINT_ENCODER, &options, &t, 1, "encoder.");
  options.deviation = 0.7;
  make_talk(&t, true);
  compare_slopes(m, MEMORY, &options, &t, 1, ".memory.");
  attn_reactive_destroy(m);
}

/* Oracles ---------------------------------------------------------------------------------------
 */

/* The sum over rows with a target of -log softmax(logits)[target]. */
static double surprise(int64_t rows, const double *logits, const int32_t *targets, int *counted) {
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    if (targets[r] < 0) continue;
    for (int k = 0; k < VOCABULARY; ++k) sum += exp(logits[r * VOCABULARY + k]);
    total += log(sum) - logits[r * VOCABULARY + targets[r]];
    ++*counted;
  }
  return total;
}

/* All tokens masked, no noise: logits of the masked head over the encoder's last layer, and the
 * decoder with the encoder's layers as its memory. */
static void joint_losses_equal_the_oracle(void **state) {
  (void)state;
  talk t;
  make_talk(&t, false);
  attn_reactive *m = reactive_make(2, 1, ATTN_F64);
  attn_reactive_training options = ATTN_REACTIVE_TRAINING_INIT;
  reactive_values v;
  oracle_reactive o = reactive_oracle(m, 2, 1, &v);
  options.mask_rate = 1;
  options.mask_token = 8;
  double expected[2] = {0};
  int counted[2] = {0};
  for (int b = 0; b < DIALOGUES; ++b) {
    int64_t first = t.offsets[0][b], rows = t.offsets[0][b + 1] - first;
    int32_t masked[LONGEST];
    double encoded[LAYERS * LONGEST * HIDDEN], logits[LONGEST * VOCABULARY];
    for (int64_t r = 0; r < rows; ++r) masked[r] = 8;
    oracle_reactive_encode(&o, rows, masked, encoded);
    oracle_reactive_logits(&o, rows, t.tokens[0] + first, rows, encoded, logits);
    expected[0] += surprise(rows, logits, t.targets[0] + first, &counted[0]);
    const double *w = o.values(o.context, "encoder.masked_head.weight");
    const double *bias = o.values(o.context, "encoder.masked_head.bias");
    for (int64_t i = 0; i < rows * VOCABULARY; ++i) {
      logits[i] = bias[i % VOCABULARY];
      for (int c = 0; c < HIDDEN; ++c)
        logits[i] += w[i % VOCABULARY * HIDDEN + c] *
                     encoded[((LAYERS - 1) * rows + i / VOCABULARY) * HIDDEN + c];
    }
    expected[1] += surprise(rows, logits, t.tokens[0] + first, &counted[1]);
  }
  for (int i = 0; i < 2; ++i) {
    double got = loss_of(m, i ? JOINT_ENCODER : JOINT_DECODER, &options, &t, 1, NULL);
    if (!(fabs(got - expected[i] / counted[i]) < 1e-12))
      fail_msg("loss %d is %.15g, expected %.15g", i, got, expected[i] / counted[i]);
  }
  reactive_free_values(&v);
  attn_reactive_destroy(m);
}

static double cosine(const double *a, const double *b) {
  double ab = 0, aa = 0, bb = 0;
  for (int c = 0; c < HIDDEN; ++c) ab += a[c] * b[c], aa += a[c] * a[c], bb += b[c] * b[c];
  return ab / sqrt(aa * bb);
}

/* Memories that begin at zero, so that nothing is random. The engine's unit vectors have 1e-6 under
 * their root. */
static void memory_losses_equal_the_oracle(void **state) {
  (void)state;
  talk t;
  make_talk(&t, true);
  attn_reactive *m = reactive_make(4, 1, ATTN_F64);
  attn_reactive_training options = ATTN_REACTIVE_TRAINING_INIT;
  reactive_values v;
  oracle_reactive o = reactive_oracle(m, 4, 1, &v);
  options.deviation = 0;
  options.new_decay = 0.2;
  options.new_least = 0.45; /* 0.9, 0.5, and not 0.3 */
  const double weights[TURNS] = {0.9, 0.5, 0.45};
  double expected = 0;
  enum { COUNT = LAYERS * SLOTS * HIDDEN };
  for (int b = 0; b < DIALOGUES; ++b) {
    double stm[COUNT] = {0}, encoded[COUNT], next[COUNT], target[COUNT];
    for (int n = 0; n < TURNS; ++n) {
      oracle_reactive_encode(&o, SLOTS, t.tokens[n] + b * SLOTS, encoded);
      oracle_reactive_update(&o, stm, SLOTS, encoded, next);
      for (int i = 0; i < COUNT; ++i)
        target[i] = weights[n] * encoded[i] + (1 - weights[n]) * stm[i];
      for (int s = 0; s < LAYERS * SLOTS; ++s)
        expected -=
            cosine(next + s * HIDDEN, target + s * HIDDEN) / (LAYERS * SLOTS * DIALOGUES * TURNS);
      memcpy(stm, next, sizeof stm);
    }
  }
  double got = loss_of(m, MEMORY, &options, &t, TURNS, NULL);
  if (!(fabs(got - expected) < 1e-5)) fail_msg("%.12g, expected %.12g", got, expected);
  reactive_free_values(&v);
  attn_reactive_destroy(m);
}

/* However many turns a step takes, the losses are those of turn after turn. */
static void dialogue_losses_equal_the_oracle(void **state) {
  (void)state;
  talk t;
  make_talk(&t, false);
  attn_reactive *m = reactive_make(2, 4, ATTN_F64);
  attn_reactive_training options = ATTN_REACTIVE_TRAINING_INIT;
  reactive_values v;
  oracle_reactive o = reactive_oracle(m, 2, 4, &v);
  options.deviation = 0;
  double expected = 0;
  int counted = 0;
  for (int b = 0; b < DIALOGUES; ++b) {
    double stm[LAYERS * SLOTS * HIDDEN] = {0}, next[LAYERS * SLOTS * HIDDEN];
    for (int n = 0; n < TURNS; ++n) {
      int64_t first = t.offsets[n][b], rows = t.offsets[n][b + 1] - first;
      double encoded[LAYERS * LONGEST * HIDDEN], logits[LONGEST * VOCABULARY];
      int32_t targets[LONGEST];
      for (int64_t r = 0; r < rows; ++r) /* turn 1 has none: the next tokens are meant */
        targets[r] = n != 1         ? t.targets[n][first + r]
                     : r + 1 < rows ? t.tokens[n][first + r + 1]
                                    : -1;
      oracle_reactive_logits(&o, rows, t.tokens[n] + first, SLOTS, stm, logits);
      expected += surprise(rows, logits, targets, &counted);
      oracle_reactive_encode(&o, rows, t.tokens[n] + first, encoded);
      oracle_reactive_update(&o, stm, rows, encoded, next);
      memcpy(stm, next, sizeof stm);
    }
  }
  for (options.through = 0; options.through < 5; ++options.through) {
    double got = loss_of(m, DIALOGUE, &options, &t, TURNS, NULL);
    if (!(fabs(got - expected / counted) < 1e-12))
      fail_msg("%d turns a step: %.15g, expected %.15g", (int)options.through, got,
               expected / counted);
  }
  reactive_free_values(&v);
  attn_reactive_destroy(m);
}

/* Learning --------------------------------------------------------------------------------------
 */

static void only_what_shall_learn_changes(void **state) {
  (void)state;
  static const struct {
    int part;
    const char *name;
  } parts[] = {{ATTN_REACTIVE_DECODER, "layers.1.decoder.memory_norm.weight"},
               {ATTN_REACTIVE_ENCODER, "layers.1.encoder.self.q_proj.weight"},
               {ATTN_REACTIVE_MEMORY, "layers.1.memory.write.v_proj.weight"},
               {ATTN_REACTIVE_EMBEDDING, "embedding.weight"}};
  talk t;
  make_talk(&t, false);
  attn_reactive *m = reactive_make(2, 1, ATTN_F64);
  for (int i = 0; i < 4; ++i) {
    attn_reactive_training options = ATTN_REACTIVE_TRAINING_INIT;
    attn_reactive_trainer *trainer;
    double *before[4], *after;
    options.parts = parts[i].part;
    for (int k = 0; k < 4; ++k)
      before[k] = test_to_doubles(&reactive_find(m, parts[k].name)->value);
    assert_ok(attn_reactive_trainer_create(m, &options, &trainer));
    assert_ok(attn_reactive_train_dialogues(trainer, t.turns, TURNS, 1e-3, NULL));
    for (int k = 0; k < 4; ++k) {
      const attn_tensor *value = &reactive_find(m, parts[k].name)->value;
      after = test_to_doubles(value);
      double moved = test_relative_error(after, before[k], attn_tensor_count(value));
      if ((moved > 0) != (i == k)) fail_msg("part %d: %s moved by %g", i, parts[k].name, moved);
      free(after);
      free(before[k]);
    }
    attn_reactive_trainer_destroy(trainer);
  }
  attn_reactive_destroy(m);
}

/* Two turns: one says which of eight things it is, the other asks. */
static void make_told(int count, uint64_t seed, int32_t *tokens[2], int32_t *asked[2],
                      attn_turns turns[2], int32_t *offsets) {
  for (int b = 0; b <= count; ++b) offsets[b] = 3 * b;
  for (int b = 0; b < count; ++b) {
    int32_t fact = (int32_t)(4 + (seed * 31 + (uint64_t)b * 7 + (uint64_t)b * (uint64_t)b) % 8);
    memcpy(tokens[0] + 3 * b, (int32_t[]){0, fact, 3}, 3 * sizeof(int32_t));
    memcpy(tokens[1] + 3 * b, (int32_t[]){1, 2, fact}, 3 * sizeof(int32_t));
    memcpy(asked[0] + 3 * b, (int32_t[]){-1, -1, -1}, 3 * sizeof(int32_t));
    memcpy(asked[1] + 3 * b, (int32_t[]){-1, fact, -1}, 3 * sizeof(int32_t));
  }
  for (int n = 0; n < 2; ++n)
    turns[n] = (attn_turns){
        .tokens = tokens[n], .targets = asked[n], .offsets = offsets, .sequences = count};
}

static void facts_are_learnt(void **state) {
  (void)state;
  enum { COUNT = 32 };
  int32_t memory[4][3 * COUNT], offsets[COUNT + 1];
  int32_t *tokens[2] = {memory[0], memory[1]}, *asked[2] = {memory[2], memory[3]};
  attn_turns turns[2];
  attn_reactive_trainer *trainer;
  attn_reactive *m;
  double begun = 0, ended = 0;
  assert_ok(attn_reactive_create(
      "{\"model_type\": \"reactive\", \"vocab_size\": 13, \"hidden_size\": 24, "
      "\"num_memory_slots\": 3, \"num_attention_heads\": 2, \"intermediate_size\": 48, "
      "\"head_norm\": true}",
      1, ATTN_F32, &m));
  assert_ok(attn_reactive_move(m, test_device()));
  assert_ok(attn_reactive_trainer_create(m, NULL, &trainer));
  for (int step = 0; step < 300; ++step) {
    make_told(COUNT, (uint64_t)step, tokens, asked, turns, offsets);
    assert_ok(attn_reactive_train_dialogues(trainer, turns, 2, 5e-3, step ? &ended : &begun));
  }
  print_message("  loss %.3f to %.3f\n", begun, ended);
  attn_reactive_trainer_destroy(trainer);
  assert_true(begun > 1.5 && ended < 0.2);
  /* And by a session, which took no part in it. */
  attn_reactive_session *s;
  assert_ok(attn_reactive_session_create(m, NULL, &s));
  int right = 0;
  for (int32_t fact = 4; fact < 12; ++fact) {
    float logits[13];
    int best = 0;
    assert_ok(attn_reactive_session_feed(s, (int32_t[]){0, fact, 3}, 3, NULL));
    assert_ok(attn_reactive_session_end_turn(s));
    assert_ok(attn_reactive_session_feed(s, (int32_t[]){1, 2}, 2, logits));
    for (int k = 1; k < 13; ++k)
      if (logits[k] > logits[best]) best = k;
    right += best == fact;
    attn_reactive_session_drop_turn(s);
  }
  assert_true(right >= 7);
  attn_reactive_session_destroy(s);
  attn_reactive_destroy(m);
}

/* Stages 1 and 3 make their losses smaller. */
static void first_stages_learn(void **state) {
  (void)state;
  talk t;
  double first[2], last[2], one;
  attn_reactive_trainer *trainer;
  attn_reactive_training options = ATTN_REACTIVE_TRAINING_INIT;
  attn_reactive *m = reactive_make(2, 1, ATTN_F32);
  options.noise = 0.1;
  make_talk(&t, false);
  assert_ok(attn_reactive_trainer_create(m, &options, &trainer));
  for (int step = 0; step < 150; ++step)
    assert_ok(attn_reactive_train_joint(trainer, &t.turns[0], 5e-3, step ? last : first));
  attn_reactive_trainer_destroy(trainer);
  assert_true(last[0] < first[0] / 4 && last[1] < first[1] / 2);
  make_talk(&t, true);
  options.parts = ATTN_REACTIVE_MEMORY;
  assert_ok(attn_reactive_trainer_create(m, &options, &trainer));
  for (int step = 0; step < 150; ++step)
    assert_ok(attn_reactive_train_memory(trainer, t.turns, TURNS, 3e-3, step ? &one : first));
  attn_reactive_trainer_destroy(trainer);
  print_message("  cosine %.2f to %.2f\n", -first[0], -one);
  assert_true(one < first[0] - 0.2 && one >= -1);
  attn_reactive_destroy(m);
}

/* Refusals --------------------------------------------------------------------------------------
 */

static void refused(attn_status status, const char *says) {
  assert_int_equal(status, ATTN_INVALID_ARGUMENT);
  if (!strstr(attn_error_message(), says))
    fail_msg("\"%s\" does not say %s", attn_error_message(), says);
}

static void bad_input_is_refused(void **state) {
  (void)state;
  talk t;
  attn_reactive *m = reactive_make(2, 1, ATTN_F32);
  attn_reactive_trainer *trainer;
  attn_reactive_training options = ATTN_REACTIVE_TRAINING_INIT;
  options.parts = 16;
  refused(attn_reactive_trainer_create(m, &options, &trainer), "parts");
  options.parts = ATTN_REACTIVE_MEMORY;
  options.mask_token = VOCABULARY;
  refused(attn_reactive_trainer_create(m, &options, &trainer), "mask_token");
  options.mask_token = 0;
  options.noise = NAN;
  refused(attn_reactive_trainer_create(m, &options, &trainer), "noise");
  options.noise = 0;
  options.struct_size = 3;
  refused(attn_reactive_trainer_create(m, &options, &trainer), "struct_size");
  options.struct_size = sizeof options;
  options.beta1 = 1;
  refused(attn_reactive_trainer_create(m, &options, &trainer), "beta1");
  options.beta1 = 0.9;
  refused(attn_reactive_trainer_create(NULL, &options, &trainer), "NULL");
  assert_ok(attn_reactive_trainer_create(m, &options, &trainer));
  make_talk(&t, false);
  refused(attn_reactive_train_joint(trainer, t.turns, 1e-3, NULL), "no part");
  refused(attn_reactive_train_memory(trainer, t.turns, 1, 1e-3, NULL), "as many as slots");
  refused(attn_reactive_train_dialogues(trainer, t.turns, 0, 1e-3, NULL), "no turns");
  t.turns[1].sequences = 1;
  refused(attn_reactive_train_dialogues(trainer, t.turns, TURNS, 1e-3, NULL), "turn 1 is of 1");
  make_talk(&t, false);
  t.tokens[1][3] = VOCABULARY;
  refused(attn_reactive_train_dialogues(trainer, t.turns, TURNS, 1e-3, NULL), "token 13");
  make_talk(&t, false);
  t.targets[2][0] = VOCABULARY;
  refused(attn_reactive_train_dialogues(trainer, t.turns, TURNS, 1e-3, NULL), "target 13");
  make_talk(&t, false);
  t.offsets[0][1] = 0;
  refused(attn_reactive_train_joint(trainer, t.turns, 1e-3, NULL), "empty");
  make_talk(&t, false);
  for (int i = 0; i < MOST_ROWS; ++i) t.targets[0][i] = -1;
  refused(attn_reactive_train_dialogues(trainer, t.turns, 1, 1e-3, NULL), "no turn has a target");
  refused(attn_reactive_train_joint(NULL, t.turns, 1e-3, NULL), "NULL");
  make_talk(&t, false);
  assert_ok(attn_reactive_train_dialogues(trainer, t.turns, TURNS, 1e-3, NULL));
  attn_reactive_trainer_destroy(trainer);
  attn_reactive_destroy(m);
}

/* A model's whole life: a step, a turn, a fork. */
static attn_status live_once(const attn_turns *turns) {
  attn_reactive *m = NULL;
  attn_reactive_trainer *trainer = NULL;
  attn_reactive_session *s = NULL, *fork = NULL;
  const int32_t tokens[] = {3, 4};
  attn_status status =
      attn_reactive_create("{\"model_type\": \"reactive\", \"vocab_size\": 13, \"hidden_size\": 8, "
                           "\"num_memory_slots\": 5, \"num_hidden_layers\": 2}",
                           1, ATTN_F32, &m);
  if (status == ATTN_OK) status = attn_reactive_trainer_create(m, NULL, &trainer);
  if (status == ATTN_OK) status = attn_reactive_train_dialogues(trainer, turns, 2, 1e-3, NULL);
  if (status == ATTN_OK) status = attn_reactive_train_joint(trainer, turns, 1e-3, NULL);
  attn_reactive_trainer_destroy(trainer);
  if (status == ATTN_OK) status = attn_reactive_session_create(m, NULL, &s);
  if (status == ATTN_OK) status = attn_reactive_session_feed(s, tokens, 2, NULL);
  if (status == ATTN_OK) status = attn_reactive_session_end_turn(s);
  if (status == ATTN_OK) status = attn_reactive_session_fork(s, &fork);
  attn_reactive_session_destroy(fork);
  attn_reactive_session_destroy(s);
  attn_reactive_destroy(m);
  return status;
}

/* Every one of its allocations, then fewer of the many that are alike. */
static void failing_memory_is_a_clean_error(void **state) {
  (void)state;
  test_needs_cpu();
  talk t;
  make_talk(&t, false);
  assert_ok(live_once(t.turns)); /* what stays for the whole process is there */
  size_t before = attn_memory_get_stats().live_bytes;
  bool failed = true;
  int64_t tried = 0;
  for (int64_t n = 0; failed; n += n < 60 ? 1 : n / 12, ++tried) {
    attn_fault_arm(ATTN_FAULT_ALLOC, n);
    attn_status status = live_once(t.turns);
    failed = attn_fault_disarm(ATTN_FAULT_ALLOC);
    assert_int_equal(status, failed ? ATTN_OUT_OF_MEMORY : ATTN_OK);
    assert_int_equal(attn_memory_get_stats().live_bytes, before);
  }
  assert_true(tried > 60);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(gradients_go_through_the_memory),
      cmocka_unit_test(gradients_of_the_first_stages),
      cmocka_unit_test(joint_losses_equal_the_oracle),
      cmocka_unit_test(memory_losses_equal_the_oracle),
      cmocka_unit_test(dialogue_losses_equal_the_oracle),
      cmocka_unit_test(only_what_shall_learn_changes),
      cmocka_unit_test(facts_are_learnt),
      cmocka_unit_test(first_stages_learn),
      cmocka_unit_test(bad_input_is_refused),
      cmocka_unit_test(failing_memory_is_a_clean_error),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
