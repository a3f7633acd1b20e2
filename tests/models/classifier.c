/* LMUFormer as a host: scores against its oracle; a stream in any pieces gives those of the whole;
 * packed equals separate; gradients; it learns; files; refusals. */
#include "support/test.h"

#include "engines/dense/dense.h"
#include "models/classifier.h"
#include "oracles/lmuformer.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { INPUT = 7, CLASSES = 4, HIDDEN = 12 };

static const char *const configs[] = {
    "{\"model_type\": \"lmuformer\", \"input_size\": 7, \"num_classes\": 4, \"hidden_size\": 12, "
    "\"num_hidden_layers\": 2, \"memory_dim\": 6, \"theta\": 20}",
    "{\"model_type\": \"lmuformer\", \"input_size\": 7, \"num_classes\": 4, \"hidden_size\": 12, "
    "\"num_hidden_layers\": 2, \"memory_dim\": 9, \"theta\": 20, \"spiking\": true, "
    "\"spike_threshold\": 0.5}"};

/* Weights and statistics away from where they begin, so that everything matters. */
static attn_classifier *make(int kind, attn_dtype compute) {
  attn_classifier *c;
  assert_ok(attn_classifier_create(configs[kind], 3, compute, &c));
  for (int64_t i = 0; i < c->list.count; ++i) {
    attn_parameter *p = &c->list.parameters[i];
    int64_t count = attn_tensor_count(&p->value);
    double *x = malloc((size_t)count * sizeof *x);
    bool one = c->list.shapes[i].initial == ATTN_INIT_CONSTANT && c->list.shapes[i].scale == 1;
    test_fill_normal(x, count, 0, p->weight ? 1.5 / sqrt((double)p->value.shape[1]) : 0.3,
                     40 + (uint64_t)i);
    for (int64_t j = 0; j < count; ++j) x[j] = (float)(one ? exp(x[j]) : x[j]);
    attn_tensor from;
    assert_ok(attn_tensor_wrap(x, ATTN_F64, p->value.rank, p->value.shape, &from));
    assert_ok(attn_tensor_copy(&from, &p->value));
    if (p->weight) assert_ok(attn_weight_set(p->weight, &p->value));
    free(x);
  }
  return c;
}

static float *make_frames(int64_t rows, uint64_t seed) {
  double *x = malloc((size_t)(rows * INPUT) * sizeof *x);
  float *f = malloc((size_t)(rows * INPUT) * sizeof *f);
  test_fill_normal(x, rows * INPUT, 0, 1, seed);
  for (int64_t i = 0; i < rows * INPUT; ++i) f[i] = (float)x[i];
  free(x);
  return f;
}

static double distance(const float *a, const float *b, int64_t count) {
  double x[64], y[64];
  assert_true(count <= 64);
  for (int64_t i = 0; i < count; ++i) x[i] = a[i], y[i] = b[i];
  return test_relative_error(x, y, count);
}

/* The oracle ------------------------------------------------------------------------------------
 */

typedef struct values {
  const attn_classifier *c;
  double **all;
  const double *mixer[ATTN_MIXER_PARAMETERS];
} values;

static const double *by_name(void *context, const char *name) {
  values *v = context;
  for (int64_t i = 0; i < v->c->list.count; ++i)
    if (strcmp(v->c->list.parameters[i].name, name) == 0) return v->all[i];
  fail_msg("there is no %s", name);
  return NULL;
}

static const double *const *of_mixer(void *context, int64_t layer) {
  values *v = context;
  attn_parameter_shape shapes[ATTN_MIXER_PARAMETERS];
  int count = v->c->mixer->parameters(&v->c->options, shapes);
  for (int i = 0; i < count; ++i)
    v->mixer[i] = v->all[v->c->layers[layer].mixer[i] - v->c->list.parameters];
  return v->mixer;
}

