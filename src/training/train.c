/* The loop: for each step, `accumulation` micro-batches forward and backward, one step of AdamW.
 *
 *   loss = mean over the tokens of a micro-batch of -ln p(next token)
 *   G    = mean over the micro-batches of d loss / d masters
 *
 * A micro-batch goes forward and backward a few windows at a time, so that what one operation
 * writes is still in the caches when the next one reads it: a step is bound by memory otherwise. G
 * is a sum over tokens, so this changes nothing but its order.
 *
 * Everything that the next step depends on is in attn_run_state and in the options: the data of
 * step s is a function of (seed, s), the learning rate of s. That is what makes a resumed run equal
 * to an uninterrupted one. */
#include "attn/training.h"
#include "base/hash.h"
#include "base/memory.h"
#include "base/progress.h"
#include "base/status.h"
#include "base/io.h"
#include "models/lora.h"
#include "models/model.h"
#include "tensor/device.h"
#include "training/checkpoint.h"
#include "training/data.h"
#include "training/schedule.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum {
  MOST_SKIPPED_IN_ROW = 5, /* a single bad batch is survived; a diverged run is not */
  MOST_VALIDATIONS = 100000,
  LINE_SIZE = 320,
  MESSAGE_SIZE = 512,
  THREAD_TOKENS = 512, /* of each thread at a time: a layer's activations fit the L2 cache */
  /* At a time on a GPU: as many as gpu_activations hold, so that products are large and a model's
   * own memory is what counts; but at least ENOUGH of them, for fewer leave much of the GPU idle,
   * and at least a window. What then does not fit is made again in backward: by lean layers first,
   * then by layers that keep their inputs only. A layer keeps about ACTIVATION_BYTES for each token
   * and unit of width (residuals in float32, projections, gates and a feed-forward of three
   * widths), a lean one LEAN_BYTES (residuals, attention's result), else INPUT_BYTES; backward
   * needs BACKWARD_BYTES, and the activations of one layer where there is any that makes them
   * again. */
  MOST_GPU_TOKENS = 65536,
  ENOUGH_GPU_TOKENS = 8192,
  ACTIVATION_BYTES = 39,
  LEAN_BYTES = 10,
  INPUT_BYTES = 4,
  BACKWARD_BYTES = 40,
};

typedef struct run {
  attn_training_options options; /* checked, without "-1: choose" */
  attn_training_progress_fn progress;
  void *context;
  attn_model *model;
  attn_training_data data;
  attn_graph *graph;
  attn_optimiser *optimiser;
  attn_history history;
  attn_schedule schedule;
  attn_identity identity;
  attn_run_state state;
  attn_parameter **parameters; /* [trained_count], that are trained */
  int32_t *inputs, *targets;   /* [batch * accumulation, length]: of one step */
  char *checkpoint, *svg, *csv;
  uint64_t starting_weights;
  int64_t piece;       /* windows that go forward and backward at a time */
  int64_t checkpoints; /* layers that keep their inputs only, */
  int64_t lean;        /* and those after them that keep what is slow to make again */
  bool zeroed;         /* the gradients are zero */
  int64_t first_step, trained_count;
  int64_t numbers, trained_numbers; /* of all parameters, of those that are trained */
  attn_progress speed;              /* in tokens */
  double start;
  bool stop;                  /* the caller wants to stop */
  char warning[MESSAGE_SIZE]; /* why the last checkpoint failed, or "" */
} run;

static double seconds_now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Options ---------------------------------------------------------------------------------------
 */

