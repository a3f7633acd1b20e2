/* Adapters of whole models: what they change, training of them alone, their files. */
#include "support/models.h"
#include "support/test.h"

#include "attn/attn.h"
#include "base/fault.h"
#include "base/io.h"
#include "base/memory.h"
#include "files/json.h"
#include "files/safetensors.h"
#include "models/lora.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { PATH_SIZE = 128, LONG_PATH = 256, VOCABULARY = 96, TOKENS = 30 };
static const char *const kinds[] = {"lora", "rslora", "dora"};
enum { KINDS = 3 };

/* Models of families --------------------------------------------------------------------------- */

/* Dense, fused, latent and linear attention, experts; numbers, float8 and blocks. */
static const struct {
  const char *name, *file;
} subjects[] = {
    {"llama", ""},
    {"llama", "/model.q8_0.gguf"},
    {"gemma2", ""},
    {"mixtral", ""},
    {"minimax", ""},
    {"qwen3_next", ""},
    {"deepseek_v3", ""},
    {"deepseek_v3_fp8", ""},
    {"kimi_linear", ""},
    {"llama_float8", ""},
    {"qwen3_next_gguf", "/model.q8_0.gguf"},
};
enum { SUBJECTS = sizeof subjects / sizeof *subjects };

static const char *path_of(int subject) {
  static char path[512];
  snprintf(path, sizeof path, "%s/tests/models/fixtures/families/%s%s", ATTN_SOURCE_DIR,
           subjects[subject].name, subjects[subject].file);
  return path;
}

static bool is_product_of_layer(const attn_model *model, int64_t i) {
  return model->shapes[i].product && strncmp(model->shapes[i].name, "model.layers.", 13) == 0;
}

static void fill_normal(const attn_tensor *tensor, double mean, double deviation, uint64_t seed) {
  int64_t count = attn_tensor_count(tensor);
  double *numbers = malloc((size_t)count * sizeof *numbers);
  test_fill_normal(numbers, count, mean, deviation, seed);
  attn_tensor from;
  assert_ok(attn_tensor_wrap(numbers, ATTN_F64, tensor->rank, tensor->shape, &from));
  assert_ok(attn_tensor_copy(&from, tensor));
  free(numbers);
}

/* Every matrix of every layer gets an adapter that changes it by something like a tenth. */
static void adapt_all(attn_model *model, attn_lora_kind kind) {
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    if (!is_product_of_layer(model, i)) continue;
    assert_ok(attn_model_adapt(model, i, kind, 2, 4, 1));
    attn_lora *lora = model->adapters[i];
    fill_normal(&lora->b.value, 0, 0.05, 100 + (uint64_t)i);
    if (kind != ATTN_LORA_DORA) continue;
    attn_tensor norms = lora->magnitude.value;
    double *m = test_to_doubles(&norms), *factors = malloc((size_t)norms.shape[0] * sizeof *m);
    test_fill_normal(factors, norms.shape[0], 1, 0.1, 200 + (uint64_t)i);
    for (int64_t j = 0; j < norms.shape[0]; ++j) m[j] *= factors[j];
    attn_tensor from;
    assert_ok(attn_tensor_wrap(m, ATTN_F64, 1, norms.shape, &from));
    assert_ok(attn_tensor_copy(&from, &norms));
    free(m);
    free(factors);
  }
  assert_ok(attn_model_refresh(model));
}

static void fill_tokens(int32_t *tokens, int64_t count, int64_t vocabulary) {
  for (int64_t i = 0; i < count; ++i) tokens[i] = (int32_t)((7 * i * i + 3 * i + 5) % vocabulary);
}

static double loss_of(const attn_model *model) {
  int32_t tokens[TOKENS];
  double loss;
  int64_t counted;
  fill_tokens(tokens, TOKENS, model->config.vocabulary);
  assert_ok(attn_model_evaluate(model, tokens, TOKENS, 0, 0, &loss, &counted));
  return loss;
}

/* The logits after a prompt that is read at once and some tokens that are read one by one. */
static double *session_logits(const attn_model *model) {
  enum { AT_ONCE = TOKENS - 4 };
  int32_t tokens[TOKENS];
  int64_t vocabulary = model->config.vocabulary;
  double *logits = malloc((size_t)vocabulary * sizeof *logits);
  attn_session *session;
  fill_tokens(tokens, TOKENS, vocabulary);
  assert_ok(attn_session_create(model, NULL, &session));
  assert_ok(attn_session_feed(session, tokens, AT_ONCE));
  for (int i = AT_ONCE; i < TOKENS; ++i) assert_ok(attn_session_feed(session, tokens + i, 1));
  for (int64_t i = 0; i < vocabulary; ++i) logits[i] = attn_session_logits(session)[i];
  attn_session_destroy(session);
  return logits;
}

/* In every kind of layer and every form of weights, in windows and in sessions. float64 differs by
 * the order of sums; float32 by roundings that the delta rule and routers amplify, as in
 * families.c. */
static void unmerged_equals_merged(void **state) {
  (void)state;
  for (int s = 0; s < SUBJECTS; ++s)
    for (int kind = ATTN_LORA_PLAIN; kind <= ATTN_LORA_DORA; kind += ATTN_LORA_DORA) {
      attn_model *models[2];
      double loss[2], base;
      for (int merged = 0; merged < 2; ++merged) {
        assert_ok(attn_model_load(path_of(s), ATTN_F64, &models[merged]));
        if (!merged) base = loss_of(models[0]);
        adapt_all(models[merged], (attn_lora_kind)kind);
        if (merged) assert_ok(attn_model_merge_lora(models[merged]));
        assert_int_equal(models[merged]->adapters == NULL, merged);
        assert_ok(attn_model_move(models[merged], test_device()));
        loss[merged] = loss_of(models[merged]);
      }
      print_message("  %s%s, %s: loss %.6f, without %.6f\n", subjects[s].name, subjects[s].file,
                    kinds[kind], loss[0], base);
      assert_true(fabs(loss[0] - loss[1]) < 1e-10 * loss[1]);
      assert_true(fabs(loss[0] - base) > 1e-6);
      double *unmerged = session_logits(models[0]), *merged = session_logits(models[1]);
      double error = test_relative_error(unmerged, merged, models[0]->config.vocabulary);
      if (!(error < 1e-6)) fail_msg("%s: logits of a session differ by %g", path_of(s), error);
      free(unmerged);
      free(merged);
      for (int i = 0; i < 2; ++i) attn_model_destroy(models[i]);
    }
}

