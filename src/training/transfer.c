#include "training/transfer.h"
#include "base/memory.h"
#include "base/status.h"
#include "graph/operations.h"
#include "models/model.h"
#include "tensor/device.h"
#include "training/optimiser.h"
#include "training/schedule.h"

#include <math.h>

/* Tokens that go through a layer at a time: as in training (train.c), the processor's caches hold
 * them, and a GPU's products are large enough. */
enum { CPU_TOKENS = 1024, GPU_TOKENS = 8192 };

static const double weight = 1000; /* of the loss: the learning rates of the papers expect it */

typedef struct transfer {
  const attn_model *teacher;
  attn_model *student;
  const attn_training_data *data;
  const attn_transfer_options *options;
  attn_graph *walk, *work; /* of the teacher's layers; of the two mixers */
  attn_parameter **trained;
  int64_t trained_count, layers; /* layers that differ */
  attn_optimiser *optimiser;
  attn_schedule schedule;
  int32_t *inputs, *targets;
  attn_tensor wanted; /* [rows of a piece, widest]: what a teacher's heads give */
  attn_layout layout; /* of the piece that is under way */
  double loss;
} transfer;

static bool differs(const transfer *t, int64_t layer) {
  return t->teacher->config.layers[layer].mixer != t->student->config.layers[layer].mixer;
}

static attn_var *heads(const transfer *t, const attn_model *model, int64_t layer,
                       const attn_tensor *in) {
  const attn_layer_config *config = &model->config.layers[layer];
  attn_mixer_call call = {.options = &config->options,
                          .parameters = model->layers[layer].mixer,
                          .layout = t->layout,
                          .heads = true};
  return attn_mixer_apply(t->work, config->mixer, &call, attn_graph_input(t->work, in));
}

/* What the teacher's heads give, kept in t->wanted. */
static attn_status ask_teacher(transfer *t, int64_t layer, const attn_tensor *in,
                               attn_tensor *wanted) {
  attn_graph_reset(t->work, false);
  attn_var *y = heads(t, t->teacher, layer, in);
  ATTN_TRY(attn_graph_status(t->work));
  *wanted = t->wanted;
  wanted->shape[0] = y->value.shape[0];
  attn_add_tensor(t->work, wanted, &y->value, 1, false);
  return attn_graph_status(t->work);
}

static attn_status visit(void *context, int64_t layer, const attn_tensor *in) {
  transfer *t = context;
  if (!differs(t, layer)) return ATTN_OK;
  attn_tensor wanted;
  ATTN_TRY(ask_teacher(t, layer, in, &wanted));
  attn_graph_reset(t->work, true);
  const attn_transfer_options *o = t->options;
  double count = (double)(o->batch * o->length) * (double)wanted.shape[1] * (double)t->layers;
  attn_var *given = heads(t, t->student, layer, in);
  attn_var *loss = attn_op_squared_error(t->work, given, &wanted, weight / count);
  ATTN_TRY(attn_graph_status(t->work));
  t->loss += attn_tensor_get(&loss->value, (int64_t[]){0});
  return attn_graph_backward(t->work, loss, 1);
}

/* Forward and backward of a step, some windows at a time. */
static attn_status accumulate(transfer *t, int64_t step) {
  const attn_transfer_options *o = t->options;
  int64_t piece = t->wanted.shape[0] / o->length;
  ATTN_TRY(attn_training_data_step(t->data, step, o->batch, t->inputs, t->targets));
  if (step == 0 || !attn_optimiser_zeroes(t->optimiser))
    attn_optimiser_zero_gradients(t->optimiser);
  t->loss = 0;
  for (int64_t first = 0; first < o->batch; first += piece) {
    int64_t count = o->batch - first < piece ? o->batch - first : piece;
    if (o->interrupt && *o->interrupt) return attn_fail(ATTN_INTERRUPTED, "transfer: stopped");
    t->layout = attn_layout_equal(count, o->length);
    ATTN_TRY(attn_decoder_visit(t->walk, t->teacher, &t->layout, t->inputs + first * o->length,
                                visit, t));
  }
  if (isfinite(t->loss)) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "transfer: the loss of step %lld is %g: try a lower learning rate",
                   (long long)step + 1, t->loss);
}

static attn_status run(transfer *t, attn_transfer_progress_fn progress, void *context) {
  for (int64_t step = 0; step < t->options->steps; ++step) {
    ATTN_TRY(accumulate(t, step));
    ATTN_TRY(attn_optimiser_step(t->optimiser, attn_schedule_rate(&t->schedule, step), 1, NULL));
    if (progress && !progress(context, step + 1, t->loss))
      return attn_fail(ATTN_INTERRUPTED, "transfer: stopped by the caller after step %lld",
                       (long long)step + 1);
  }
  return ATTN_OK;
}

