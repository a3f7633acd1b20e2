/* The training of whole models: it learns, it continues to the same bits, it loses nothing. */
#include "support/models.h"
#include "support/test.h"

#include "attn/attn.h"
#include "base/fault.h"
#include "base/memory.h"
#include "base/io.h"
#include "files/safetensors.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { PATH_SIZE = 128, MOST_STEPS = 128 };

/* -- A place, a text, a small model ------------------------------------------------------------ */

typedef struct place {
  char directory[PATH_SIZE], text[PATH_SIZE], output[2][PATH_SIZE];
} place;

static const char *const outputs[] = {"training.safetensors", "model.safetensors", "config.json",
                                      "loss.svg", "loss.csv"};

static void write_text(const char *path, const char *line, int lines) {
  FILE *file = fopen(path, "w");
  assert_non_null(file);
  for (int i = 0; i < lines; ++i) fputs(line, file);
  assert_int_equal(fclose(file), 0);
}

static place make_place(void) {
  place p;
  snprintf(p.directory, sizeof p.directory, "/tmp/attn-training-XXXXXX");
  assert_non_null(mkdtemp(p.directory));
  snprintf(p.text, sizeof p.text, "%.60s/text", p.directory);
  char directory[PATH_SIZE]; /* a copy: GCC takes two members of a struct for overlapping */
  memcpy(directory, p.directory, sizeof directory);
  for (int i = 0; i < 2; ++i) snprintf(p.output[i], PATH_SIZE, "%.60s/out%d", directory, i);
  write_text(p.text, "the quick brown fox jumps over the lazy dog. ", 40);
  return p;
}

static void file_in(const place *p, int output, const char *name, char path[PATH_SIZE + 32]) {
  snprintf(path, PATH_SIZE + 32, "%s/%s", p->output[output], name);
}

static void clear_output(const place *p, int output) {
  char path[PATH_SIZE + 32];
  for (size_t f = 0; f < sizeof outputs / sizeof *outputs; ++f) {
    file_in(p, output, outputs[f], path);
    unlink(path);
  }
  rmdir(p->output[output]);
}

static void remove_place(const place *p) {
  for (int i = 0; i < 2; ++i) clear_output(p, i);
  unlink(p->text);
  assert_int_equal(rmdir(p->directory), 0); /* so that no temporary is left either */
}

static const char *small_config(const char *mixer) {
  static char text[512];
  snprintf(text, sizeof text,
           "{\"vocab_size\": 256, \"hidden_size\": 32, \"num_hidden_layers\": 2, \"mixer\": "
           "\"%s\", \"num_attention_heads\": 2, \"intermediate_size\": 64}",
           mixer);
  return text;
}

static attn_training_options small_options(const place *p, const char *const *text, int output) {
  attn_training_options o = ATTN_TRAINING_OPTIONS_INIT;
  o.config = small_config("lightning");
  o.data = text;
  o.data_count = 1;
  o.validation_fraction = 0.1;
  o.output = p->output[output];
  o.steps = 10;
  o.batch = 2;
  o.length = 24;
  o.learning_rate = 1e-2;
  o.validation_every = 4;
  o.validation_windows = 3;
  o.checkpoint_every = 0;
  o.compute = ATTN_F32;
  o.save_dtype = ATTN_F32;
  o.device = test_device();
  return o;
}

/* What the callback saw. */
typedef struct journal {
  int64_t stop_after; /* step after which it says stop; 0: never */
  int calls;
  double loss[MOST_STEPS], validation[MOST_STEPS];
  uint64_t allocations[MOST_STEPS];
  int checkpoints, warnings;
  int64_t skipped;
} journal;

static bool record(void *context, const attn_training_progress *p) {
  journal *seen = context;
  if (seen->calls < MOST_STEPS) {
    seen->loss[seen->calls] = p->loss;
    seen->validation[seen->calls] = p->validation_loss;
    seen->allocations[seen->calls] = attn_memory_get_stats().allocations;
  }
  ++seen->calls;
  seen->checkpoints += p->checkpointed;
  seen->warnings += p->warning != NULL;
  seen->skipped = p->skipped;
  assert_non_null(strstr(p->line, "loss"));
  assert_null(strchr(p->line, '\n'));
  return p->step != seen->stop_after;
}