static attn_status check_counts(const attn_training_options *o) {
  const int64_t most_steps = INT64_C(1) << 27;
  const struct {
    const char *name;
    int64_t value, least, most;
  } checks[] = {
      {"steps", o->steps, 1, most_steps},
      {"batch", o->batch, 1, INT32_MAX},
      {"length", o->length, 1, INT32_MAX - 1},
      {"accumulation", o->accumulation, 1, INT32_MAX},
      {"warmup", o->warmup, -1, o->steps},
      {"decay", o->decay, -1, o->steps},
      {"validation_every", o->validation_every, 0, INT64_MAX},
      {"validation_windows", o->validation_windows, 1, INT32_MAX},
      {"checkpoint_every", o->checkpoint_every, 0, INT64_MAX},
  };
  for (size_t i = 0; i < sizeof checks / sizeof *checks; ++i)
    if (checks[i].value < checks[i].least || checks[i].value > checks[i].most)
      return attn_fail(ATTN_INVALID_ARGUMENT, "training: %s is %lld, expected %lld to %lld",
                       checks[i].name, (long long)checks[i].value, (long long)checks[i].least,
                       (long long)checks[i].most);
  if (o->batch > INT32_MAX / o->accumulation / (o->length + 1))
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "training: %lld micro-batches of %lld windows of %lld tokens are more than "
                     "2^31 tokens a step",
                     (long long)o->accumulation, (long long)o->batch, (long long)o->length);
  return ATTN_OK;
}

/* Whether two paths are the same place; false when one does not exist. */
static bool same_place(const char *a, const char *b) {
  struct stat one, two;
  return stat(a, &one) == 0 && stat(b, &two) == 0 && one.st_dev == two.st_dev &&
         one.st_ino == two.st_ino;
}

static attn_status check_places(const attn_training_options *o) {
  if (!o->output || !*o->output)
    return attn_fail(ATTN_INVALID_ARGUMENT, "training: no output directory is given");
  if (o->config && o->model)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "training: both a configuration and a model to start from are given");
  if (o->model && same_place(o->model, o->output))
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "training: the output directory %s is the model that it starts from; give "
                     "another one",
                     o->output);
  if (o->lora && !o->model)
    return attn_fail(ATTN_INVALID_ARGUMENT, "training: lora adapts a model, and none is given");
  if ((unsigned)o->start > ATTN_START_RESUME)
    return attn_fail(ATTN_INVALID_ARGUMENT, "training: start is %d", (int)o->start);
  if (o->save_dtype != ATTN_F32 && o->save_dtype != ATTN_BF16 && o->save_dtype != ATTN_F16)
    return attn_fail(ATTN_UNSUPPORTED,
                     "training: save_dtype is %s, expected float32, bfloat16 or float16",
                     attn_dtype_name(o->save_dtype));
  return ATTN_OK;
}

/* Copies the caller's options, checks them and settles what was left to choose. */
static attn_status take_options(const attn_training_options *given, run *r) {
  attn_training_options *o = &r->options;
  *o = (attn_training_options)ATTN_TRAINING_OPTIONS_INIT;
  if (!given || given->struct_size < sizeof given->struct_size || given->struct_size > sizeof *o)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "training: options.struct_size is %zu, expected %zu: begin with "
                     "ATTN_TRAINING_OPTIONS_INIT",
                     given ? given->struct_size : 0, sizeof *o);
  memcpy(o, given, given->struct_size);
  ATTN_TRY(check_counts(o));
  ATTN_TRY(check_places(o));
  const int64_t longest_warmup = 500;
  if (o->warmup < 0) o->warmup = o->steps / 20 < longest_warmup ? o->steps / 20 : longest_warmup;
  if (o->decay < 0) o->decay = o->steps / 5;
  r->schedule = (attn_schedule){.peak = o->learning_rate,
                                .floor = o->final_rate,
                                .warmup = o->warmup,
                                .total = o->steps,
                                .decay = o->decay};
  ATTN_TRY(attn_schedule_parse(o->schedule, &r->schedule.kind));
  return attn_schedule_check(&r->schedule);
}

/* Setting up ------------------------------------------------------------------------------------
 */

/* Of the weights that a run starts from; 0 for fresh ones, which configuration and seed give. */
static uint64_t starting_weights(const run *r) {
  uint64_t value = ATTN_HASH_START;
  for (int64_t i = 0; r->options.model && i < r->model->parameter_count; ++i) {
    const attn_parameter *p = &r->model->parameters[i];
    const attn_block_format *format = p->blocks ? attn_block_get_format(p->block_type) : NULL;
    size_t count = (size_t)attn_tensor_count(&p->value);
    if (format)
      value = attn_hash(value, p->blocks, count / (size_t)format->elements * (size_t)format->bytes);
    else
      value = attn_hash(value, p->value.data, count * attn_dtype_size(p->value.dtype));
  }
  return r->options.model ? value : 0;
}