static void equals_oracle(void **state) {
  (void)state;
  for (int kind = 0; kind < 2; ++kind) {
    attn_classifier *c = make(kind, ATTN_F64);
    values v = {.c = c, .all = malloc((size_t)c->list.count * sizeof *v.all)};
    for (int64_t i = 0; i < c->list.count; ++i)
      v.all[i] = test_to_doubles(&c->list.parameters[i].value);
    oracle_lmuformer o = {.input = INPUT,
                          .hidden = HIDDEN,
                          .width = 4 * HIDDEN,
                          .classes = CLASSES,
                          .layers = 2,
                          .spiking = kind,
                          .epsilon = 1e-5,
                          .mixer = c->options,
                          .values = by_name,
                          .mixer_values = of_mixer,
                          .context = &v};
    const int64_t lengths[] = {1, 2, 5, 50};
    for (int l = 0; l < 4; ++l) {
      float *frames = make_frames(lengths[l], 9 + (uint64_t)l), scores[CLASSES];
      double *x = malloc((size_t)(lengths[l] * INPUT) * sizeof *x), expected[CLASSES], rate;
      for (int64_t i = 0; i < lengths[l] * INPUT; ++i) x[i] = frames[i];
      attn_frames f = {.values = frames, .rows = lengths[l], .sequences = 1};
      assert_ok(attn_classifier_run(c, &f, scores, &rate));
      oracle_lmuformer_scores(&o, lengths[l], x, expected);
      double got[CLASSES];
      for (int k = 0; k < CLASSES; ++k) got[k] = scores[k];
      double error = test_relative_error(got, expected, CLASSES);
      if (!(error < 1e-6)) /* scores are float32 */
        fail_msg("kind %d, %d frames: off by %g", kind, (int)lengths[l], error);
      if (kind && l == 3) assert_true(rate > 0.02 && rate < 0.98);
      if (!kind) assert_true(rate == 0);
      free(x), free(frames);
    }
    for (int64_t i = 0; i < c->list.count; ++i) free(v.all[i]);
    free(v.all);
    attn_classifier_destroy(c);
  }
}

/* Streams ---------------------------------------------------------------------------------------
 */

static void streams_equal_the_whole(void **state) {
  (void)state;
  const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32, ATTN_BF16};
  const double limits[] = {1e-6, 1e-4, 5e-2};
  const int64_t lengths[] = {1, 2, 3, 4, 6, 60}, pieces[] = {1, 2, 7, 60};
  for (int i = 0; i < 2 * 3 * 6 * 4; ++i) {
    int kind = i % 2, d = i / 2 % 3;
    int64_t length = lengths[i / 6 % 6], piece = pieces[i / 36];
    /* Spikes flip at bfloat16's roundings of other products; what is summed there is not compared.
     */
    if (kind && dtypes[d] == ATTN_BF16) continue;
    attn_classifier *c = make(kind, dtypes[d]);
    attn_classifier_stream *s;
    float *frames = make_frames(length, 20 + (uint64_t)length), whole[CLASSES], scores[CLASSES];
    attn_frames f = {.values = frames, .rows = length, .sequences = 1};
    assert_ok(attn_classifier_run(c, &f, whole, NULL));
    assert_ok(attn_classifier_stream_create(c, &s));
    for (int again = 0; again < 2; ++again) {
      for (int64_t t = 0; t < length; t += piece) {
        int64_t count = length - t < piece ? length - t : piece;
        assert_ok(attn_classifier_stream_feed(s, frames + t * INPUT, count));
        int64_t known = t + count - 5;
        assert_int_equal(attn_classifier_stream_counted(s), known > 0 ? known : 0);
      }
      assert_ok(attn_classifier_stream_finish(s));
      assert_int_equal(attn_classifier_stream_counted(s), length);
      attn_classifier_stream_scores(s, scores);
      double error = distance(scores, whole, CLASSES);
      if (!(error < limits[d]))
        fail_msg("kind %d, %s, %d frames by %d: off by %g", kind, attn_dtype_name(dtypes[d]),
                 (int)length, (int)piece, error);
      int64_t best;
      double confidence = attn_classifier_stream_confidence(s, &best), sum = 0;
      for (int k = 0; k < CLASSES; ++k) sum += exp((double)scores[k] - scores[best]);
      assert_true(fabs(confidence - 1 / sum) < 1e-5);
      assert_int_equal(attn_classifier_stream_feed(s, frames, 1), ATTN_INVALID_ARGUMENT);
      attn_classifier_stream_clear(s);
    }
    assert_int_equal(attn_classifier_stream_finish(s), ATTN_INVALID_ARGUMENT);
    attn_classifier_stream_destroy(s);
    attn_classifier_destroy(c);
    free(frames);
  }
}

static void packed_equals_separate(void **state) {
  (void)state;
  const int32_t offsets[] = {0, 30, 31, 75, 80};
  for (int kind = 0; kind < 2; ++kind) {
    attn_classifier *c = make(kind, ATTN_F64);
    float *frames = make_frames(80, 5), packed[4 * CLASSES], alone[4 * CLASSES];
    attn_frames f = {.values = frames, .rows = 80, .sequences = 4, .offsets = offsets};
    assert_ok(attn_classifier_run(c, &f, packed, NULL));
    for (int b = 0; b < 4; ++b) {
      attn_frames one = {.values = frames + offsets[b] * INPUT,
                         .rows = offsets[b + 1] - offsets[b],
                         .sequences = 1};
      assert_ok(attn_classifier_run(c, &one, alone + b * CLASSES, NULL));
    }
    assert_true(distance(packed, alone, 4 * CLASSES) < 1e-6);
    attn_classifier_destroy(c);
    free(frames);
  }
}