/* Fails unless the two outputs hold the same bits in every tensor of the checkpoint. */
static void assert_same_checkpoints(const place *p) {
  attn_safetensors *file[2];
  char path[PATH_SIZE + 32];
  for (int i = 0; i < 2; ++i) {
    file_in(p, i, "training.safetensors", path);
    assert_ok(attn_safetensors_open(path, &file[i]));
  }
  assert_int_equal(attn_safetensors_count(file[0]), attn_safetensors_count(file[1]));
  for (int64_t t = 0; t < attn_safetensors_count(file[0]); ++t) {
    attn_tensor a, b;
    const char *name = attn_safetensors_name(file[0], t);
    assert_ok(attn_safetensors_find(file[0], name, &a));
    assert_ok(attn_safetensors_find(file[1], name, &b));
    size_t size = (size_t)attn_tensor_count(&a) * attn_dtype_size(a.dtype);
    assert_int_equal(attn_tensor_count(&a), attn_tensor_count(&b));
    if (memcmp(a.data, b.data, size) != 0) fail_msg("%s differs", name);
  }
  for (int i = 0; i < 2; ++i) attn_safetensors_close(file[i]);
}

/* -- It learns ----------------------------------------------------------------------------------
 */

static void loss_falls_for_every_mixer(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  static const attn_dtype dtypes[] = {ATTN_BF16, ATTN_F32};
  for (int m = 0; m < attn_mixer_count(); ++m)
    for (int d = 0; d < 2; ++d) {
      attn_mixer_info info;
      assert_ok(attn_mixer_get_info(m, &info));
      if (!(info.abilities & ATTN_ABILITY_TRAINABLE)) continue;
      attn_training_options o = small_options(&p, &text, 0);
      o.config = small_config(info.name);
      o.compute = dtypes[d];
      o.steps = 40;
      o.batch = 4;
      journal seen = {0};
      attn_training_result result;
      attn_status status = attn_train(&o, record, &seen, &result);
      if (status != ATTN_OK) fail_msg("%s: %s", info.name, attn_error_message());
      print_message("  %s, %s: loss %.3f to %.3f, validation %.3f\n", info.name,
                    attn_dtype_name(o.compute), seen.loss[0], seen.loss[39],
                    result.validation_loss);
      assert_true(fabs(seen.loss[0] - log(256)) < 0.3); /* of a model that knows nothing */
      assert_true(seen.loss[39] < 2.5); /* below the entropy of single letters, 3.05 */
      assert_true(result.validation_loss < 3);
      assert_int_equal(result.steps, 40);
      assert_int_equal(result.tokens, 40 * 4 * 24);
      assert_int_equal(result.skipped, 0);
      clear_output(&p, 0);
    }
  remove_place(&p);
}

/* bfloat16 and float32 see the same data and begin with the same weights. */
static void dtypes_agree(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  static const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32, ATTN_BF16};
  /* rounding of a product's inputs, grown by the steps that follow one another */
  static const double tolerance[] = {0, 1e-4, 0.05};
  journal logs[3] = {0};
  for (int d = 0; d < 3; ++d) {
    attn_training_options o = small_options(&p, &text, 0);
    o.compute = dtypes[d];
    assert_ok(attn_train(&o, record, &logs[d], NULL));
    clear_output(&p, 0);
    for (int s = 0; s < 10; ++s)
      if (!(fabs(logs[d].loss[s] - logs[0].loss[s]) <= tolerance[d]))
        fail_msg("%s, step %d: %g, float64 has %g", attn_dtype_name(dtypes[d]), s, logs[d].loss[s],
                 logs[0].loss[s]);
  }
  remove_place(&p);
}