/* Which matrices --------------------------------------------------------------------------------
 */

/* Blocks and windows are shorter than the sequences here. */
static const char *small_config(const char *mixer) {
  static char text[512];
  snprintf(text, sizeof text,
           "{\"vocab_size\": 256, \"hidden_size\": 32, \"num_hidden_layers\": 2, \"mixer\": "
           "\"%s\", \"num_attention_heads\": 2, \"intermediate_size\": 64, \"block_size\": 4}",
           mixer);
  return text;
}

static attn_model *small_model(const char *mixer) {
  attn_model *model;
  assert_ok(attn_model_create(small_config(mixer), 1, ATTN_F32, &model));
  return model;
}

static attn_lora_options options_for(attn_lora_kind kind, const char *const *targets, int count) {
  attn_lora_options o = ATTN_LORA_OPTIONS_INIT;
  o.kind = kind;
  o.rank = 4;
  o.targets = targets;
  o.target_count = count;
  return o;
}

static int count_adapters(const attn_model *model) {
  int count = 0;
  for (int64_t i = 0; model->adapters && i < model->parameter_count; ++i)
    count += model->adapters[i] != NULL;
  return count;
}

static int64_t count_trained(const attn_model *model) {
  attn_parameter **list = malloc((size_t)attn_model_count_all(model) * sizeof *list);
  int64_t count = attn_model_list_trained(model, list);
  free(list);
  return count;
}

static void names_find_matrices(void **state) {
  (void)state;
  assert_true(attn_lora_names("model.layers.0.self_attn.q_proj.weight", "q_proj"));
  assert_true(attn_lora_names("model.layers.0.self_attn.q_proj.weight", "self_attn.q_proj"));
  assert_true(attn_lora_names("q_proj.weight", "q_proj"));
  assert_true(attn_lora_names("model.layers.0.self_attn.q_proj.bias", "q_proj"));
  assert_false(attn_lora_names("model.layers.0.self_attn.q_proj.weight", "proj"));
  assert_false(attn_lora_names("model.layers.0.self_attn.q_proj.weight", "q_proj.weight.x"));
  assert_false(attn_lora_names("model.layers.0.self_attn.q_proj.weight", ""));
  static const char *const two[] = {"q_proj", "l3"}, *const all[] = {"all"};
  const struct {
    const char *const *targets;
    int count, expected;
  } cases[] = {{NULL, 0, 2 * 4}, {two, 2, 2 * 2}, {all, 1, 2 * 7}};
  for (size_t c = 0; c < sizeof cases / sizeof *cases; ++c)
    for (int kind = 0; kind < KINDS; ++kind) {
      attn_model *model = small_model("softmax");
      attn_lora_options o = options_for((attn_lora_kind)kind, cases[c].targets, cases[c].count);
      assert_ok(attn_model_attach_lora(model, &o, 1));
      assert_int_equal(count_adapters(model), cases[c].expected);
      assert_int_equal(count_trained(model), cases[c].expected * (kind == ATTN_LORA_DORA ? 3 : 2));
      for (int64_t i = 0; i < model->parameter_count; ++i)
        assert_null(model->parameters[i].gradient.data);
      attn_model_destroy(model);
    }
}

static void assert_refused(attn_status status, attn_status expected, const char *word) {
  assert_int_equal(status, expected);
  if (!strstr(attn_error_message(), word)) fail_msg("no '%s' in: %s", word, attn_error_message());
}

static void refuses_unknown_names(void **state) {
  (void)state;
  static const char *const unknown[] = {"q_proj", "query"}, *const trained[] = {"nothing"},
                           *const norm[] = {"final_norm", "norm"}, *const adapted[] = {"q_proj"};
  attn_model *model = small_model("lightning");
  attn_lora_options o = options_for(ATTN_LORA_PLAIN, NULL, 0);
  assert_refused(attn_model_attach_lora(model, &o, 1), ATTN_INVALID_ARGUMENT, "qkvu_proj, ");
  attn_model_destroy(model);
  model = small_model("softmax");
  o = options_for(ATTN_LORA_PLAIN, unknown, 2);
  assert_refused(attn_model_attach_lora(model, &o, 1), ATTN_INVALID_ARGUMENT, "query");
  assert_refused(attn_model_attach_lora(model, &o, 1), ATTN_INVALID_ARGUMENT, "q_proj, k_proj");
  o = options_for(ATTN_LORA_PLAIN, unknown, 0);
  assert_refused(attn_model_attach_lora(model, &o, 1), ATTN_INVALID_ARGUMENT, "empty");
  o.struct_size = 3;
  assert_refused(attn_model_attach_lora(model, &o, 1), ATTN_INVALID_ARGUMENT, "struct_size");
  o = options_for(ATTN_LORA_PLAIN, NULL, 0);
  o.rank = 0;
  assert_refused(attn_model_attach_lora(model, &o, 1), ATTN_INVALID_ARGUMENT, "rank");
  attn_model_destroy(model);
  const struct {
    const char *const *names;
    const char *word;
  } others[] = {{trained, "nothing"}, {adapted, "both"}};
  for (int i = 0; i < 2; ++i) {
    model = small_model("softmax");
    o = options_for(ATTN_LORA_PLAIN, NULL, 0);
    o.trained = others[i].names;
    o.trained_count = 1;
    assert_refused(attn_model_attach_lora(model, &o, 1), ATTN_INVALID_ARGUMENT, others[i].word);
    attn_model_destroy(model);
  }
  model = small_model("softmax"); /* the norm behind the last layer, and it alone */
  o.trained = norm + 1;
  assert_ok(attn_model_attach_lora(model, &o, 1));
  assert_int_equal(count_trained(model), 2 * 4 * 2 + 1);
  assert_non_null(model->final_norm[0]->gradient.data);
  attn_model_destroy(model);
  /* a matrix that the file keeps as rows of another */
  static const char *const all[] = {"all"};
  assert_ok(attn_model_load(path_of(5), ATTN_F32, &model));
  o = options_for(ATTN_LORA_PLAIN, all, 1);
  assert_refused(attn_model_attach_lora(model, &o, 1), ATTN_UNSUPPORTED, "part of the tensor");
  attn_model_destroy(model);
}

