/* A miniature of CAB (Comprehensive Attention Benchmarking, arXiv 2210.07661; docs/claims.md):
 * small models with each attention in three of its patterns, on the bytes of a text and on copying.
 *
 *   NS  masked language model: 15 % of the bytes are hidden, the loss is theirs
 *   CS  language model: the next byte
 *   CC  copying: a tower reads symbols, another writes them again, with causal attention to itself
 *       and cross-attention to what the first one made of them
 *
 * All models are two layers of width 64 (three for CC: one of the reading tower) that differ in the
 * mixer alone. Writes the metrics as attn compare --cab reads them.
 *
 *   bench_cab TEXT METRICS.json [STEPS [SEEDS]] */
#include "attn/base.h"
#include "base/random.h"
#include "files/corpus.h"
#include "files/json.h"
#include "graph/operations.h"
#include "layers/layers.h"
#include "models/model.h"
#include "tasks/cab.h"
#include "training/optimiser.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  WIDTH = 64,
  HEADS = 2,
  LENGTH = 128, /* bytes of a window */
  COPIED = 32,  /* symbols */
  SYMBOLS = 64,
  BATCH = 16,
  VALIDATIONS = 16, /* batches */
  MASK = 256,       /* a token: the hidden byte; and what copies begin with */
  VOCABULARY = 257,
};
static const double hidden_share = 0.15, peak_rate = 3e-3;

static const char *const attentions[] = {"softmax", "norm_attention", "hedgehog", "diag_attention",
                                         "lightning"};
enum { ATTENTIONS = sizeof attentions / sizeof *attentions };

static void need(attn_status status) {
  if (status == ATTN_OK) return;
  fprintf(stderr, "bench_cab: %s\n", attn_error_message());
  exit(1);
}

/* Batches ---------------------------------------------------------------------------------------
 */

typedef struct batch {
  int64_t length;
  int32_t read[BATCH * LENGTH]; /* of the reading tower; CC only */
  int32_t inputs[BATCH * LENGTH], targets[BATCH * LENGTH];
} batch;

static void read_windows(const attn_corpus *corpus, attn_corpus_part part, uint64_t seed,
                         uint64_t step, int32_t windows[BATCH * (LENGTH + 1)]) {
  need(attn_corpus_batch(corpus, part, seed, step, BATCH, LENGTH, windows));
}

static void make_text_batch(const attn_corpus *corpus, bool masked, attn_corpus_part part,
                            uint64_t seed, uint64_t step, batch *b) {
  static int32_t windows[BATCH * (LENGTH + 1)];
  attn_random random = {.seed = seed, .stream = 1000 + (uint64_t)part, .index = step << 20};
  read_windows(corpus, part, seed, step, windows);
  b->length = LENGTH;
  for (int64_t w = 0; w < BATCH; ++w)
    for (int64_t i = 0; i < LENGTH; ++i) {
      const int32_t *byte = windows + w * (LENGTH + 1) + i;
      int64_t at = w * LENGTH + i;
      bool hidden = masked && attn_random_uniform(&random) < hidden_share;
      b->inputs[at] = hidden ? MASK : *byte;
      b->targets[at] = !masked ? byte[1] : hidden ? *byte : -1;
    }
}

static void make_copying_batch(attn_corpus_part part, uint64_t seed, uint64_t step, batch *b) {
  attn_random random = {.seed = seed, .stream = 2000 + (uint64_t)part, .index = step << 20};
  b->length = COPIED;
  for (int64_t i = 0; i < BATCH * COPIED; ++i) {
    b->read[i] = b->targets[i] = (int32_t)attn_random_below(&random, SYMBOLS);
    b->inputs[i] = i % COPIED ? b->targets[i - 1] : MASK;
  }
}

/* Models ----------------------------------------------------------------------------------------
 */

typedef struct subject {
  attn_cab_pattern pattern;
  attn_model *model;
  attn_graph *graph;
  attn_optimiser *optimiser;
} subject;

/* x + mixer(norm(x)), then x + feed_forward(norm(x)). */
static attn_var *layer(const subject *s, int64_t l, const attn_layout *layout, attn_var *context,
                       attn_var *x) {
  attn_graph *g = s->graph;
  const attn_layer_config *config = &s->model->config.layers[l];
  attn_layer_parameters *p = &s->model->layers[l];
  double epsilon = s->model->config.norm_epsilon;
  attn_mixer_call call = {.options = &config->options,
                          .parameters = p->mixer,
                          .layout = *layout,
                          .context = context,
                          .context_layout = *layout};
  attn_var *in = attn_layer_rms_norm(g, x, attn_graph_parameter(g, p->token_norm[0]), epsilon);
  x = attn_op_add(g, x, attn_mixer_apply(g, config->mixer, &call, in));
  in = attn_layer_rms_norm(g, x, attn_graph_parameter(g, p->channel_norm[0]), epsilon);
  return attn_op_add(g, x,
                     attn_layer_gated_feed_forward(g, ATTN_SILU, in, p->feed_forward[0],
                                                   p->feed_forward[1], p->feed_forward[2]));
}