/* How far the losses of two runs are apart, on average over the steps. */
static double distance(const journal *a, const journal *b, int steps) {
  double sum = 0;
  for (int s = 0; s < steps; ++s) sum += fabs(a->loss[s] - b->loss[s]) / steps;
  return sum;
}

/* In bfloat16 a GPU's losses stay as near to the processor's for a hundred steps as rounding to
 * bfloat16 leaves them: no further than twice what parts the processor's own from float32's. */
static void losses_follow_the_processor(void **state) {
  (void)state;
  enum { STEPS = 100 };
  attn_device gpu = test_device();
  if (gpu.kind == ATTN_CPU) skip();
  place p = make_place();
  const char *text = p.text;
  static const char *const mixers[] = {"lightning", "softmax", "gla", "kda",
                                       "hedgehog",  "lawcat",  "lmu", "lolcats"};
  for (size_t m = 0; m < sizeof mixers / sizeof *mixers; ++m) {
    journal exact = {0}, here = {0}, there = {0}, *logs[] = {&exact, &here, &there};
    for (int i = 0; i < 3; ++i) {
      attn_training_options o = small_options(&p, &text, 0);
      o.config = small_config(mixers[m]);
      o.compute = i == 0 ? ATTN_F32 : ATTN_BF16;
      o.device = i < 2 ? (attn_device){0} : gpu;
      o.steps = STEPS;
      assert_ok(attn_train(&o, record, logs[i], NULL));
      clear_output(&p, 0);
    }
    double rounding = distance(&exact, &here, STEPS), apart = distance(&here, &there, STEPS);
    print_message("  %s: %.4f apart on average, float32 %.4f; losses %.3f, %.3f at the end\n",
                  mixers[m], apart, rounding, here.loss[STEPS - 1], there.loss[STEPS - 1]);
    assert_true(there.loss[STEPS - 1] < there.loss[0] / 2);
    assert_true(apart <= 2 * rounding);
  }
  remove_place(&p);
}

/* -- It continues to the same bits --------------------------------------------------------------
 */

static void resume_with(attn_training_options a, attn_training_options b, const place *p,
                        int64_t stop) {
  assert_ok(attn_train(&a, NULL, NULL, NULL));
  journal seen = {.stop_after = stop};
  attn_training_result result;
  assert_int_equal(attn_train(&b, record, &seen, &result), ATTN_INTERRUPTED);
  assert_int_equal(result.steps, stop);
  b.start = ATTN_START_RESUME;
  seen = (journal){0};
  assert_ok(attn_train(&b, record, &seen, &result));
  assert_int_equal(result.first_step, stop);
  assert_int_equal(seen.calls, a.steps - stop);
  assert_same_checkpoints(p);
}

static void resumed_equals_uninterrupted(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  static const char *const mixers[] = {"lightning", "softmax", "kda", "spiking_lmu"};
  for (int variant = 0; variant < 8; ++variant) {
    attn_training_options o[2];
    for (int i = 0; i < 2; ++i) {
      o[i] = small_options(&p, &text, i);
      o[i].config = small_config(mixers[variant % 4]);
      o[i].compute = variant % 2 ? ATTN_F32 : ATTN_BF16;
      o[i].accumulation = variant < 3 ? 1 : 3;
      o[i].checkpoint_activations = variant == 1 || variant == 3;
    }
    resume_with(o[0], o[1], &p, 1 + variant);
    clear_output(&p, 0);
    clear_output(&p, 1);
  }
  remove_place(&p);
}

/* An interruption in the middle of a step leaves the step before it; a crash (here: a run that is
 * thrown away after its last periodic checkpoint) loses the steps since the checkpoint only. */
static volatile sig_atomic_t interrupt_flag;

static bool raise_flag(void *context, const attn_training_progress *p) {
  if (p->step == *(const int64_t *)context) interrupt_flag = 1;
  return true;
}

/* A task instead of a text: a model of the delta rule with short convolutions learns to recall, on
 * examples that it has not seen; an interrupted run goes on to the same bits. */