/* Gradients -------------------------------------------------------------------------------------
 */

/* The gradients of the trained parameters' loss are added to what they hold. */
static void run_backward(attn_model *model) {
  enum { SEQUENCES = 2, LENGTH = 12 };
  int32_t tokens[SEQUENCES * LENGTH], targets[SEQUENCES * LENGTH];
  attn_layout layout = attn_layout_equal(SEQUENCES, LENGTH);
  attn_graph *g;
  fill_tokens(tokens, SEQUENCES * LENGTH, model->config.vocabulary);
  for (int i = 0; i < SEQUENCES * LENGTH; ++i) targets[i] = tokens[(i + 1) % (SEQUENCES * LENGTH)];
  assert_ok(attn_graph_create_on(test_device(), model->compute, &g));
  attn_graph_reset(g, true);
  attn_var *loss = attn_decoder_loss(g, model, &layout, tokens, targets, 0, 0);
  if (!loss) fail_msg("%s", attn_error_message());
  assert_ok(attn_graph_backward(g, loss, 1));
  attn_graph_destroy(g);
}

static attn_model *float64_model(const char *mixer) {
  attn_model *model;
  assert_ok(attn_model_create(small_config(mixer), 1, ATTN_F64, &model));
  return model;
}

/* Whatever is frozen, in whatever operation: a parameter that is trained alone has the gradient
 * that it has among all. Running statistics say which function it is that is differentiated, so
 * they are as they are among all. */
static void gradients_do_not_depend_on_what_else_is_trained(void **state) {
  (void)state;
  for (int m = 0; m < attn_mixer_count(); ++m) {
    attn_mixer_info info;
    assert_ok(attn_mixer_get_info(m, &info));
    if (!(info.abilities & ATTN_ABILITY_TRAINABLE)) continue;
    attn_model *all = float64_model(info.name);
    assert_ok(attn_model_make_trainable(all));
    assert_ok(attn_model_move(all, test_device()));
    run_backward(all);
    for (int64_t i = 0; i < all->parameter_count; ++i) {
      if (all->parameters[i].statistic) continue;
      attn_model *one = float64_model(info.name);
      const attn_parameter *p = &one->parameters[i];
      assert_ok(attn_model_make_parameter_trainable(one, i));
      for (int64_t j = 0; j < one->parameter_count; ++j)
        if (one->parameters[j].statistic) assert_ok(attn_model_make_parameter_trainable(one, j));
      assert_ok(attn_model_move(one, test_device()));
      run_backward(one);
      double *got = test_to_doubles(&p->gradient);
      double *expected = test_to_doubles(&all->parameters[i].gradient);
      double error = test_relative_error(got, expected, attn_tensor_count(&p->gradient));
      if (!(error < 1e-12)) fail_msg("%s, %s alone: error %g", info.name, p->name, error);
      free(got);
      free(expected);
      attn_model_destroy(one);
    }
    attn_model_destroy(all);
  }
}

/* Training --------------------------------------------------------------------------------------
 */

typedef struct place {
  char directory[PATH_SIZE], text[PATH_SIZE], other_text[PATH_SIZE], base[PATH_SIZE];
  char output[2][PATH_SIZE];
} place;

static void write_text(const char *path, const char *line) {
  FILE *file = fopen(path, "w");
  assert_non_null(file);
  for (int i = 0; i < 40; ++i) fputs(line, file);
  assert_int_equal(fclose(file), 0);
}

static place make_place(void) {
  place p;
  snprintf(p.directory, sizeof p.directory, "/tmp/attn-lora-XXXXXX");
  assert_non_null(mkdtemp(p.directory));
  char directory[PATH_SIZE]; /* a copy: GCC takes two members of a struct for overlapping */
  memcpy(directory, p.directory, sizeof directory);
  snprintf(p.text, PATH_SIZE, "%.60s/text", directory);
  snprintf(p.base, PATH_SIZE, "%.60s/base", directory);
  for (int i = 0; i < 2; ++i) snprintf(p.output[i], PATH_SIZE, "%.60s/out%d", directory, i);
  snprintf(p.other_text, PATH_SIZE, "%.60s/other", directory);
  write_text(p.text, "the quick brown fox jumps over the lazy dog. ");
  write_text(p.other_text, "pack my box with five dozen liquor jugs, sphinx of quartz. ");
  return p;
}

static void join(const char *directory, const char *name, char path[LONG_PATH]) {
  snprintf(path, LONG_PATH, "%.200s/%.50s", directory, name);
}

static bool any_name(const char *name, const void *context) {
  (void)context;
  return name[0] != '.';
}

static void clear(const char *directory) {
  if (attn_path_exists(directory)) assert_ok(attn_directory_remove(directory, any_name, NULL));
  rmdir(directory);
}

static void remove_place(const place *p) {
  clear(p->base);
  for (int i = 0; i < 2; ++i) clear(p->output[i]);
  unlink(p->text);
  unlink(p->other_text);
  assert_int_equal(rmdir(p->directory), 0); /* so that no temporary is left either */
}

static void save_base(const place *p, const char *config, attn_dtype dtype) {
  attn_model *model;
  assert_ok(attn_model_create(config, 1, ATTN_F32, &model));
  assert_ok(attn_model_save(model, p->base, dtype));
  attn_model_destroy(model);
}

static attn_training_options small_options(const place *p, const char *const *text, int output,
                                           const attn_lora_options *lora) {
  attn_training_options o = ATTN_TRAINING_OPTIONS_INIT;
  o.model = p->base;
  o.data = text;
  o.data_count = 1;
  o.validation_fraction = 0.1;
  o.output = p->output[output];
  o.steps = 10;
  o.batch = 2;
  o.length = 24;
  o.learning_rate = 1e-2;
  o.validation_every = 0;
  o.validation_windows = 3;
  o.checkpoint_every = 0;
  o.compute = ATTN_F32;
  o.save_dtype = ATTN_F32;
  o.device = test_device();
  o.lora = lora;
  return o;
}