/* Makes what is to be trained trainable: adapters, or everything. */
static attn_status choose_trained(run *r) {
  const attn_training_options *o = &r->options;
  if (o->lora) {
    r->starting_weights = starting_weights(r);
    return attn_model_attach_lora(r->model, o->lora, o->seed);
  }
  ATTN_TRY(attn_model_make_trainable(r->model));
  r->starting_weights = starting_weights(r);
  return ATTN_OK;
}

static int64_t count_numbers(attn_parameter *const *list, int64_t count) {
  int64_t numbers = 0;
  for (int64_t i = 0; i < count; ++i) numbers += attn_tensor_count(&list[i]->value);
  return numbers;
}

static attn_status list_parameters(run *r) {
  r->parameters = attn_alloc_array((size_t)attn_model_count_all(r->model), sizeof *r->parameters);
  if (!r->parameters) return ATTN_OUT_OF_MEMORY;
  r->numbers = count_numbers(r->parameters, attn_model_list_all(r->model, r->parameters));
  r->trained_count = attn_model_list_trained(r->model, r->parameters);
  r->trained_numbers = count_numbers(r->parameters, r->trained_count);
  return ATTN_OK;
}

static attn_status open_model(run *r) {
  const attn_training_options *o = &r->options;
  const char *config = o->config ? o->config : attn_training_default_config();
  ATTN_TRY(o->model ? attn_model_load(o->model, o->compute, &r->model)
                    : attn_model_create(config, o->seed, o->compute, &r->model));
  ATTN_TRY(attn_model_check_decoder(r->model, "training"));
  ATTN_TRY(attn_training_data_fit(&r->data, r->model));
  ATTN_TRY(choose_trained(r));
  ATTN_TRY(attn_model_move(r->model, o->device));
  ATTN_TRY(list_parameters(r));
  attn_adamw adamw = {.beta1 = o->beta1,
                      .beta2 = o->beta2,
                      .epsilon = o->epsilon,
                      .weight_decay = o->weight_decay,
                      .clip = o->clip};
  return attn_optimiser_create(&adamw, r->parameters, r->trained_count, &r->optimiser);
}

static const double gpu_activations = 6.82e9;

/* Of a token. */
static double activation_bytes(const run *r) {
  const attn_model_config *config = &r->model->config;
  int64_t whole = config->layer_count - r->checkpoints - r->lean;
  int64_t again = r->checkpoints + r->lean > 0;
  return (double)config->hidden *
         (double)((whole + again) * ACTIVATION_BYTES + r->lean * LEAN_BYTES +
                  r->checkpoints * INPUT_BYTES + BACKWARD_BYTES);
}

static double piece_bytes(const run *r) {
  return activation_bytes(r) * (double)r->piece * (double)r->options.length;
}

static void choose_piece(run *r) {
  const attn_training_options *o = &r->options;
  int64_t layers = r->model->config.layer_count;
  bool gpu = attn_is_cuda(o->device);
  r->checkpoints = o->checkpoint_activations ? layers : 0;
  int64_t tokens = THREAD_TOKENS * (int64_t)attn_get_threads();
  if (gpu) {
    double most = gpu_activations / activation_bytes(r);
    tokens = most < MOST_GPU_TOKENS ? (int64_t)most : MOST_GPU_TOKENS;
    if (tokens < ENOUGH_GPU_TOKENS) tokens = ENOUGH_GPU_TOKENS;
  }
  r->piece = tokens / o->length;
  if (r->piece < 1) r->piece = 1;
  if (r->piece > o->batch) r->piece = o->batch;
  while (gpu && r->checkpoints < layers && piece_bytes(r) > gpu_activations) {
    if (r->lean + r->checkpoints < layers)
      ++r->lean;
    else
      ++r->checkpoints, --r->lean;
  }
}