/* Training --------------------------------------------------------------------------------------
 */

/* Of the loss in training, statistics of the batch included, with both losses. A rate of 0 leaves
 * weights and gradients as they are. */
static void gradients_equal_differences(void **state) {
  (void)state;
  for (int loss = 0; loss < 2; ++loss) {
    attn_classifier *c = make(0, ATTN_F64);
    attn_classifier_training options = ATTN_CLASSIFIER_TRAINING_INIT;
    attn_classifier_trainer *t;
    options.loss = (attn_class_loss)loss;
    assert_ok(attn_classifier_trainer_create(c, &options, &t));
    const int32_t offsets[] = {0, 9, 20, 40}, labels[] = {1, 3, 0};
    float *frames = make_frames(40, 6);
    attn_frames f = {.values = frames, .rows = 40, .sequences = 3, .offsets = offsets};
    double value, above, below;
    const double h = 1e-6;
    double *gradients[256];
    assert_in_range(c->list.count, 1, 256);
    assert_ok(attn_classifier_train(t, &f, labels, 0, &value));
    for (int64_t i = 0; i < c->list.count; ++i)
      gradients[i] = test_to_doubles(&c->list.parameters[i].gradient);
    for (int64_t i = 0; i < c->list.count; ++i) {
      attn_parameter *p = &c->list.parameters[i];
      if (p->statistic) continue;
      int64_t at = attn_tensor_count(&p->value) / 2;
      double *number = (double *)p->value.data + at, before = *number;
      *number = before + h;
      if (p->weight) assert_ok(attn_weight_set(p->weight, &p->value));
      assert_ok(attn_classifier_train(t, &f, labels, 0, &above));
      *number = before - h;
      if (p->weight) assert_ok(attn_weight_set(p->weight, &p->value));
      assert_ok(attn_classifier_train(t, &f, labels, 0, &below));
      *number = before;
      if (p->weight) assert_ok(attn_weight_set(p->weight, &p->value));
      double slope = (above - below) / (2 * h);
      if (!(fabs(slope - gradients[i][at]) < 1e-6))
        fail_msg("the gradient of %s is %.9g, by differences %.9g", p->name, gradients[i][at],
                 slope);
    }
    for (int64_t i = 0; i < c->list.count; ++i) free(gradients[i]);
    attn_classifier_trainer_destroy(t);
    attn_classifier_destroy(c);
    free(frames);
  }
}

/* Which of four tones a noisy sequence has. */
static void make_tones(int64_t count, int64_t length, uint64_t seed, float *frames,
                       int32_t *labels) {
  double *noise = malloc((size_t)(count * length * INPUT) * sizeof *noise);
  test_fill_normal(noise, count * length * INPUT, 0, 0.5, seed);
  for (int64_t b = 0; b < count; ++b) {
    labels[b] = (int32_t)((b * 7 + (int64_t)seed) % CLASSES);
    for (int64_t t = 0; t < length; ++t)
      for (int c = 0; c < INPUT; ++c) {
        int64_t i = (b * length + t) * INPUT + c;
        frames[i] = (float)(noise[i] + sin(0.3 * (labels[b] + 1) * (double)t + (double)b));
      }
  }
  free(noise);
}

static double accuracy(attn_classifier *c, const attn_frames *f, const int32_t *labels) {
  float *scores = malloc((size_t)(f->sequences * CLASSES) * sizeof *scores);
  int right = 0;
  assert_ok(attn_classifier_run(c, f, scores, NULL));
  for (int64_t b = 0; b < f->sequences; ++b) {
    int best = 0;
    for (int k = 1; k < CLASSES; ++k)
      if (scores[b * CLASSES + k] > scores[b * CLASSES + best]) best = k;
    right += best == labels[b];
  }
  free(scores);
  return (double)right / (double)f->sequences;
}