typedef struct journal {
  int64_t stop_after; /* 0: never */
  double first, last;
} journal;

static bool record(void *context, const attn_training_progress *p) {
  journal *seen = context;
  if (p->step == 1) seen->first = p->loss;
  seen->last = p->loss;
  return p->step != seen->stop_after;
}

static attn_safetensors *open_file(const char *directory, const char *name) {
  char path[LONG_PATH];
  attn_safetensors *file;
  join(directory, name, path);
  assert_ok(attn_safetensors_open(path, &file));
  return file;
}

/* How many tensors of two files with the same names differ in a bit; `differs` says which may. */
static int count_different(const char *a, const char *b, const char *name,
                           bool (*may)(const char *name)) {
  attn_safetensors *files[2] = {open_file(a, name), open_file(b, name)};
  int different = 0;
  assert_int_equal(attn_safetensors_count(files[0]), attn_safetensors_count(files[1]));
  for (int64_t t = 0; t < attn_safetensors_count(files[0]); ++t) {
    attn_tensor x, y;
    const char *tensor = attn_safetensors_name(files[0], t);
    assert_ok(attn_safetensors_find(files[0], tensor, &x));
    assert_ok(attn_safetensors_find(files[1], tensor, &y));
    size_t size = (size_t)attn_tensor_count(&x) * attn_dtype_size(x.dtype);
    assert_int_equal(attn_tensor_count(&x), attn_tensor_count(&y));
    bool same = memcmp(x.data, y.data, size) == 0;
    different += !same;
    if (!same && !(may && may(tensor))) fail_msg("%s differs", tensor);
  }
  for (int i = 0; i < 2; ++i) attn_safetensors_close(files[i]);
  return different;
}

static bool is_matrix_of_layer(const char *name) {
  return strstr(name, ".layers.") && !strstr(name, "norm");
}

/* A base that has learnt one text. */
static void train_base(const place *p, const char *mixer) {
  const char *text = p->text;
  attn_training_options o = small_options(p, &text, 0, NULL);
  o.model = NULL;
  o.config = small_config(mixer);
  o.output = p->base;
  o.steps = 40;
  o.batch = 4;
  assert_ok(attn_train(&o, NULL, NULL, NULL));
}

/* Adapters of all matrices teach it another text, for every mixer and kind; what has none keeps its
 * bits. */
static void loss_falls(void **state) {
  (void)state;
  const double letters = 3.10; /* the entropy of single letters of the other text */
  static const char *const all[] = {"all"};
  static const attn_dtype dtypes[] = {ATTN_BF16, ATTN_F32};
  place p = make_place();
  const char *text = p.other_text;
  for (int m = 0; m < attn_mixer_count(); ++m) {
    attn_mixer_info info;
    assert_ok(attn_mixer_get_info(m, &info));
    if (!(info.abilities & ATTN_ABILITY_TRAINABLE)) continue;
    train_base(&p, info.name);
    for (int kind = 0; kind < KINDS; ++kind) {
      attn_lora_options lora = options_for((attn_lora_kind)kind, all, 1);
      attn_training_options o = small_options(&p, &text, 0, &lora);
      o.steps = 40;
      o.batch = 4;
      o.compute = dtypes[(m + kind) % 2];
      journal seen = {0};
      attn_training_result result;
      attn_status status = attn_train(&o, record, &seen, &result);
      if (status != ATTN_OK) fail_msg("%s: %s", info.name, attn_error_message());
      print_message("  %s, %s, %s: loss %.3f to %.3f; %lld of %lld\n", info.name, kinds[kind],
                    attn_dtype_name(o.compute), seen.first, seen.last, (long long)result.trained,
                    (long long)result.parameters);
      assert_true(seen.last < letters && seen.last < seen.first);
      assert_true(result.trained < result.parameters / 2);
      assert_int_equal(result.skipped, 0);
      assert_true(count_different(p.base, p.output[0], "model.safetensors", is_matrix_of_layer));
      clear(p.output[0]);
    }
    clear(p.base);
  }
  remove_place(&p);
}

static int64_t count_tensors(const char *directory, const char *file, const char *part) {
  attn_safetensors *f = open_file(directory, file);
  int64_t count = 0;
  for (int64_t t = 0; t < attn_safetensors_count(f); ++t)
    count += strstr(attn_safetensors_name(f, t), part) != NULL;
  attn_safetensors_close(f);
  return count;
}

/* Checkpoints hold the adapters, what is trained besides and their moments, no more; and continue
 * to the same bits. */
static void resumed_equals_uninterrupted(void **state) {
  (void)state;
  static const char *const trained[] = {"norm"};
  place p = make_place();
  const char *text = p.text;
  for (int variant = 0; variant < 6; ++variant) {
    attn_lora_options lora = options_for((attn_lora_kind)(variant % KINDS), NULL, 0);
    int parameters = 2 * 4 * (lora.kind == ATTN_LORA_DORA ? 3 : 2);
    if (variant >= 3) {
      lora.trained = trained;
      lora.trained_count = 1;
      ++parameters;
    }
    save_base(&p, small_config("softmax"), variant % 2 ? ATTN_F32 : ATTN_BF16);
    attn_training_options o[2];
    for (int i = 0; i < 2; ++i) {
      o[i] = small_options(&p, &text, i, &lora);
      o[i].compute = variant % 2 ? ATTN_F32 : ATTN_BF16;
      o[i].accumulation = variant < 3 ? 1 : 2;
      o[i].checkpoint_activations = variant == 1 || variant == 2;
    }
    assert_ok(attn_train(&o[0], NULL, NULL, NULL));
    journal seen = {.stop_after = 1 + variant};
    attn_training_result result;
    assert_int_equal(attn_train(&o[1], record, &seen, &result), ATTN_INTERRUPTED);
    o[1].start = ATTN_START_RESUME;
    seen.stop_after = 0;
    assert_ok(attn_train(&o[1], record, &seen, &result));
    assert_int_equal(result.first_step, 1 + variant);
    count_different(p.output[0], p.output[1], "training.safetensors", NULL);
    count_different(p.output[0], p.output[1], "adapter_model.safetensors", NULL);
    count_different(p.output[0], p.output[1], "model.safetensors", NULL);
    assert_int_equal(count_tensors(p.output[0], "training.safetensors", "model."), 3 * parameters);
    assert_int_equal(count_tensors(p.output[0], "training.safetensors", ""), 3 * parameters + 4);
    clear(p.output[0]);
    clear(p.output[1]);
    clear(p.base);
  }
  remove_place(&p);
}