static void tasks_are_learnt(void **state) {
  (void)state;
  enum { STEPS = 500 };
  place p = make_place();
  attn_training_options o[2];
  for (int i = 0; i < 2; ++i) {
    o[i] = small_options(&p, NULL, i);
    o[i].data_count = 0;
    o[i].task = "mqar";
    o[i].task_vocabulary = 12;
    o[i].task_pairs = 2;
    o[i].length = 12;
    o[i].config = small_config("gated_delta_net");
    o[i].batch = 32;
    o[i].steps = STEPS;
    o[i].validation_every = 0;
  }
  resume_with(o[0], o[1], &p, 50);
  journal seen = {0};
  attn_training_result result;
  o[0].start = ATTN_START_FRESH;
  assert_ok(attn_train(&o[0], record, &seen, &result));
  print_message("  mqar: loss %.3f to %.3f, validation %.3f\n", seen.loss[0], result.loss,
                result.validation_loss);
  assert_true(fabs(seen.loss[0] - log(256)) < 0.3);
  assert_true(result.validation_loss < 0.2); /* a guess among six values: 1.79 */
  clear_output(&p, 0);
  clear_output(&p, 1);
  remove_place(&p);
}

static void flag_stops(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  attn_training_options a = small_options(&p, &text, 0), b = small_options(&p, &text, 1);
  assert_ok(attn_train(&a, NULL, NULL, NULL));
  int64_t when = 4;
  b.interrupt = &interrupt_flag;
  interrupt_flag = 1; /* before the first step: also a checkpoint */
  assert_int_equal(attn_train(&b, NULL, NULL, NULL), ATTN_INTERRUPTED);
  interrupt_flag = 0;
  attn_training_result result;
  assert_int_equal(attn_train(&b, raise_flag, &when, &result), ATTN_INTERRUPTED);
  assert_int_equal(result.steps, when);
  assert_non_null(strstr(attn_error_message(), "continue"));
  interrupt_flag = 0;
  assert_ok(attn_train(&b, NULL, NULL, &result));
  assert_int_equal(result.first_step, when);
  assert_same_checkpoints(&p);
  /* A finished run is not run again. */
  journal seen = {0};
  assert_ok(attn_train(&b, record, &seen, &result));
  assert_int_equal(seen.calls, 0);
  assert_int_equal(result.first_step, 10);
  assert_same_checkpoints(&p);
  remove_place(&p);
}

/* Activation checkpointing computes the same numbers again. */
static void checkpointing_changes_no_bit(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  for (int m = 0; m < attn_mixer_count(); ++m)
    for (int bf16 = 0; bf16 < 2; ++bf16) {
      attn_mixer_info info;
      assert_ok(attn_mixer_get_info(m, &info));
      for (int i = 0; i < 2; ++i) {
        attn_training_options o = small_options(&p, &text, i);
        o.config = small_config(info.name);
        o.compute = bf16 ? ATTN_BF16 : ATTN_F32;
        o.steps = 4;
        o.checkpoint_activations = i == 1;
        assert_ok(attn_train(&o, NULL, NULL, NULL));
      }
      assert_same_checkpoints(&p);
      clear_output(&p, 0);
      clear_output(&p, 1);
    }
  remove_place(&p);
}

/* One step on 6 windows at once, or by 3 times 2: float64 differs by the order of sums only. The
 * second step shows it: its loss depends on the first step's gradient. */
static void accumulation_equals_a_larger_batch(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  journal logs[2] = {0};
  for (int i = 0; i < 2; ++i) {
    attn_training_options o = small_options(&p, &text, i);
    o.compute = ATTN_F64;
    o.batch = i ? 2 : 6;
    o.accumulation = i ? 3 : 1;
    o.steps = 5;
    assert_ok(attn_train(&o, record, &logs[i], NULL));
    for (int s = 0; s < 5; ++s) assert_true(fabs(logs[i].loss[s] - logs[0].loss[s]) < 1e-10);
  }
  assert_true(logs[0].loss[0] != logs[0].loss[4]);
  remove_place(&p);
}