static attn_status allocate(run *r) {
  const attn_training_options *o = &r->options;
  choose_piece(r);
  size_t rows = (size_t)(o->batch * o->accumulation * o->length);
  r->inputs = attn_alloc_array(rows, sizeof *r->inputs);
  r->targets = attn_alloc_array(rows, sizeof *r->targets);
  r->checkpoint = attn_path_join(o->output, "training.safetensors");
  r->svg = attn_path_join(o->output, "loss.svg");
  r->csv = attn_path_join(o->output, "loss.csv");
  if (!r->inputs || !r->targets || !r->checkpoint || !r->svg || !r->csv) return ATTN_OUT_OF_MEMORY;
  int64_t validations = o->steps < MOST_VALIDATIONS ? o->steps : MOST_VALIDATIONS;
  ATTN_TRY(attn_history_create(o->steps, validations, &r->history));
  ATTN_TRY(attn_graph_create_on(o->device, o->compute, &r->graph));
  const double margin = 1.05; /* tables, factors, workspaces */
  if (attn_is_cuda(o->device)) attn_graph_reserve(r->graph, (size_t)(margin * piece_bytes(r)));
  return ATTN_OK;
}

/* The names say which matrices are adapted, and what is trained besides. */
static void identify_lora(run *r) {
  static const char *const kinds[] = {"lora", "rslora", "dora"};
  const attn_lora_options *lora = r->options.lora;
  uint64_t names = ATTN_HASH_START;
  for (int64_t i = 0; i < r->trained_count; ++i)
    names = attn_hash(names, r->parameters[i]->name, strlen(r->parameters[i]->name) + 1);
  attn_identity_text(&r->identity, "lora", kinds[lora->kind]);
  attn_identity_integer(&r->identity, "lora_rank", lora->rank);
  attn_identity_number(&r->identity, "lora_alpha", lora->alpha);
  attn_identity_hash(&r->identity, "lora_parameters", names);
}

static attn_status identify(run *r) {
  const attn_training_options *o = &r->options;
  attn_identity *id = &r->identity;
  attn_identity_hash(id, "starting_weights", r->starting_weights);
  attn_identity_integer(id, "seed", (int64_t)o->seed);
  attn_identity_text(id, "compute", attn_dtype_name(o->compute));
  if (attn_is_cuda(o->device)) attn_identity_text(id, "device", "cuda");
  attn_training_data_identify(&r->data, id);
  attn_identity_integer(id, "steps", o->steps);
  attn_identity_integer(id, "batch", o->batch);
  attn_identity_integer(id, "length", o->length);
  attn_identity_integer(id, "accumulation", o->accumulation);
  attn_identity_text(id, "schedule", attn_schedule_name(r->schedule.kind));
  attn_identity_number(id, "learning_rate", o->learning_rate);
  attn_identity_number(id, "final_rate", o->final_rate);
  attn_identity_integer(id, "warmup", o->warmup);
  attn_identity_integer(id, "decay", o->decay);
  attn_identity_number(id, "beta1", o->beta1);
  attn_identity_number(id, "beta2", o->beta2);
  attn_identity_number(id, "epsilon", o->epsilon);
  attn_identity_number(id, "weight_decay", o->weight_decay);
  attn_identity_number(id, "clip", o->clip);
  attn_identity_integer(id, "validation_windows", o->validation_windows);
  if (o->lora) identify_lora(r);
  return attn_identity_config(id, r->model->config.json);
}

static attn_status resume(run *r) {
  attn_training_start start = r->options.start;
  if (start == ATTN_START_FRESH) return ATTN_OK;
  if (start == ATTN_START_AUTO && !attn_path_exists(r->checkpoint)) return ATTN_OK;
  attn_status status = attn_checkpoint_read(r->checkpoint, &r->state, &r->identity);
  if (status == ATTN_OK) r->first_step = r->state.step;
  return status;
}