/* Activation checkpoints run layers again, with the same bits. */
static void checkpointing_changes_no_bit(void **state) {
  (void)state;
  place p = make_place();
  const char *text = p.text;
  save_base(&p, small_config("softmax"), ATTN_F32);
  for (int kind = 0; kind < KINDS; ++kind) {
    attn_lora_options lora = options_for((attn_lora_kind)kind, NULL, 0);
    for (int i = 0; i < 2; ++i) {
      attn_training_options o = small_options(&p, &text, i, &lora);
      o.steps = 4;
      o.checkpoint_activations = i == 1;
      assert_ok(attn_train(&o, NULL, NULL, NULL));
    }
    count_different(p.output[0], p.output[1], "training.safetensors", NULL);
    clear(p.output[0]);
    clear(p.output[1]);
  }
  remove_place(&p);
}

/* A run goes on with the same adapters only. */
static void other_runs_are_refused(void **state) {
  (void)state;
  static const char *const q[] = {"q_proj"};
  place p = make_place();
  const char *text = p.text;
  save_base(&p, small_config("softmax"), ATTN_F32);
  attn_lora_options lora = options_for(ATTN_LORA_PLAIN, NULL, 0);
  attn_training_options o = small_options(&p, &text, 0, &lora);
  o.steps = 3;
  assert_ok(attn_train(&o, NULL, NULL, NULL));
  const struct {
    attn_lora_options lora;
    const char *word;
  } others[] = {{options_for(ATTN_LORA_DORA, NULL, 0), "lora was lora, now dora"},
                {options_for(ATTN_LORA_PLAIN, q, 1), "lora_parameters"}};
  for (size_t i = 0; i < sizeof others / sizeof *others; ++i) {
    o.lora = &others[i].lora;
    assert_refused(attn_train(&o, NULL, NULL, NULL), ATTN_INVALID_ARGUMENT, others[i].word);
  }
  attn_lora_options other = lora;
  o.lora = &other;
  other.rank = 3;
  assert_refused(attn_train(&o, NULL, NULL, NULL), ATTN_INVALID_ARGUMENT, "lora_rank was 4, now 3");
  other.rank = 4;
  other.alpha = 1;
  assert_refused(attn_train(&o, NULL, NULL, NULL), ATTN_INVALID_ARGUMENT, "lora_alpha");
  o.lora = NULL;
  assert_refused(attn_train(&o, NULL, NULL, NULL), ATTN_INVALID_ARGUMENT,
                 "lora was lora, now absent");
  o.lora = &lora;
  o.model = NULL;
  assert_refused(attn_train(&o, NULL, NULL, NULL), ATTN_INVALID_ARGUMENT, "lora adapts a model");
  remove_place(&p);
}

/* What is not trained costs neither a master, nor a gradient, nor moments. */
static void memory_is_of_what_is_trained(void **state) {
  (void)state;
  test_needs_cpu(); /* a GPU's memory is not counted */
  place p = make_place();
  const char *text = p.text;
  save_base(&p,
            "{\"vocab_size\": 256, \"hidden_size\": 256, \"num_hidden_layers\": 4, \"mixer\": "
            "\"softmax\", \"num_attention_heads\": 4, \"intermediate_size\": 1024}",
            ATTN_F32);
  attn_lora_options lora = options_for(ATTN_LORA_PLAIN, NULL, 0);
  attn_training_result results[2];
  for (int i = 0; i < 2; ++i) {
    attn_training_options o = small_options(&p, &text, i, i ? &lora : NULL);
    o.steps = 1;
    attn_memory_reset_peak();
    assert_ok(attn_train(&o, NULL, NULL, &results[i]));
    clear(p.output[i]);
  }
  size_t frozen = (size_t)(results[1].parameters - results[1].trained) * sizeof(float);
  print_message("  %.1f MB of weights: peak %.1f MB, with adapters %.1f MB\n", (double)frozen / 1e6,
                (double)results[0].peak_bytes / 1e6, (double)results[1].peak_bytes / 1e6);
  assert_int_equal(results[0].trained, results[0].parameters);
  /* gradient, two moments and the master, which is the mapped file's; a margin for the adapters */
  assert_true(results[0].peak_bytes - results[1].peak_bytes > frozen * 35 / 10);
  remove_place(&p);
}

/* Files -----------------------------------------------------------------------------------------
 */