static void tones_are_learnt(void **state) {
  (void)state;
  enum { COUNT = 32, LENGTH = 40 };
  float *frames = malloc(COUNT * LENGTH * INPUT * sizeof *frames);
  int32_t labels[COUNT];
  char directory[] = "/tmp/attn-classifier-XXXXXX", path[64];
  assert_non_null(mkdtemp(directory));
  for (int kind = 0; kind < 2; ++kind) {
    attn_classifier *c, *loaded;
    attn_classifier_trainer *t;
    attn_classifier_training options = ATTN_CLASSIFIER_TRAINING_INIT;
    options.loss = kind ? ATTN_CLASS_CROSS_ENTROPY : ATTN_CLASS_BINARY;
    assert_ok(attn_classifier_create(configs[kind], 1, ATTN_F32, &c));
    assert_ok(attn_classifier_trainer_create(c, &options, &t));
    attn_frames f = {.values = frames, .rows = COUNT * LENGTH, .sequences = COUNT};
    double first = 0, last = 0;
    for (int step = 0; step < 150; ++step) {
      make_tones(COUNT, LENGTH, 100 + (uint64_t)step, frames, labels);
      assert_ok(attn_classifier_train(t, &f, labels, 5e-3, step ? &last : &first));
    }
    attn_classifier_trainer_destroy(t);
    make_tones(COUNT, LENGTH, 7, frames, labels);
    double right = accuracy(c, &f, labels);
    print_message("  %s: loss %.3f to %.3f, %.0f %% right\n", kind ? "spiking" : "plain", first,
                  last, 100 * right);
    assert_true(last < first / 2 && right > 0.8);
    float before[CLASSES], after[CLASSES];
    attn_frames one = {.values = frames, .rows = LENGTH, .sequences = 1};
    assert_ok(attn_classifier_run(c, &one, before, NULL));
    assert_ok(attn_classifier_save(c, directory));
    assert_ok(attn_classifier_load(directory, ATTN_F32, &loaded));
    assert_ok(attn_classifier_run(loaded, &one, after, NULL));
    assert_memory_equal(before, after, sizeof before);
    attn_classifier_destroy(loaded);
    attn_classifier_destroy(c);
  }
  const char *const files[] = {"config.json", "model.safetensors"};
  for (int i = 0; i < 2; ++i) {
    snprintf(path, sizeof path, "%s/%s", directory, files[i]);
    unlink(path);
  }
  rmdir(directory);
  free(frames);
}

static void bad_input_is_refused(void **state) {
  (void)state;
  static const struct {
    const char *config, *says;
  } bad[] = {
      {"{\"model_type\": \"bert\", \"input_size\": 1, \"num_classes\": 2, \"hidden_size\": 4}",
       "bert"},
      {"{\"model_type\": \"lmuformer\", \"num_classes\": 2, \"hidden_size\": 4}", "input_size"},
      {"{\"model_type\": \"lmuformer\", \"input_size\": 1, \"num_classes\": 1, \"hidden_size\": 4}",
       "num_classes"},
      {"{\"model_type\": \"lmuformer\", \"input_size\": 1, \"num_classes\": 2, \"hidden_size\": 4, "
       "\"thetta\": 3}",
       "thetta"},
      {"{\"model_type\": \"lmuformer\", \"input_size\": 1, \"num_classes\": 2, \"hidden_size\": 4, "
       "\"theta\": 0.5}",
       "theta"},
      {"[]", "configuration"}};
  attn_classifier *c;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i) {
    assert_int_not_equal(attn_classifier_create(bad[i].config, 1, ATTN_F32, &c), ATTN_OK);
    assert_non_null(strstr(attn_error_message(), bad[i].says));
  }
  assert_int_equal(attn_classifier_create(configs[0], 1, ATTN_F16, &c), ATTN_UNSUPPORTED);
  assert_int_not_equal(attn_classifier_load("/nowhere", ATTN_F32, &c), ATTN_OK);
  c = make(0, ATTN_F32);
  float x[10 * INPUT] = {0}, scores[10 * CLASSES];
  const int32_t falling[] = {0, 5, 4, 10}, labels[] = {0, CLASSES};
  const attn_frames frames[] = {{x, 10, 3, NULL},
                                {x, 10, 3, falling},
                                {x, 0, 1, NULL},
                                {NULL, 10, 1, NULL},
                                {x, 10, 0, NULL}};
  for (size_t i = 0; i < sizeof frames / sizeof *frames; ++i)
    assert_int_equal(attn_classifier_run(c, &frames[i], scores, NULL), ATTN_INVALID_ARGUMENT);
  attn_classifier_trainer *t;
  attn_classifier_training options = ATTN_CLASSIFIER_TRAINING_INIT;
  options.loss = (attn_class_loss)2;
  assert_int_equal(attn_classifier_trainer_create(c, &options, &t), ATTN_INVALID_ARGUMENT);
  assert_ok(attn_classifier_trainer_create(c, NULL, &t));
  attn_frames two = {x, 10, 2, NULL};
  assert_int_equal(attn_classifier_train(t, &two, labels, 1e-3, NULL), ATTN_INVALID_ARGUMENT);
  x[3] = NAN;
  const int32_t good[] = {0, 1};
  assert_int_equal(attn_classifier_train(t, &two, good, 1e-3, NULL), ATTN_INVALID_ARGUMENT);
  attn_classifier_trainer_destroy(t);
  attn_classifier_destroy(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(equals_oracle),          cmocka_unit_test(streams_equal_the_whole),
      cmocka_unit_test(packed_equals_separate), cmocka_unit_test(gradients_equal_differences),
      cmocka_unit_test(tones_are_learnt),       cmocka_unit_test(bad_input_is_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