static attn_status set_up(const attn_training_options *options, run *r) {
  ATTN_TRY(take_options(options, r));
  ATTN_TRY(attn_training_data_open(&r->options, &r->data));
  ATTN_TRY(open_model(r));
  ATTN_TRY(allocate(r));
  ATTN_TRY(identify(r));
  r->state = (attn_run_state){.model = r->model,
                              .parameters = r->parameters,
                              .parameter_count = r->trained_count,
                              .optimiser = r->optimiser,
                              .history = &r->history};
  ATTN_TRY(resume(r));
  return attn_make_directories(r->options.output);
}

static void tear_down(run *r) {
  attn_graph_destroy(r->graph);
  attn_history_free(&r->history);
  attn_identity_free(&r->identity);
  attn_optimiser_destroy(r->optimiser);
  attn_model_destroy(r->model);
  attn_training_data_close(&r->data);
  attn_free(r->parameters);
  attn_free(r->inputs);
  attn_free(r->targets);
  attn_free(r->checkpoint);
  attn_free(r->svg);
  attn_free(r->csv);
}

/* Losses ----------------------------------------------------------------------------------------
 */

/* The loss variable of the windows from number `first` of r->inputs and r->targets on; its value in
 * *loss. share: the scale that backward will start with. */
static attn_status forward(run *r, int64_t first, int64_t count, int64_t length, bool recording,
                           double share, attn_var **var, double *loss) {
  attn_graph_reset(r->graph, recording);
  attn_graph_expect(r->graph, share);
  attn_layout layout = attn_layout_equal(count, length);
  *var = attn_decoder_loss(r->graph, r->model, &layout, r->inputs + first * length,
                           r->targets + first * length, recording ? r->checkpoints : 0,
                           recording ? r->lean : 0);
  ATTN_TRY(attn_graph_status(r->graph));
  *loss = attn_tensor_get(&(*var)->value, (int64_t[]){0});
  return ATTN_OK;
}

/* The mean loss of the windows of a validation; NaN when there are none. */
static attn_status validate(run *r, double *mean) {
  int64_t length, windows = attn_training_data_validations(&r->data, &length);
  double sum = 0;
  *mean = NAN;
  if (windows == 0) return ATTN_OK;
  for (int64_t first = 0; first < windows; first += r->piece) {
    int64_t count = windows - first < r->piece ? windows - first : r->piece;
    ATTN_TRY(attn_training_data_validation(&r->data, first, count, r->inputs, r->targets));
    attn_var *var;
    double loss;
    ATTN_TRY(forward(r, 0, count, length, false, 0, &var, &loss));
    sum += loss * (double)count;
  }
  *mean = sum / (double)windows;
  attn_history_add_validation(&r->history, r->state.step, *mean);
  return ATTN_OK;
}

/* One step --------------------------------------------------------------------------------------
 */

static bool asked_to_stop(run *r) {
  if (r->options.interrupt && *r->options.interrupt) r->stop = true;
  return r->stop;
}

/* Adds the share of the gradient and of *loss of the micro-batch that begins with window `start`;
 * stops when the loss is not finite. */
static attn_status micro_batch(run *r, int64_t start, double *loss) {
  const attn_training_options *o = &r->options;
  for (int64_t first = 0; first < o->batch; first += r->piece) {
    int64_t count = o->batch - first < r->piece ? o->batch - first : r->piece;
    double share = (double)count / (double)o->batch, part;
    attn_var *var;
    ATTN_TRY(forward(r, start + first, count, o->length, true, share, &var, &part));
    *loss += share * part / (double)o->accumulation;
    if (!isfinite(*loss)) return ATTN_OK;
    ATTN_TRY(attn_graph_backward(r->graph, var, share));
  }
  return ATTN_OK;
}

/* Sums the gradients of all micro-batches. *loss: their mean; not finite as soon as one of them is
 * not. Leaves early, with ATTN_INTERRUPTED, when the caller wants to stop. */