/* The names and keys of PEFT, read by the library's own readers. */
static void files_are_those_of_peft(void **state) {
  (void)state;
  static const char *const targets[] = {"q_proj", "v_proj"};
  place p = make_place();
  const char *text = p.text;
  save_base(&p, small_config("softmax"), ATTN_F32);
  for (int kind = 0; kind < KINDS; ++kind) {
    attn_lora_options lora = options_for((attn_lora_kind)kind, targets, 2);
    attn_training_options o = small_options(&p, &text, 0, &lora);
    o.steps = 2;
    o.lora_merge = false;
    assert_ok(attn_train(&o, NULL, NULL, NULL));
    attn_safetensors *file = open_file(p.output[0], "adapter_model.safetensors");
    int64_t expected = 2 * 2 * (kind == ATTN_LORA_DORA ? 3 : 2);
    assert_int_equal(attn_safetensors_count(file), expected);
    assert_string_equal(attn_safetensors_metadata(file, "format"), "pt");
    static const struct {
      const char *end;
      int64_t shape[2];
    } parts[] = {
        {"lora_A.weight", {4, 32}}, {"lora_B.weight", {32, 4}}, {"lora_magnitude_vector", {32}}};
    for (int l = 0; l < 2; ++l)
      for (int t = 0; t < 2; ++t)
        for (int part = 0; part < expected / 4; ++part) {
          char name[PATH_SIZE];
          attn_tensor tensor;
          snprintf(name, sizeof name, "base_model.model.model.layers.%d.token_mixer.%s.%s", l,
                   targets[t], parts[part].end);
          assert_ok(attn_safetensors_find(file, name, &tensor));
          assert_int_equal(tensor.dtype, ATTN_F32);
          assert_int_equal(tensor.rank, part < 2 ? 2 : 1);
          for (int axis = 0; axis < tensor.rank; ++axis)
            assert_int_equal(tensor.shape[axis], parts[part].shape[axis]);
        }
    attn_safetensors_close(file);
    json_t *config;
    char path[LONG_PATH];
    join(p.output[0], "adapter_config.json", path);
    assert_ok(attn_json_load(path, &config));
    json_t *wanted = json_pack(
        "{s:s, s:i, s:i, s:b, s:b, s:[s, s], s:s, s:s}", "peft_type", "LORA", "r", 4, "lora_alpha",
        16, "use_rslora", kind == ATTN_LORA_RANK_STABLE, "use_dora", kind == ATTN_LORA_DORA,
        "target_modules", "q_proj", "v_proj", "base_model_name_or_path", p.base, "bias", "none");
    const char *key;
    json_t *value;
    json_object_foreach(wanted, key, value) if (!json_equal(value, json_object_get(config, key)))
        fail_msg("%s: key %s", kinds[kind], key);
    json_decref(wanted);
    json_decref(config);
    join(p.output[0], "model.safetensors", path);
    assert_false(attn_path_exists(path));
    clear(p.output[0]);
  }
  remove_place(&p);
}

/* The base model with the adapters added is the merged model, to the bit. */
static void loaded_equals_merged(void **state) {
  (void)state;
  static const char *const all[] = {"all"}, *const trained[] = {"norm", "lm_head"};
  place p = make_place();
  const char *text = p.text;
  for (int kind = 0; kind < KINDS; ++kind)
    for (int more = 0; more < 2; ++more) {
      save_base(&p, small_config("kda"), ATTN_F32);
      attn_lora_options lora = options_for((attn_lora_kind)kind, all, 1);
      lora.trained = trained;
      lora.trained_count = more;
      attn_training_options o = small_options(&p, &text, 0, &lora);
      assert_ok(attn_train(&o, NULL, NULL, NULL));
      attn_model *model;
      assert_ok(attn_model_load(p.base, ATTN_F32, &model));
      double before = loss_of(model);
      assert_ok(attn_model_load_lora(model, p.output[0]));
      assert_null(model->adapters);
      assert_true(fabs(loss_of(model) - before) > 1e-6);
      assert_ok(attn_model_save(model, p.output[1], ATTN_F32));
      attn_model_destroy(model);
      count_different(p.output[0], p.output[1], "model.safetensors", NULL);
      for (int i = 0; i < 2; ++i) clear(p.output[i]);
      clear(p.base);
    }
  remove_place(&p);
}

/* An adapter for every matrix that a family's file has, written here, loaded, and compared with W +
 * s B A of the stored tensors: where the file keeps several parameters together, or their rows in
 * another order, the adapter is that of the tensor. */

typedef struct module {
  char name[PATH_SIZE];
  attn_tensor w, a, b;
} module;

enum { MOST_MODULES = 256, RANK = 3 };

static int list_modules(const attn_model *model, const attn_safetensors *file, module *modules) {
  int count = 0;
  for (int64_t i = 0; i < model->parameter_count && count < MOST_MODULES; ++i) {
    const char *name = model->parameters[i].name;
    attn_tensor w;
    bool known = !is_product_of_layer(model, i);
    size_t length = strlen(name) - strlen(".weight");
    for (int k = 0; k < count && !known; ++k)
      known = strlen(modules[k].name) == length && strncmp(modules[k].name, name, length) == 0;
    if (known) continue;
    assert_ok(attn_safetensors_find(file, name, &w));
    if (w.rank != 2) continue; /* all experts of a layer */
    module *m = &modules[count++];
    snprintf(m->name, sizeof m->name, "%.*s", (int)length, name);
    m->w = w;
    assert_ok(attn_tensor_create(ATTN_F64, 2, (int64_t[]){RANK, w.shape[1]}, &m->a));
    assert_ok(attn_tensor_create(ATTN_F64, 2, (int64_t[]){w.shape[0], RANK}, &m->b));
    fill_normal(&m->a, 0, 0.1, 300 + (uint64_t)count);
    fill_normal(&m->b, 0, 0.1, 400 + (uint64_t)count);
  }
  return count;
}

static void write_config(const char *directory, const char *text) {
  char path[LONG_PATH];
  join(directory, "adapter_config.json", path);
  assert_ok(attn_file_write(path, text, strlen(text)));
}

static void write_modules(const char *directory, const module *modules, int count) {
  static char names[2 * MOST_MODULES][LONG_PATH];
  attn_named_tensor tensors[2 * MOST_MODULES];
  char path[LONG_PATH];
  for (int i = 0; i < count; ++i) {
    snprintf(names[2 * i], LONG_PATH, "base_model.model.%.100s.lora_A.weight", modules[i].name);
    snprintf(names[2 * i + 1], LONG_PATH, "base_model.model.%.100s.lora_B.weight", modules[i].name);
    tensors[2 * i] = (attn_named_tensor){names[2 * i], modules[i].a};
    tensors[2 * i + 1] = (attn_named_tensor){names[2 * i + 1], modules[i].b};
  }
  assert_ok(attn_make_directories(directory));
  join(directory, "adapter_model.safetensors", path);
  assert_ok(attn_safetensors_write(path, tensors, 2 * count, NULL, 0));
}