static attn_var *embed(const subject *s, const int32_t *tokens, int64_t rows) {
  return attn_layer_embedding(s->graph, s->model->embedding, tokens, rows, 1);
}

/* Normalised rows of the batch. */
static attn_var *hidden(const subject *s, const batch *b) {
  attn_graph *g = s->graph;
  attn_layout layout = attn_layout_equal(BATCH, b->length);
  double epsilon = s->model->config.norm_epsilon;
  attn_var *context = NULL, *x = embed(s, b->inputs, layout.rows);
  bool crosses = s->pattern == ATTN_CAB_CC;
  if (crosses) {
    context = layer(s, 0, &layout, NULL, embed(s, b->read, layout.rows));
    context = attn_layer_rms_norm(g, context, NULL, epsilon);
  }
  for (int64_t l = crosses; l < s->model->config.layer_count; ++l)
    x = layer(s, l, &layout, l == 2 ? context : NULL, x);
  return attn_layer_rms_norm(g, x, attn_graph_parameter(g, s->model->final_norm[0]), epsilon);
}

static void create(const char *mixer, attn_cab_pattern pattern, uint64_t seed, subject *s) {
  char config[512];
  int64_t layers = pattern == ATTN_CAB_CC ? 3 : 2;
  *s = (subject){.pattern = pattern};
  snprintf(config, sizeof config,
           "{\"vocab_size\": %d, \"hidden_size\": %d, \"num_hidden_layers\": %lld, \"mixer\": "
           "\"%s\", \"num_attention_heads\": %d, \"intermediate_size\": %d}",
           VOCABULARY, WIDTH, (long long)layers, mixer, HEADS, 2 * WIDTH);
  need(attn_model_create(config, seed, ATTN_F32, &s->model));
  for (int64_t l = 0; l < layers; ++l)
    s->model->config.layers[l].options.bidirectional =
        pattern == ATTN_CAB_NS || (pattern == ATTN_CAB_CC && l == 0);
  need(attn_model_make_trainable(s->model));
  need(attn_graph_create(ATTN_F32, &s->graph));
  attn_adamw adamw = ATTN_ADAMW_INIT;
  attn_parameter **list = malloc((size_t)attn_model_count_all(s->model) * sizeof *list);
  int64_t count = attn_model_list_trained(s->model, list);
  need(attn_optimiser_create(&adamw, list, count, &s->optimiser));
  free(list);
}

static void destroy(subject *s) {
  attn_optimiser_destroy(s->optimiser);
  attn_graph_destroy(s->graph);
  attn_model_destroy(s->model);
}

/* Training and judging --------------------------------------------------------------------------
 */

static void make_batch(const attn_corpus *corpus, attn_cab_pattern pattern, attn_corpus_part part,
                       uint64_t seed, uint64_t step, batch *b) {
  if (pattern == ATTN_CAB_CC)
    make_copying_batch(part, seed, step, b);
  else
    make_text_batch(corpus, pattern == ATTN_CAB_NS, part, seed, step, b);
}

/* Linear warmup over a twentieth of the steps, then linear decay. */
static double rate(int64_t step, int64_t steps) {
  double up = (double)(step + 1) / (0.05 * (double)steps + 1);
  double down = (double)(steps - step) / (double)steps;
  return peak_rate * fmin(1, fmin(up, down / 0.95));
}

static attn_var *loss_of(const subject *s, const batch *b) {
  return attn_op_linear_cross_entropy(s->graph, hidden(s, b), s->model->head, 0, b->targets);
}

static void train(subject *s, const attn_corpus *corpus, uint64_t seed, int64_t steps) {
  static batch b;
  for (int64_t step = 0; step < steps; ++step) {
    make_batch(corpus, s->pattern, ATTN_TRAINING, seed, (uint64_t)step, &b);
    attn_graph_reset(s->graph, true);
    attn_optimiser_zero_gradients(s->optimiser);
    attn_var *loss = loss_of(s, &b);
    need(attn_graph_status(s->graph));
    need(attn_graph_backward(s->graph, loss, 1));
    need(attn_optimiser_step(s->optimiser, rate(step, steps), 1, NULL));
  }
}

/* The share of targets that are the most likely token. */
static double accuracy_of(const subject *s, const batch *b) {
  attn_graph_reset(s->graph, false);
  attn_var *logits = attn_op_linear_wide(s->graph, hidden(s, b), s->model->head);
  int64_t rows = BATCH * b->length, right = 0;
  need(attn_graph_status(s->graph));
  const float *numbers = logits->value.data;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t best = 0;
    for (int64_t t = 1; t < VOCABULARY; ++t)
      if (numbers[r * VOCABULARY + t] > numbers[r * VOCABULARY + best]) best = t;
    right += best == b->targets[r];
  }
  return (double)right / (double)rows;
}