/* Setting up --------------------------------------------------------------------------------------
 */

static attn_status check(const transfer *t) {
  const attn_transfer_options *o = t->options;
  if (o->steps < 0 || o->batch < 1 || o->length < 1 || o->batch > INT32_MAX / o->length)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "transfer: %lld steps of %lld windows of %lld tokens, expected at least 0, 1 "
                     "and 1, and below 2^31 tokens a step",
                     (long long)o->steps, (long long)o->batch, (long long)o->length);
  for (int64_t l = 0; l < t->student->config.layer_count; ++l) {
    const attn_mixer *mixer = t->student->config.layers[l].mixer;
    if (differs(t, l) && !mixer->heads)
      return attn_fail(ATTN_UNSUPPORTED,
                       "transfer: %s does not offer what its heads give: attention cannot be "
                       "transferred to it",
                       mixer->info.name);
  }
  return ATTN_OK;
}

/* Gradients for what is trained. */
static attn_status choose_trained(transfer *t, const bool *fresh) {
  attn_model *model = t->student;
  t->trained = attn_alloc_array((size_t)model->parameter_count, sizeof *t->trained);
  if (!t->trained) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < model->parameter_count; ++i) {
    attn_parameter *p = &model->parameters[i];
    if (!fresh[i]) continue;
    ATTN_TRY(attn_tensor_create_on(model->device, p->value.dtype, p->value.rank, p->value.shape,
                                   &p->gradient));
    t->trained[t->trained_count++] = p;
  }
  if (t->trained_count) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "transfer: the new mixer has no parameters of its own");
}

static attn_status set_up(transfer *t, const bool *fresh) {
  const attn_transfer_options *o = t->options;
  const attn_model_config *config = &t->student->config;
  const attn_adamw adamw = {
      .beta1 = 0.9, .beta2 = 0.999, .epsilon = 1e-8, .weight_decay = 0, .clip = 1};
  ATTN_TRY(check(t));
  ATTN_TRY(choose_trained(t, fresh));
  for (int64_t l = 0; l < config->layer_count; ++l) t->layers += differs(t, l);
  const double tenth = 0.1;
  t->schedule = (attn_schedule){.kind = ATTN_SCHEDULE_COSINE,
                                .peak = o->learning_rate,
                                .floor = tenth,
                                .total = o->steps > 0 ? o->steps : 1};
  ATTN_TRY(attn_schedule_check(&t->schedule));
  ATTN_TRY(attn_optimiser_create(&adamw, t->trained, t->trained_count, &t->optimiser));
  ATTN_TRY(attn_graph_create_on(t->student->device, t->student->compute, &t->walk));
  ATTN_TRY(attn_graph_create_on(t->student->device, t->student->compute, &t->work));
  int64_t tokens = attn_is_cuda(t->student->device) ? GPU_TOKENS : CPU_TOKENS;
  int64_t windows = tokens / o->length > 1 ? tokens / o->length : 1;
  if (windows > o->batch) windows = o->batch;
  const attn_mixer_options *first = &t->teacher->config.layers[0].options;
  const int64_t shape[] = {windows * o->length, first->heads * first->value_dim};
  ATTN_TRY(attn_tensor_create_on(t->student->device, t->student->compute, 2, shape, &t->wanted));
  size_t rows = (size_t)(o->batch * o->length);
  t->inputs = attn_alloc_array(rows, 2 * sizeof *t->inputs);
  if (!t->inputs) return ATTN_OUT_OF_MEMORY;
  t->targets = t->inputs + rows;
  return ATTN_OK;
}

/* The student is for inference again. */
static void tear_down(transfer *t) {
  for (int64_t i = 0; i < t->trained_count; ++i) attn_tensor_destroy(&t->trained[i]->gradient);
  attn_optimiser_destroy(t->optimiser);
  attn_graph_destroy(t->walk);
  attn_graph_destroy(t->work);
  attn_tensor_destroy(&t->wanted);
  attn_free(t->trained);
  attn_free(t->inputs);
}

attn_status attn_transfer(const attn_model *teacher, attn_model *student, const bool *fresh,
                          const attn_training_data *data, const attn_transfer_options *options,
                          attn_transfer_progress_fn progress, void *context, double *loss) {
  transfer t = {
      .teacher = teacher, .student = student, .data = data, .options = options, .loss = NAN};
  attn_status status = set_up(&t, fresh);
  if (status == ATTN_OK) status = run(&t, progress, context);
  *loss = t.loss;
  tear_down(&t);
  return status;
}