static attn_status accumulate(run *r, double *loss) {
  const attn_training_options *o = &r->options;
  ATTN_TRY(attn_training_data_step(&r->data, r->state.step, o->batch * o->accumulation, r->inputs,
                                   r->targets));
  if (!r->zeroed) attn_optimiser_zero_gradients(r->optimiser);
  r->zeroed = false;
  *loss = 0;
  for (int64_t m = 0; m < o->accumulation; ++m) {
    if (asked_to_stop(r)) return attn_fail(ATTN_INTERRUPTED, "training: stopped by the caller");
    ATTN_TRY(micro_batch(r, m * o->batch, loss));
    if (!isfinite(*loss)) return ATTN_OK;
  }
  return ATTN_OK;
}

/* Counts a step whose loss or gradient is not finite; too many in a row end the run. */
static attn_status skip_step(run *r, double loss) {
  ++r->state.skipped;
  if (++r->state.skipped_in_row < MOST_SKIPPED_IN_ROW) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "training: the loss (%g) or its gradient was not finite in %d steps in a row, "
                   "up to step %lld: try a lower learning rate or a longer warm-up; the last "
                   "checkpoint is kept",
                   loss, MOST_SKIPPED_IN_ROW, (long long)r->state.step + 1);
}

static attn_status step(run *r, attn_training_progress *report) {
  attn_step_info info = {.norm = NAN};
  double loss, rate = attn_schedule_rate(&r->schedule, r->state.step);
  ATTN_TRY(accumulate(r, &loss));
  bool finite = isfinite(loss);
  if (finite) {
    attn_status status =
        attn_optimiser_step(r->optimiser, rate, 1 / (double)r->options.accumulation, &info);
    finite = status == ATTN_OK;
    if (!finite && isfinite(attn_optimiser_norm(r->optimiser))) return status;
  }
  r->zeroed = finite && attn_optimiser_zeroes(r->optimiser);
  if (finite)
    r->state.skipped_in_row = 0;
  else
    ATTN_TRY(skip_step(r, loss));
  attn_history_add(&r->history, finite ? loss : NAN);
  ++r->state.step;
  report->loss = loss;
  report->gradient_norm = info.norm;
  report->learning_rate = rate;
  return ATTN_OK;
}

/* Files -----------------------------------------------------------------------------------------
 */

/* The checkpoint first: it is what a run continues from; the rest can be made from it. */
static attn_status save(run *r) {
  const attn_training_options *o = &r->options;
  ATTN_TRY(attn_checkpoint_write(r->checkpoint, &r->state, &r->identity));
  if (o->lora) ATTN_TRY(attn_model_save_lora(r->model, o->lora, o->model, o->output));
  if (!o->lora || o->lora_merge) ATTN_TRY(attn_model_save(r->model, o->output, o->save_dtype));
  if (r->history.steps == 0) return ATTN_OK; /* nothing to draw */
  ATTN_TRY(attn_history_write_csv(&r->history, r->csv));
  if (isnan(attn_history_smoothed(&r->history))) return ATTN_OK;
  return attn_history_write_svg(&r->history, r->svg);
}

/* Reports ---------------------------------------------------------------------------------------
 */

static double tokens_done(const run *r) {
  const attn_training_options *o = &r->options;
  return (double)r->state.step * (double)o->batch * (double)o->accumulation * (double)o->length;
}

static void write_line(const run *r, const attn_training_progress *p, char line[LINE_SIZE]) {
  char details[160];
  int used = snprintf(details, sizeof details, "step %lld/%lld  loss %.3f", (long long)p->step,
                      (long long)p->steps, p->smoothed_loss);
  int64_t last = r->history.validations - 1;
  if (last >= 0)
    used += snprintf(details + used, sizeof details - (size_t)used, "  validation %.3f",
                     r->history.validation[2 * last + 1]);
  if (p->skipped)
    snprintf(details + used, sizeof details - (size_t)used, "  skipped %lld",
             (long long)p->skipped);
  attn_progress_format(&r->speed, "tokens", details, r->options.line_columns, line, LINE_SIZE);
}