static void compare_module(const module *m, const attn_safetensors *saved, double scale) {
  attn_tensor merged;
  char name[LONG_PATH];
  snprintf(name, sizeof name, "%s.weight", m->name);
  assert_ok(attn_safetensors_find(saved, name, &merged));
  double *w = test_to_doubles(&m->w), *got = test_to_doubles(&merged);
  const double *a = m->a.data, *b = m->b.data;
  int64_t inputs = m->w.shape[1];
  for (int64_t j = 0; j < m->w.shape[0]; ++j)
    for (int64_t i = 0; i < inputs; ++i)
      for (int k = 0; k < RANK; ++k)
        w[j * inputs + i] += scale * b[j * RANK + k] * a[k * inputs + i];
  double error = test_relative_error(got, w, attn_tensor_count(&merged));
  if (!(error < 1e-12)) fail_msg("%s: error %g", name, error);
  free(w);
  free(got);
}

static void files_fit_every_family(void **state) {
  (void)state;
  place p = make_place();
  for (int s = 0; s < SUBJECTS; ++s) {
    if (*subjects[s].file || strstr(subjects[s].name, "fp8") || strstr(subjects[s].name, "float8"))
      continue; /* the file is compared with: of plain numbers */
    attn_model *model;
    static module modules[MOST_MODULES];
    assert_ok(attn_model_load(path_of(s), ATTN_F64, &model));
    attn_safetensors *stored = open_file(path_of(s), "");
    int count = list_modules(model, stored, modules);
    write_modules(p.output[0], modules, count);
    write_config(p.output[0], "{\"peft_type\": \"LORA\", \"r\": 3, \"lora_alpha\": 6}");
    assert_ok(attn_model_load_lora(model, p.output[0]));
    attn_save_options options = ATTN_SAVE_OPTIONS_INIT;
    options.dtype = ATTN_F64;
    assert_ok(attn_model_save_as(model, p.output[1], &options));
    attn_safetensors *saved = open_file(p.output[1], "model.safetensors");
    print_message("  %s: %d matrices\n", subjects[s].name, count);
    assert_true(count > 4);
    for (int i = 0; i < count; ++i) {
      compare_module(&modules[i], saved, 2);
      attn_tensor_destroy(&modules[i].a);
      attn_tensor_destroy(&modules[i].b);
    }
    attn_safetensors_close(saved);
    attn_safetensors_close(stored);
    attn_model_destroy(model);
    for (int i = 0; i < 2; ++i) clear(p.output[i]);
  }
  remove_place(&p);
}

/* A GGUF file has the same model under other names, with the rows of q and k in another order: the
 * adapter for one is that for the other. */
static void files_fit_gguf(void **state) {
  (void)state;
  static const char *const names[] = {"llama", "qwen2_moe", "qwen3"};
  place p = make_place();
  for (size_t n = 0; n < sizeof names / sizeof *names; ++n) {
    double loss[2][2];
    for (int gguf = 0; gguf < 2; ++gguf) {
      attn_model *model;
      static module modules[MOST_MODULES];
      char path[512];
      snprintf(path, sizeof path, "%s/tests/models/fixtures/families/%s%s", ATTN_SOURCE_DIR,
               names[n], gguf ? "/model.gguf" : "");
      assert_ok(attn_model_load(path, ATTN_F64, &model));
      loss[gguf][0] = loss_of(model);
      if (!gguf) {
        attn_safetensors *stored = open_file(path, "");
        int count = list_modules(model, stored, modules);
        write_modules(p.output[0], modules, count);
        write_config(p.output[0], "{\"peft_type\": \"LORA\", \"r\": 3, \"lora_alpha\": 6}");
        for (int i = 0; i < count; ++i) {
          attn_tensor_destroy(&modules[i].a);
          attn_tensor_destroy(&modules[i].b);
        }
        attn_safetensors_close(stored);
      }
      assert_ok(attn_model_load_lora(model, p.output[0]));
      loss[gguf][1] = loss_of(model);
      attn_model_destroy(model);
    }
    print_message("  %s: loss %.6f, with adapters %.6f and %.6f\n", names[n], loss[0][0],
                  loss[0][1], loss[1][1]);
    assert_true(fabs(loss[0][1] - loss[0][0]) > 1e-3);
    /* the two files' own rounding of the weights, and nothing more */
    assert_true(fabs(loss[1][1] - loss[0][1]) <= 1e-7 + 2 * fabs(loss[1][0] - loss[0][0]));
    clear(p.output[0]);
  }
  remove_place(&p);
}

/* Refusals --------------------------------------------------------------------------------------
 */

#define Q "base_model.model.model.layers.0.token_mixer.q_proj"

/* Loads an adapter of the tensors given onto a small model. */
static attn_status load_tensors(const place *p, const char *config,
                                const attn_named_tensor *tensors, int count) {
  char path[LONG_PATH];
  attn_model *model = small_model("softmax");
  assert_ok(attn_make_directories(p->output[0]));
  join(p->output[0], "adapter_model.safetensors", path);
  assert_ok(attn_safetensors_write(path, tensors, count, NULL, 0));
  write_config(p->output[0], config);
  attn_status status = attn_model_load_lora(model, p->output[0]);
  attn_model_destroy(model);
  return status;
}