/* Perplexity on what was held out, and the share of copies that are right. */
static void judge(const subject *s, const attn_corpus *corpus, double *perplexity,
                  double *accuracy) {
  static batch b;
  const uint64_t seed = 99; /* of the batches that all are judged on */
  double sum = 0;
  *accuracy = 0;
  for (int v = 0; v < VALIDATIONS; ++v) {
    make_batch(corpus, s->pattern, ATTN_VALIDATION, seed, (uint64_t)v, &b);
    attn_graph_reset(s->graph, false);
    attn_var *loss = loss_of(s, &b);
    need(attn_graph_status(s->graph));
    sum += attn_tensor_get(&loss->value, (int64_t[]){0});
    if (s->pattern == ATTN_CAB_CC) *accuracy += accuracy_of(s, &b) / VALIDATIONS;
  }
  *perplexity = exp(sum / VALIDATIONS);
}

/* Results ---------------------------------------------------------------------------------------
 */

static const struct {
  attn_cab_pattern pattern;
  const char *task;
  unsigned ability; /* that a mixer needs */
} tasks[] = {
    {ATTN_CAB_NS, "MLM", ATTN_ABILITY_BIDIRECTIONAL},
    {ATTN_CAB_CS, "LM", ATTN_ABILITY_CAUSAL},
    {ATTN_CAB_CC, "copying", ATTN_ABILITY_CROSS},
};
enum { TASKS = sizeof tasks / sizeof *tasks };

static json_t *metrics(void) {
  json_t *list = json_array();
  for (int t = 0; t < TASKS; ++t)
    for (int m = 0; m < (tasks[t].pattern == ATTN_CAB_CC ? 2 : 1); ++m)
      json_array_append_new(list, json_pack("{s:s, s:s, s:s, s:s}", "pattern",
                                            attn_cab_pattern_names[tasks[t].pattern], "task",
                                            tasks[t].task, "name", m ? "accuracy" : "perplexity",
                                            "better", m ? "higher" : "lower"));
  return list;
}

/* Means over the seeds, as an array of metrics. */
static json_t *measure(const char *mixer, int task, const attn_corpus *corpus, int64_t steps,
                       int seeds) {
  attn_cab_pattern pattern = tasks[task].pattern;
  double perplexity = 0, accuracy = 0;
  printf("%-16s %-3s %-8s", mixer, attn_cab_pattern_names[pattern], tasks[task].task);
  for (int seed = 1; seed <= seeds; ++seed) {
    subject s;
    double p, a;
    create(mixer, pattern, (uint64_t)seed, &s);
    train(&s, corpus, (uint64_t)seed, steps);
    judge(&s, corpus, &p, &a);
    destroy(&s);
    printf("  %.3f", p);
    if (pattern == ATTN_CAB_CC) printf(" (%.2f %% right)", 100 * a);
    fflush(stdout);
    perplexity += p / seeds;
    accuracy += a / seeds;
  }
  putchar('\n');
  json_t *values = json_array();
  json_array_append_new(values, json_real(perplexity));
  if (pattern == ATTN_CAB_CC) json_array_append_new(values, json_real(accuracy));
  return values;
}

int main(int argc, char **argv) {
  if (argc < 3 || argc > 5) {
    fprintf(stderr, "usage: bench_cab TEXT METRICS.json [STEPS [SEEDS]]\n");
    return 2;
  }
  int64_t steps = argc > 3 ? atoll(argv[3]) : 400;
  int seeds = argc > 4 ? atoi(argv[4]) : 1;
  if (steps < 1 || seeds < 1) {
    fprintf(stderr, "bench_cab: steps and seeds must be 1 or more\n");
    return 2;
  }
  const char *const paths[] = {argv[1]};
  attn_corpus *corpus;
  need(attn_corpus_open(paths, 1, 0.05, &corpus));
  json_t *rows = json_object();
  for (int a = 0; a < ATTENTIONS; ++a) {
    attn_mixer_info info;
    json_t *row = json_object();
    int index;
    need(attn_mixer_find(attentions[a], &index));
    need(attn_mixer_get_info(index, &info));
    for (int t = 0; t < TASKS; ++t)
      if (info.abilities & tasks[t].ability)
        json_object_set_new(
            row, attn_cab_pattern_names[tasks[t].pattern],
            json_pack("{s:o}", tasks[t].task, measure(attentions[a], t, corpus, steps, seeds)));
    json_object_set_new(rows, attentions[a], row);
  }
  json_t *file = json_pack("{s:s, s:o, s:o}", "baseline", attentions[0], "metrics", metrics(),
                           "attentions", rows);
  need(attn_json_save(argv[2], file));
  json_decref(file);
  attn_corpus_close(corpus);
  return 0;
}