/* A batch goes through a step in pieces, here of 1, 2 (and 1) and 3 windows: float64 differs by the
 * order of sums only, and any pieces repeat to the bit. */
static void pieces_equal_the_whole_batch(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  journal logs[4] = {0};
  for (int i = 0; i < 4; ++i) {
    attn_training_options o = small_options(&p, &text, 0);
    const int threads[4] = {1, 2, 1, 1};
    o.compute = ATTN_F64;
    o.batch = 3;
    o.length = i == 3 ? 300 : 200;
    o.steps = 4;
    assert_ok(attn_set_threads(threads[i]));
    assert_ok(attn_train(&o, record, &logs[i], NULL));
    clear_output(&p, 0);
  }
  /* The windows of 300 tokens, one at a time, against three times one by accumulation. */
  journal parts = {0};
  attn_training_options o = small_options(&p, &text, 1);
  o.compute = ATTN_F64;
  o.batch = 1;
  o.accumulation = 3;
  o.length = 300;
  o.steps = 4;
  assert_ok(attn_train(&o, record, &parts, NULL));
  assert_ok(attn_set_threads(0));
  for (int s = 0; s < 4; ++s) {
    assert_true(fabs(logs[1].loss[s] - logs[0].loss[s]) < 1e-10);
    assert_true(logs[2].loss[s] == logs[0].loss[s]);
    assert_true(fabs(parts.loss[s] - logs[3].loss[s]) < 1e-10);
  }
  assert_true(logs[0].loss[0] != logs[0].loss[3]);
  remove_place(&p);
}

/* -- What it writes -----------------------------------------------------------------------------
 */

static char *read_file(const char *path) {
  char *data;
  assert_ok(attn_file_read(path, 1 << 22, &data, NULL));
  return data;
}

static void writes_a_model_and_curves(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  char path[PATH_SIZE + 32];
  attn_training_options o = small_options(&p, &text, 0);
  o.save_dtype = ATTN_BF16;
  o.checkpoint_every = 3;
  journal seen = {0};
  attn_training_result result;
  assert_ok(attn_train(&o, record, &seen, &result));
  assert_int_equal(seen.checkpoints, 3);
  assert_true(isnan(seen.validation[2]) && isfinite(seen.validation[3]) &&
              isfinite(seen.validation[9]));
  assert_true(result.validation_loss == seen.validation[9]);

  /* The saved model predicts the validation part as the trained one did, but for bfloat16. */
  attn_model *model;
  assert_ok(test_model_load(p.output[0], ATTN_F32, &model));
  attn_model_info info;
  assert_ok(attn_model_get_info(model, &info));
  assert_int_equal(info.parameters, result.parameters);
  assert_int_equal(info.stored, ATTN_BF16);
  attn_session *session;
  assert_ok(attn_session_create(model, NULL, &session));
  assert_ok(attn_session_feed(session, (const int32_t[]){'t', 'h', 'e'}, 3));
  attn_session_destroy(session);
  attn_model_destroy(model);

  file_in(&p, 0, "loss.svg", path);
  char *svg = read_file(path);
  assert_non_null(strstr(svg, "<svg"));
  assert_non_null(strstr(svg, "validation"));
  assert_string_equal(svg + strlen(svg) - strlen("</svg>\n"), "</svg>\n");
  attn_free(svg);
  file_in(&p, 0, "loss.csv", path);
  char *csv = read_file(path);
  int lines = 0;
  for (const char *c = csv; *c; ++c) lines += *c == '\n';
  assert_int_equal(lines, 1 + 10 + 10 + 3); /* heading; smoothed, raw, validation at 4, 8, 10 */
  attn_free(csv);
  remove_place(&p);
}

