/* Models whose exact attention becomes another mixer: what is copied, what is learnt and what is
 * left alone. tests/cli/test_convert.sh has the command. */
#include "support/test.h"

#include "attn/attn.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/random.h"
#include "models/model.h"
#include "training/transfer.h"

#include <ftw.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { PATH_SIZE = 96, TEXT = 4000, LENGTH = 32 };

static char place[PATH_SIZE], text[PATH_SIZE + 8];

static const char teacher_config[] =
    "{\"model_type\": \"attn_decoder\", \"vocab_size\": 256, \"hidden_size\": 24, "
    "\"num_hidden_layers\": 3, \"mixer\": \"softmax\", \"num_attention_heads\": 4, "
    "\"num_key_value_heads\": 2, \"head_dim\": 6, \"intermediate_size\": 32, \"norm_eps\": 1e-5}";

static int make_place(void **state) {
  (void)state;
  char letters[TEXT];
  attn_random random = {.seed = 3};
  for (int i = 0; i < TEXT; ++i) letters[i] = (char)('a' + attn_random_below(&random, 6));
  snprintf(place, sizeof place, "/tmp/attn-linearise-XXXXXX");
  if (!mkdtemp(place)) return -1;
  snprintf(text, sizeof text, "%s/text", place);
  FILE *file = fopen(text, "w");
  return file && fwrite(letters, 1, TEXT, file) == TEXT && fclose(file) == 0 ? 0 : -1;
}

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *at) {
  (void)info, (void)kind, (void)at;
  return remove(path);
}