static void report_step(run *r, attn_training_progress *p) {
  char line[LINE_SIZE];
  p->step = r->state.step;
  p->steps = r->options.steps;
  p->tokens = (int64_t)tokens_done(r);
  p->smoothed_loss = attn_history_smoothed(&r->history);
  p->tokens_per_second = attn_progress_rate(&r->speed);
  p->seconds_left = attn_progress_left(&r->speed);
  p->best_validation = attn_history_best(&r->history);
  p->skipped = r->state.skipped;
  p->warning = *r->warning ? r->warning : NULL;
  if (!r->progress) return;
  write_line(r, p, line);
  p->line = line;
  if (!r->progress(r->context, p)) r->stop = true;
}

static bool due(int64_t step, int64_t every) {
  return every > 0 && step % every == 0;
}

/* What follows a step: validation, a checkpoint, the report. A checkpoint that cannot be written
 * (a full disk) is a warning here: what was learnt is still in memory, and there is a next time. */
static attn_status after_step(run *r, attn_training_progress *report) {
  const attn_training_options *o = &r->options;
  bool last = r->state.step == o->steps;
  attn_progress_update(&r->speed, tokens_done(r), seconds_now());
  report->validation_loss = NAN;
  if (last || due(r->state.step, o->validation_every))
    ATTN_TRY(validate(r, &report->validation_loss));
  if (!last && due(r->state.step, o->checkpoint_every)) {
    report->checkpointed = save(r) == ATTN_OK;
    snprintf(r->warning, sizeof r->warning, "%s", report->checkpointed ? "" : attn_error_message());
  }
  report_step(r, report);
  return ATTN_OK;
}

static attn_status train(run *r) {
  r->start = seconds_now();
  const attn_training_options *o = &r->options;
  double total = (double)o->steps * (double)o->batch * (double)o->accumulation * (double)o->length;
  r->speed = attn_progress_start(total, tokens_done(r), r->start);
  while (r->state.step < o->steps) {
    attn_training_progress report = {0};
    attn_status status = asked_to_stop(r) ? ATTN_INTERRUPTED : step(r, &report);
    if (status == ATTN_OK) status = after_step(r, &report);
    if (status == ATTN_INTERRUPTED) break;
    ATTN_TRY(status);
  }
  ATTN_TRY(save(r));
  if (r->state.step == o->steps) return ATTN_OK;
  return attn_fail(ATTN_INTERRUPTED,
                   "training: stopped by the caller after step %lld of %lld; run it again to "
                   "continue",
                   (long long)r->state.step, (long long)o->steps);
}

static void fill_result(const run *r, attn_training_result *result) {
  const attn_training_options *o = &r->options;
  double per_step = (double)o->batch * (double)o->accumulation * (double)o->length;
  int64_t last = r->history.validations - 1;
  *result = (attn_training_result){
      .parameters = r->numbers,
      .trained = r->trained_numbers,
      .first_step = r->first_step,
      .steps = r->state.step,
      .tokens = (int64_t)tokens_done(r),
      .skipped = r->state.skipped,
      .loss = attn_history_smoothed(&r->history),
      .validation_loss = last >= 0 ? r->history.validation[2 * last + 1] : NAN,
      .best_validation = attn_history_best(&r->history),
      .seconds = seconds_now() - r->start,
      .peak_bytes = attn_device_peak_bytes(o->device),
      .bytes_per_token = attn_training_data_bytes_per_token(&r->data),
  };
  if (result->seconds > 0)
    result->tokens_per_second =
        (double)(r->state.step - r->first_step) * per_step / result->seconds;
  /* Forward and the gradient of the inputs by all, that of the weights by those that are trained.
   */
  result->flop_per_second =
      (4 * (double)r->numbers + 2 * (double)r->trained_numbers) * result->tokens_per_second;
}

attn_status attn_train(const attn_training_options *options, attn_training_progress_fn progress,
                       void *context, attn_training_result *result) {
  run r = {.progress = progress, .context = context};
  if (result) *result = (attn_training_result){0};
  attn_status status = set_up(options, &r);
  if (status == ATTN_OK) {
    status = train(&r);
    if (result) fill_result(&r, result);
  }
  tear_down(&r);
  return status;
}