/* Training goes on from a model's directory: the first loss is that of the trained model. */
static void continues_a_model(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  attn_training_options o = small_options(&p, &text, 0), tune = small_options(&p, &text, 1);
  o.steps = 40;
  attn_training_result result;
  assert_ok(attn_train(&o, NULL, NULL, &result));
  tune.config = NULL;
  tune.model = p.output[0];
  journal seen = {.stop_after = 2};
  assert_int_equal(attn_train(&tune, record, &seen, NULL), ATTN_INTERRUPTED);
  assert_true(seen.loss[0] < 3);
  assert_ok(attn_train(&tune, NULL, NULL, NULL));

  /* Other starting weights are another run. */
  clear_output(&p, 0);
  o.steps = 5;
  assert_ok(attn_train(&o, NULL, NULL, NULL));
  assert_int_equal(attn_train(&tune, NULL, NULL, NULL), ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "starting_weights"));
  tune.output = p.output[0];
  assert_int_equal(attn_train(&tune, NULL, NULL, NULL), ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "output directory"));
  remove_place(&p);
}

/* After the first steps nothing is allocated any more. */
static void a_step_allocates_nothing(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  for (int i = 0; i < 2; ++i) {
    attn_training_options o = small_options(&p, &text, i);
    o.validation_every = 0;
    o.checkpoint_activations = i == 1;
    o.accumulation = 2;
    journal seen = {0};
    assert_ok(attn_train(&o, record, &seen, NULL));
    assert_true(seen.allocations[8] == seen.allocations[3]);
  }
  remove_place(&p);
}

/* -- What it refuses ----------------------------------------------------------------------------
 */

static void other_runs_are_refused(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  attn_training_options o = small_options(&p, &text, 0);
  o.start = ATTN_START_RESUME;
  assert_int_equal(attn_train(&o, NULL, NULL, NULL), ATTN_NOT_FOUND);
  o.start = ATTN_START_AUTO;
  journal seen = {.stop_after = 3};
  assert_int_equal(attn_train(&o, record, &seen, NULL), ATTN_INTERRUPTED);

  attn_training_options other[] = {o, o, o, o, o, o, o};
  other[0].seed = 2;
  other[1].batch = 3;
  other[2].learning_rate = 1.0000000001e-2;
  other[3].schedule = "wsd";
  other[4].compute = ATTN_BF16;
  other[5].config = small_config("softmax"); /* the text is shared: see below */
  other[6].validation_fraction = 0.2;
  static const char *const differences[] = {"seed was 1, now 2",
                                            "batch was 2, now 3",
                                            "learning_rate was 0.01, now 0.010000000001",
                                            "schedule was cosine, now wsd",
                                            "compute was float32, now bfloat16",
                                            "mixer was \"lightning\", now \"softmax\"",
                                            "training_bytes was 1620, now 1440"};
  for (int i = 0; i < 7; ++i) {
    other[i].config = small_config(i == 5 ? "softmax" : "lightning");
    assert_int_equal(attn_train(&other[i], NULL, NULL, NULL), ATTN_INVALID_ARGUMENT);
    if (!strstr(attn_error_message(), differences[i]))
      fail_msg("expected \"%s\" in: %s", differences[i], attn_error_message());
  }
  o.config = small_config("lightning");
  write_text(p.text, "the quick brown fax jumps over the lazy dog. ", 40); /* as long */
  assert_int_equal(attn_train(&o, NULL, NULL, NULL), ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "text was"));
  o.start = ATTN_START_FRESH;
  attn_training_result result;
  assert_ok(attn_train(&o, NULL, NULL, &result));
  assert_int_equal(result.first_step, 0);
  remove_place(&p);
}