static void refuses_tensors_that_do_not_fit(void **state) {
  (void)state;
  static const char usual[] = "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8}";
  static const char dora[] = "{\"peft_type\": \"LORA\", \"r\": 4, \"use_dora\": true}";
  place p = make_place();
  attn_tensor a, b, m, other;
  assert_ok(attn_tensor_create(ATTN_F32, 2, (int64_t[]){4, 32}, &a));
  assert_ok(attn_tensor_create(ATTN_BF16, 2, (int64_t[]){32, 4}, &b));
  assert_ok(attn_tensor_create(ATTN_F32, 1, (int64_t[]){32}, &m));
  assert_ok(attn_tensor_create(ATTN_F32, 2, (int64_t[]){4, 33}, &other));
  const struct {
    const char *config;
    attn_named_tensor tensors[3];
    int count;
    attn_status status;
    const char *word;
  } cases[] = {
      {usual, {{Q ".lora_A.weight", a}, {Q ".lora_B.weight", b}}, 2, ATTN_OK, ""},
      {dora,
       {{Q ".lora_A.weight", a}, {Q ".lora_B.weight", b}, {Q ".lora_magnitude_vector", m}},
       3,
       ATTN_OK,
       ""},
      {dora,
       {{Q ".lora_A.weight", a}, {Q ".lora_B.weight", b}, {Q ".lora_magnitude_vector.weight", m}},
       3,
       ATTN_OK,
       ""},
      {usual,
       {{Q ".lora_A.weight", other}, {Q ".lora_B.weight", b}},
       2,
       ATTN_BAD_FORMAT,
       Q ".lora_A.weight is [4, 33], expected [4, 32]"},
      {usual,
       {{Q ".lora_A.weight", a}, {Q ".lora_B.weight", a}},
       2,
       ATTN_BAD_FORMAT,
       Q ".lora_B.weight is [4, 32], expected [32, 4]"},
      {usual, {{Q ".lora_A.weight", a}}, 1, ATTN_BAD_FORMAT, Q ".lora_B.weight is missing"},
      {usual, {{Q ".lora_B.weight", b}}, 1, ATTN_BAD_FORMAT, "without its lora_A"},
      {dora,
       {{Q ".lora_A.weight", a}, {Q ".lora_B.weight", b}},
       2,
       ATTN_BAD_FORMAT,
       Q ".lora_magnitude_vector is missing"},
      {dora,
       {{Q ".lora_A.weight", a}, {Q ".lora_B.weight", b}, {Q ".lora_magnitude_vector", a}},
       3,
       ATTN_BAD_FORMAT,
       Q ".lora_magnitude_vector is [4, 32], expected [32]"},
      {usual,
       {{Q ".lora_A.weight", a}, {Q ".lora_B.weight", b}, {Q ".lora_magnitude_vector", m}},
       3,
       ATTN_BAD_FORMAT,
       "use_dora"},
      {usual,
       {{"base_model.model.model.layers.9.token_mixer.q_proj.lora_A.weight", a}},
       1,
       ATTN_BAD_FORMAT,
       "layers.9.token_mixer.q_proj"},
      {usual, {{"model.q_proj.lora_A.weight", a}}, 1, ATTN_BAD_FORMAT, "base_model.model."},
      {usual, {{Q ".lora_embedding_A", a}}, 1, ATTN_UNSUPPORTED, Q ".lora_embedding_A"},
      {usual, {{Q ".weight", a}}, 1, ATTN_BAD_FORMAT, "expected [32, 32]"},
      {usual, {{"base_model.model.nothing.weight", a}}, 1, ATTN_BAD_FORMAT, "nothing.weight"},
  };
  for (size_t c = 0; c < sizeof cases / sizeof *cases; ++c) {
    attn_status status = load_tensors(&p, cases[c].config, cases[c].tensors, cases[c].count);
    if (status != cases[c].status) fail_msg("case %zu: %s", c, attn_error_message());
    if (status != ATTN_OK) assert_refused(status, cases[c].status, cases[c].word);
  }
  static const struct {
    const char *config, *word;
  } configs[] = {
      {"{\"peft_type\": \"LOHA\"}", "LOHA"},
      {"{\"r\": 4}", "peft_type"},
      {"{\"peft_type\": \"LORA\", \"r\": 0}", "r"},
      {"{\"peft_type\": \"LORA\", \"r\": 8}", "[8, 32]"},
      {"{\"peft_type\": \"LORA\", \"r\": 4, \"bias\": \"all\"}", "bias"},
      {"{\"peft_type\": \"LORA\", \"r\": 4, \"fan_in_fan_out\": true}", "fan_in_fan_out"},
      {"{\"peft_type\": \"LORA\", \"r\": 4, \"alpha_pattern\": {\"q\": 2}}", "alpha_pattern"},
      {"{\"peft_type\": \"LORA\", \"r\": 4, \"init_lora_weights\": \"pissa_niter_4\"}", "pissa"},
      {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 0}", "alpha"},
  };
  for (size_t c = 0; c < sizeof configs / sizeof *configs; ++c) {
    attn_status status = load_tensors(&p, configs[c].config, cases[0].tensors, 2);
    assert_refused(status, status == ATTN_OK ? ATTN_BAD_FORMAT : status, configs[c].word);
  }
  attn_tensor_destroy(&a);
  attn_tensor_destroy(&b);
  attn_tensor_destroy(&m);
  attn_tensor_destroy(&other);
  remove_place(&p);
}

/* A failing allocation or file is a clean error of attaching, saving and loading. */
static void fails_cleanly(void **state) {
  (void)state;
  test_needs_cpu();
  enum { MANY = 100000 };
  place p = make_place();
  attn_lora_options lora = options_for(ATTN_LORA_DORA, NULL, 0);
  assert_ok(attn_make_directories(p.output[0]));
  for (int kind = 0; kind < ATTN_FAULT_KINDS; ++kind)
    for (int64_t n = 0; n < MANY; n += 1 + n / 20) {
      attn_model *model = small_model("softmax"), *target = small_model("softmax");
      attn_fault_arm((attn_fault_kind)kind, n);
      attn_status status = attn_model_attach_lora(model, &lora, 1);
      if (status == ATTN_OK) status = attn_model_save_lora(model, &lora, p.base, p.output[0]);
      if (status == ATTN_OK) status = attn_model_load_lora(target, p.output[0]);
      bool failed = attn_fault_disarm((attn_fault_kind)kind);
      if (failed != (status != ATTN_OK))
        fail_msg("fault %lld: %s", (long long)n, attn_error_message());
      attn_model_destroy(model);
      attn_model_destroy(target);
      if (!failed) break;
    }
  remove_place(&p);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(unmerged_equals_merged),
      cmocka_unit_test(names_find_matrices),
      cmocka_unit_test(refuses_unknown_names),
      cmocka_unit_test(gradients_do_not_depend_on_what_else_is_trained),
      cmocka_unit_test(loss_falls),
      cmocka_unit_test(resumed_equals_uninterrupted),
      cmocka_unit_test(checkpointing_changes_no_bit),
      cmocka_unit_test(other_runs_are_refused),
      cmocka_unit_test(memory_is_of_what_is_trained),
      cmocka_unit_test(files_are_those_of_peft),
      cmocka_unit_test(loaded_equals_merged),
      cmocka_unit_test(files_fit_every_family),
      cmocka_unit_test(files_fit_gguf),
      cmocka_unit_test(refuses_tensors_that_do_not_fit),
      cmocka_unit_test(fails_cleanly),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