static int remove_place(void **state) {
  (void)state;
  return nftw(place, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

/* A random teacher with attention that depends on more than the diagonal: its weights are larger
 * than fresh ones. */
static attn_model *make_teacher(attn_dtype compute) {
  attn_model *model;
  assert_ok(attn_model_create(teacher_config, 1, compute, &model));
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    attn_tensor *value = &model->parameters[i].value;
    if (value->rank != 2) continue;
    int64_t count = attn_tensor_count(value);
    for (int64_t e = 0; e < count; ++e)
      if (value->dtype == ATTN_F64)
        ((double *)value->data)[e] *= 10;
      else
        ((float *)value->data)[e] *= 10;
  }
  assert_ok(attn_model_refresh(model));
  return model;
}

static double loss_of(const attn_model *model) {
  int32_t tokens[120];
  double loss;
  int64_t counted;
  attn_random random = {.seed = 4};
  for (int i = 0; i < 120; ++i) tokens[i] = (int32_t)('a' + attn_random_below(&random, 6));
  assert_ok(attn_model_evaluate(model, tokens, 120, LENGTH, 0, &loss, &counted));
  return loss;
}

/* The heads of keys and values are only written out. */
static void kept_attention_is_the_same(void **state) {
  (void)state;
  attn_model *teacher = make_teacher(ATTN_F64), *student;
  bool *fresh;
  assert_ok(attn_model_replace_mixer(
      teacher, &(attn_replacement){.mixer = "hedgehog", .keep_every = 1}, 1, &student, &fresh));
  for (int64_t i = 0; i < student->parameter_count; ++i) assert_false(fresh[i]);
  assert_int_equal(student->config.layers[0].options.kv_heads, 4);
  double difference = fabs(loss_of(teacher) - loss_of(student));
  assert_true(difference < 1e-13);
  attn_free(fresh);
  attn_model_destroy(student);
  assert_ok(attn_model_replace_mixer(
      teacher, &(attn_replacement){.mixer = "lawcat", .keep_every = 2}, 1, &student, &fresh));
  assert_int_equal(student->config.layers[0].options.kv_heads, 2); /* it has a use for them */
  assert_string_equal(student->config.layers[0].mixer->info.name, "lawcat");
  assert_string_equal(student->config.layers[1].mixer->info.name, "softmax");
  assert_string_equal(student->config.layers[2].mixer->info.name, "lawcat");
  attn_free(fresh);
  attn_model_destroy(student);
  attn_model_destroy(teacher);
}

#define FAMILY(name) ATTN_SOURCE_DIR "/tests/models/fixtures/families/" name

static double loss_of_family(const attn_model *model) {
  enum { TOKENS = 60 };
  int32_t tokens[TOKENS];
  double loss;
  int64_t counted;
  for (int i = 0; i < TOKENS; ++i) tokens[i] = (7 * i + i * i) % 96; /* of their vocabularies */
  assert_ok(attn_model_evaluate(model, tokens, TOKENS, TOKENS, 0, &loss, &counted));
  return loss;
}

/* Biases, normalised heads and stretched positions stay: LoLCATs with a window over everything, in
 * any number of layers, is the model itself, also when it has been written and read again. */
static void families_are_kept(void **state) {
  static const char *const families[] = {FAMILY("llama"),
                                         FAMILY("llama/model.gguf"),
                                         FAMILY("llama_tied"),
                                         FAMILY("llama_tied/model.gguf"),
                                         FAMILY("llama_yarn"),
                                         FAMILY("qwen2"),
                                         FAMILY("qwen2/model.gguf"),
                                         FAMILY("qwen3"),
                                         FAMILY("qwen3_yarn")};
  static const attn_replacement replacements[] = {
      {.mixer = "lolcats", .window = 32},
      {.mixer = "lolcats", .window = 60, .window_kind = ATTN_WINDOW_SLIDING, .keep_every = 2},
      {.mixer = "hedgehog", .keep_every = 1}}; /* with a head of keys for every query head */
  enum { REPLACEMENTS = sizeof replacements / sizeof *replacements };
  (void)state;
  for (size_t i = 0; i < REPLACEMENTS * sizeof families / sizeof *families; ++i) {
    attn_model *teacher, *student, *again;
    bool *fresh;
    char path[2 * PATH_SIZE];
    const char *family = families[i / REPLACEMENTS];
    assert_ok(attn_model_load(family, ATTN_F64, &teacher));
    assert_ok(
        attn_model_replace_mixer(teacher, &replacements[i % REPLACEMENTS], 1, &student, &fresh));
    double loss = loss_of_family(teacher), difference = fabs(loss_of_family(student) - loss);
    if (!(difference < 1e-12)) fail_msg("%s: the loss moved by %g", family, difference);
    snprintf(path, sizeof path, "%s/family-%zu", place, i);
    assert_ok(attn_model_save(student, path, ATTN_F32));
    assert_ok(attn_model_load(path, ATTN_F64, &again));
    difference = fabs(loss_of_family(again) - loss);
    if (!(difference < 1e-5)) fail_msg("%s, read again: %g", family, difference);
    attn_free(fresh);
    attn_model_destroy(teacher);
    attn_model_destroy(student);
    attn_model_destroy(again);
  }
}

/* Of the bits of a parameter. */
static uint64_t bits_of(const attn_parameter *parameter) {
  uint64_t sum = 0;
  attn_tensor here;
  const attn_tensor *value = &parameter->value;
  assert_ok(attn_tensor_create(value->dtype, value->rank, value->shape, &here));
  assert_ok(attn_tensor_copy(value, &here));
  const unsigned char *bytes = here.data;
  for (int64_t b = 0; b < attn_tensor_count(&here) * (int64_t)attn_dtype_size(here.dtype); ++b)
    sum = sum * 31 + bytes[b];
  attn_tensor_destroy(&here);
  return sum;
}

/* Layers are visited in order, each with an input of its own; the first one's is known. */
enum { VISITED = 8 };
typedef struct visits {
  int64_t layers;
  double first[3]; /* number of each layer's input */
} visits;

static attn_status visit(void *context, int64_t layer, const attn_tensor *in) {
  visits *v = context;
  assert_int_equal(layer, v->layers);
  assert_int_equal(in->shape[0], VISITED);
  v->first[v->layers++] = attn_tensor_get(in, (int64_t[]){3, 5});
  return ATTN_OK;
}

static void every_layer_is_visited(void **state) {
  (void)state;
  attn_model *teacher = make_teacher(ATTN_F64);
  attn_graph *graph;
  visits v = {0};
  int32_t tokens[VISITED] = {1, 2, 3, 4, 5, 6, 7, 8};
  attn_layout layout = attn_layout_equal(1, VISITED);
  const double *row = (const double *)teacher->embedding->value.data + tokens[3] * 24;
  double square = 0;
  for (int c = 0; c < 24; ++c) square += row[c] * row[c] / 24;
  assert_ok(attn_graph_create(ATTN_F64, &graph));
  assert_ok(attn_decoder_visit(graph, teacher, &layout, tokens, visit, &v));
  assert_int_equal(v.layers, 3);
  assert_true(fabs(v.first[0] - row[5] / sqrt(square + 1e-5)) < 1e-12);
  assert_true(v.first[0] != v.first[1] && v.first[1] != v.first[2]);
  attn_graph_destroy(graph);
  attn_model_destroy(teacher);
}

static attn_training_data open_data(const attn_model *model, int64_t batch) {
  const char *path = text;
  attn_training_options o = ATTN_TRAINING_OPTIONS_INIT;
  attn_training_data data;
  o.data = &path;
  o.data_count = 1;
  o.batch = batch;
  o.length = LENGTH;
  assert_ok(attn_training_data_open(&o, &data));
  assert_ok(attn_training_data_fit(&data, model));
  return data;
}

typedef struct record {
  double first, last;
  int64_t steps, most;
} record;

static bool note(void *context, int64_t step, double error) {
  record *r = context;
  if (step == 1) r->first = error;
  r->last = error;
  r->steps = step;
  return r->most == 0 || step < r->most;
}

/* What is new learns, what is old keeps its bits, and the same again gives the same. */
static void transfer(attn_replacement replacement, attn_dtype compute) {
  const char *mixer = replacement.mixer;
  attn_model *teacher = make_teacher(compute), *students[2];
  bool *fresh;
  enum { MOST = 64 };
  uint64_t before[MOST], learnt[2][MOST] = {{0}};
  attn_training_data data = open_data(teacher, 40);
  const attn_transfer_options o = {
      .steps = 60, .batch = 40, .length = LENGTH, .learning_rate = 2e-2};
  for (int i = 0; i < 2; ++i) {
    record r = {0};
    double loss;
    assert_ok(attn_model_replace_mixer(teacher, &replacement, 5, &students[i], &fresh));
    attn_model *student = students[i];
    assert_true(student->parameter_count <= MOST);
    for (int64_t p = 0; p < student->parameter_count; ++p)
      before[p] = bits_of(&student->parameters[p]);
    assert_ok(attn_model_move(student, test_device()));
    assert_ok(attn_model_move(teacher, test_device()));
    assert_ok(attn_transfer(teacher, student, fresh, &data, &o, note, &r, &loss));
    for (int64_t p = 0; p < student->parameter_count; ++p) {
      learnt[i][p] = bits_of(&student->parameters[p]);
      if ((learnt[i][p] != before[p]) != fresh[p])
        fail_msg("%s is %s", student->parameters[p].name, fresh[p] ? "not learnt" : "changed");
    }
    assert_int_equal(r.steps, 60);
    assert_true(loss == r.last);
    if (r.last > 0.6 * r.first) fail_msg("%s: error %g became %g", mixer, r.first, r.last);
    for (int64_t p = 0; p < student->parameter_count; ++p)
      assert_null(student->parameters[p].gradient.data);
    attn_free(fresh);
    attn_model_destroy(student);
    assert_ok(attn_model_move(teacher, (attn_device){0}));
  }
  assert_memory_equal(learnt[0], learnt[1], sizeof learnt[0]);
  attn_training_data_close(&data);
  attn_model_destroy(teacher);
}

static void heads_are_learnt(void **state) {
  (void)state;
  transfer((attn_replacement){.mixer = "hedgehog", .keep_every = 2}, ATTN_F32);
  transfer((attn_replacement){.mixer = "hedgehog", .keep_every = 2}, ATTN_BF16);
  transfer((attn_replacement){.mixer = "lawcat", .keep_every = 2}, ATTN_F32);
  attn_replacement window = {.mixer = "lolcats", .keep_every = 2, .window = 3, .feature_dim = 12};
  transfer(window, ATTN_F32);
  window.window_kind = ATTN_WINDOW_SLIDING;
  window.affine = true;
  transfer(window, ATTN_BF16);
}

static void it_can_be_stopped(void **state) {
  (void)state;
  attn_model *teacher = make_teacher(ATTN_F32), *student;
  bool *fresh;
  double loss;
  record r = {.most = 2};
  attn_training_data data = open_data(teacher, 4);
  const attn_transfer_options o = {.steps = 9, .batch = 4, .length = LENGTH, .learning_rate = 1e-2};
  assert_ok(attn_model_replace_mixer(
      teacher, &(attn_replacement){.mixer = "hedgehog", .keep_every = 0}, 5, &student, &fresh));
  assert_int_equal(attn_transfer(teacher, student, fresh, &data, &o, note, &r, &loss),
                   ATTN_INTERRUPTED);
  assert_int_equal(r.steps, 2);
  attn_free(fresh);
  attn_training_data_close(&data);
  attn_model_destroy(student);
  attn_model_destroy(teacher);
}

/* From file to file: what is written is what was measured. */
static void a_model_becomes_another(void **state) {
  (void)state;
  char from[2 * PATH_SIZE], to[2 * PATH_SIZE];
  const char *path = text;
  snprintf(from, sizeof from, "%s/teacher", place);
  snprintf(to, sizeof to, "%s/student", place);
  attn_model *teacher = make_teacher(ATTN_F32), *loaded;
  assert_ok(attn_model_save(teacher, from, ATTN_F32));
  double before = loss_of(teacher);
  attn_model_destroy(teacher);
  attn_linearise_options o = ATTN_LINEARISE_OPTIONS_INIT;
  attn_linearise_result result;
  o.model = from, o.output = to, o.mixer = "hedgehog", o.data = &path, o.data_count = 1;
  o.steps = 12, o.batch = 8, o.length = LENGTH, o.compute = ATTN_F32, o.save_dtype = ATTN_F32;
  o.validation_fraction = 0.1;
  o.device = test_device();
  assert_ok(attn_linearise(&o, NULL, NULL, &result));
  assert_int_equal(result.validation_tokens, TEXT / 10 - 1);
  assert_true(isfinite(result.loss_before) && isfinite(result.loss_after));
  assert_true(result.last_error < result.first_error);
  assert_true(result.trained > 0 && result.trained < result.parameters);
  assert_ok(attn_model_load(to, ATTN_F32, &loaded));
  assert_string_equal(attn_model_mixer(loaded, 0), "hedgehog");
  assert_true(fabs(loss_of(loaded) - before) > 1e-6);
  FILE *file = fopen(text, "r");
  int32_t tokens[TEXT / 10];
  int64_t counted;
  double loss;
  assert_non_null(file);
  assert_int_equal(fseek(file, TEXT - TEXT / 10, SEEK_SET), 0);
  for (int i = 0; i < TEXT / 10; ++i) tokens[i] = fgetc(file);
  fclose(file);
  assert_ok(attn_model_evaluate(loaded, tokens, TEXT / 10, LENGTH, 0, &loss, &counted));
  assert_true(fabs(loss - result.loss_after) < 1e-5); /* the sums of another device differ */
  attn_session_options session = ATTN_SESSION_OPTIONS_INIT;
  attn_session *s;
  assert_ok(attn_session_create(loaded, &session, &s));
  assert_ok(attn_session_feed(s, (int32_t[]){'a', 'b', 'c'}, 3));
  attn_session_destroy(s);
  attn_model_destroy(loaded);
}

static void refuse(attn_linearise_options o, const char *word) {
  assert_int_not_equal(attn_linearise(&o, NULL, NULL, NULL), ATTN_OK);
  if (!strstr(attn_error_message(), word))
    fail_msg("\"%s\" does not name %s", attn_error_message(), word);
}

static void what_cannot_be_kept_is_refused(void **state) {
  (void)state;
  const char *path = text;
  attn_linearise_options good = ATTN_LINEARISE_OPTIONS_INIT;
  char from[2 * PATH_SIZE], to[2 * PATH_SIZE];
  snprintf(from, sizeof from, "%s/teacher", place);
  snprintf(to, sizeof to, "%s/refused", place);
  good.model = from, good.output = to, good.mixer = "hedgehog", good.data = &path;
  good.data_count = 1, good.steps = 1, good.batch = 1, good.length = LENGTH;
#define REFUSE(change, word)                                                                       \
  do {                                                                                             \
    attn_linearise_options bad = good;                                                             \
    bad.change;                                                                                    \
    refuse(bad, word);                                                                             \
  } while (0)
  REFUSE(struct_size = 3, "struct_size");
  REFUSE(model = NULL, "model");
  REFUSE(mixer = "porcupine", "porcupine");
  REFUSE(mixer = "kda", "kda");
  REFUSE(data_count = 0, "text");
  REFUSE(keep_every = -1, "keep_every");
  REFUSE(length = 0, "length");
  REFUSE(length = TEXT, "tokens");
  REFUSE(learning_rate = -1, "rate");
  good.mixer = "lawcat";
  REFUSE(model = FAMILY("qwen2"), "q_proj.bias, which lawcat has not");
  REFUSE(model = FAMILY("qwen3"), "q_norm.weight, which lawcat has not");
  good.mixer = "hedgehog";
  REFUSE(window = 32, "window");
  REFUSE(sliding = true, "window");
  REFUSE(affine = true, "window");
  REFUSE(window = -1, "window");
  REFUSE(feature_dim = -1, "feature_dim");
  REFUSE(feature_dim = 129, "feature_dim");
  REFUSE(model = FAMILY("gemma2"), "norms");
  REFUSE(model = FAMILY("mixtral"), "experts");
  REFUSE(model = FAMILY("kimi_linear"), "cannot be kept");
  REFUSE(model = to, to); /* nothing has been written there */
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(kept_attention_is_the_same),
      cmocka_unit_test(families_are_kept),
      cmocka_unit_test(every_layer_is_visited),
      cmocka_unit_test(heads_are_learnt),
      cmocka_unit_test(it_can_be_stopped),
      cmocka_unit_test(a_model_becomes_another),
      cmocka_unit_test(what_cannot_be_kept_is_refused),
  };
  return cmocka_run_group_tests(tests, make_place, remove_place);
}