static void damaged_checkpoints_are_refused(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  char path[PATH_SIZE + 32], model[PATH_SIZE + 32];
  attn_training_options o = small_options(&p, &text, 0);
  journal seen = {.stop_after = 3};
  assert_int_equal(attn_train(&o, record, &seen, NULL), ATTN_INTERRUPTED);
  file_in(&p, 0, "training.safetensors", path);
  file_in(&p, 0, "model.safetensors", model);
  char *data, *foreign;
  size_t size, foreign_size;
  assert_ok(attn_file_read(path, 1 << 22, &data, &size));
  assert_ok(attn_file_read(model, 1 << 22, &foreign, &foreign_size));
  const size_t cuts[] = {0, 7, 100, size / 2, size - 1};
  for (size_t i = 0; i < sizeof cuts / sizeof *cuts; ++i) {
    assert_ok(attn_file_write(path, data, cuts[i]));
    assert_int_equal(attn_train(&o, NULL, NULL, NULL), ATTN_BAD_FORMAT);
  }
  assert_ok(attn_file_write(path, foreign, foreign_size));
  assert_int_equal(attn_train(&o, NULL, NULL, NULL), ATTN_BAD_FORMAT);
  assert_non_null(strstr(attn_error_message(), "training checkpoint"));
  assert_ok(attn_file_write(path, data, size));
  assert_ok(attn_train(&o, NULL, NULL, NULL));
  attn_free(data);
  attn_free(foreign);
  remove_place(&p);
}

/* Every file operation fails once; what was written before stays good. */
static void io_faults_lose_nothing(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  attn_training_options a = small_options(&p, &text, 0), b = small_options(&p, &text, 1);
  a.steps = b.steps = 6;
  a.validation_every = b.validation_every = 0;
  b.checkpoint_every = 2;
  assert_ok(attn_train(&a, NULL, NULL, NULL));
  journal seen = {.stop_after = 3};
  assert_int_equal(attn_train(&b, record, &seen, NULL), ATTN_INTERRUPTED);
  char path[PATH_SIZE + 32], *whole;
  size_t size;
  file_in(&p, 1, "training.safetensors", path);
  assert_ok(attn_file_read(path, 1 << 22, &whole, &size));
  bool hit = true;
  int faults = 0;
  for (int skip = 0; hit; skip += 1 + skip / 16) { /* each of the first ones, then fewer */
    assert_ok(attn_file_write(path, whole, size));
    attn_fault_arm(ATTN_FAULT_IO, skip);
    attn_status status = attn_train(&b, NULL, NULL, NULL);
    hit = attn_fault_disarm(ATTN_FAULT_IO);
    if (hit) {
      ++faults;
      assert_true(status == ATTN_IO_ERROR || status == ATTN_BAD_FORMAT);
      seen = (journal){0};
      assert_ok(attn_train(&b, record, &seen, NULL)); /* from whatever checkpoint is there */
    } else {
      assert_ok(status);
    }
    assert_same_checkpoints(&p);
  }
  assert_true(faults > 10);
  attn_free(whole);
  remove_place(&p);
}

/* Periodic checkpoints that fail are a warning: the run goes on. */
static bool fill_disk(void *context, const attn_training_progress *p) {
  if (p->step == 3) attn_fault_arm(ATTN_FAULT_IO, 0);
  if (p->step == 4) attn_fault_disarm(ATTN_FAULT_IO);
  return record(context, p);
}

static void a_full_disk_for_a_while(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  attn_training_options o = small_options(&p, &text, 0);
  o.checkpoint_every = 2;
  journal seen = {0};
  assert_ok(attn_train(&o, fill_disk, &seen, NULL));
  assert_int_equal(seen.warnings, 2); /* after step 4 and 5, until step 6 succeeds */
  assert_int_equal(seen.checkpoints, 3);
  remove_place(&p);
}

static void out_of_memory_is_an_error(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  attn_training_options o = small_options(&p, &text, 0);
  o.steps = 2;
  o.length = 8;
  assert_ok(attn_train(&o, NULL, NULL, NULL)); /* what is kept for the process is there now */
  size_t live = attn_memory_get_stats().live_bytes;
  bool hit = true;
  o.start = ATTN_START_FRESH;
  for (int skip = 0; hit; skip += 1 + skip / 24) {
    attn_fault_arm(ATTN_FAULT_ALLOC, skip);
    attn_status status = attn_train(&o, NULL, NULL, NULL);
    hit = attn_fault_disarm(ATTN_FAULT_ALLOC);
    assert_int_equal(status, hit ? ATTN_OUT_OF_MEMORY : ATTN_OK);
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
  }
  remove_place(&p);
}

/* A learning rate without measure: steps that are not finite are skipped, then it stops. */
static void divergence_stops(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  attn_training_options o = small_options(&p, &text, 0);
  o.learning_rate = 1e30;
  o.schedule = "constant";
  o.warmup = 0;
  o.steps = 30;
  journal seen = {0};
  attn_training_result result;
  assert_int_equal(attn_train(&o, record, &seen, &result), ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "learning rate"));
  assert_int_equal(seen.skipped, 4);
  assert_true(result.steps < 30);
  remove_place(&p);
}

static void bad_options_are_refused(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text, *missing = "/nonexistent/text";
  enum { CASES = 23 };
  attn_training_options o[CASES];
  for (int i = 0; i < CASES; ++i) o[i] = small_options(&p, &text, 0);
  int n = 0;
  const char *words[CASES];
#define CASE(change, word) (o[n].change, words[n++] = (word))
  CASE(struct_size = 3, "struct_size");
  CASE(steps = 0, "steps");
  CASE(batch = -1, "batch");
  CASE(length = 0, "length");
  CASE(length = INT64_MAX, "length");
  CASE(accumulation = 0, "accumulation");
  CASE(batch = INT32_MAX, "tokens a step");
  CASE(warmup = 11, "warmup");
  CASE(schedule = "linear", "linear");
  CASE(learning_rate = NAN, "learning rate");
  CASE(learning_rate = -1, "learning rate");
  CASE(final_rate = 2, "floor");
  CASE(beta2 = 1, "beta2");
  CASE(clip = -1, "clip");
  CASE(validation_fraction = 1, "validation fraction");
  CASE(length = 1620, "tokens to train on");
  CASE(output = NULL, "output");
  CASE(data_count = 0, "text");
  CASE(task = "mqar", "both");
  CASE(task = "recite", "recite");
  CASE(data = &missing, missing);
  CASE(config = "{", "configuration");
  CASE(config = "{\"vocab_size\": 100, \"hidden_size\": 8, \"num_hidden_layers\": 1, "
                "\"num_attention_heads\": 1}",
       "vocabulary");
#undef CASE
  assert_int_equal(n, CASES);
  size_t live = attn_memory_get_stats().live_bytes;
  for (int i = 0; i < CASES; ++i) {
    attn_status status = attn_train(&o[i], NULL, NULL, NULL);
    if (status == ATTN_OK || !strstr(attn_error_message(), words[i]))
      fail_msg("case %d: expected \"%s\" in: %s", i, words[i], attn_error_message());
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
  }
  assert_int_equal(attn_train(NULL, NULL, NULL, NULL), ATTN_INVALID_ARGUMENT);
  attn_training_options both = small_options(&p, &text, 0);
  both.model = p.directory;
  assert_int_equal(attn_train(&both, NULL, NULL, NULL), ATTN_INVALID_ARGUMENT);
  remove_place(&p);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(loss_falls_for_every_mixer),
      cmocka_unit_test(dtypes_agree),
      cmocka_unit_test(losses_follow_the_processor),
      cmocka_unit_test(resumed_equals_uninterrupted),
      cmocka_unit_test(tasks_are_learnt),
      cmocka_unit_test(flag_stops),
      cmocka_unit_test(checkpointing_changes_no_bit),
      cmocka_unit_test(accumulation_equals_a_larger_batch),
      cmocka_unit_test(pieces_equal_the_whole_batch),
      cmocka_unit_test(writes_a_model_and_curves),
      cmocka_unit_test(continues_a_model),
      cmocka_unit_test(a_step_allocates_nothing),
      cmocka_unit_test(other_runs_are_refused),
      cmocka_unit_test(damaged_checkpoints_are_refused),
      cmocka_unit_test(io_faults_lose_nothing),
      cmocka_unit_test(a_full_disk_for_a_while),
      cmocka_unit_test(out_of_memory_is_an_error),
      cmocka_unit_test(divergence_stops),
      cmocka_unit_test(bad_options_are_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
