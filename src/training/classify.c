/* Training of classifiers: one batch a step, whole, because its rows are what batch norms measure.
 */
#include "base/memory.h"
#include "base/status.h"
#include "models/classifier.h"
#include "training/optimiser.h"

#include <math.h>
#include <string.h>

struct attn_classifier_trainer {
  attn_classifier *c;
  attn_class_loss loss;
  attn_optimiser *optimiser;
};

/* The loss --------------------------------------------------------------------------------------
 * With scores z [sequences, classes] and y one-hot: the mean over sequences of -log
 * softmax(z)[label], dz = (softmax(z) - y) / sequences; or the mean over all scores of log(1 + e^z)
 * - z y, dz = (sigmoid(z) - y) / scores. */

typedef struct loss_node {
  attn_node node;
  attn_var *z;
  attn_tensor dz; /* for d loss = 1 */
} loss_node;

static attn_status loss_backward(attn_graph *g, attn_node *node) {
  loss_node *self = (loss_node *)node;
  double scale = attn_tensor_get(&node->output->gradient, (int64_t[]){0});
  attn_add_tensor(g, &self->dz, &self->dz, scale, false);
  attn_gradient_add(g, self->z, &self->dz);
  return g->status;
}

/* z becomes dz, times `rows`; the loss of one sequence. */
static double entropy(double *z, int64_t classes, int64_t label) {
  double greatest = z[0], sum = 0, own = z[label];
  for (int64_t k = 1; k < classes; ++k)
    if (z[k] > greatest) greatest = z[k];
  for (int64_t k = 0; k < classes; ++k) sum += exp(z[k] - greatest);
  for (int64_t k = 0; k < classes; ++k) z[k] = exp(z[k] - greatest) / sum - (k == label);
  return greatest + log(sum) - own;
}

static double binary(double *z, int64_t classes, int64_t label) {
  double total = 0;
  for (int64_t k = 0; k < classes; ++k) {
    double y = k == label;
    total += (z[k] > 0 ? z[k] : 0) + log1p(exp(-fabs(z[k]))) - z[k] * y;
    z[k] = (1 / (1 + exp(-z[k])) - y) / (double)classes;
  }
  return total / (double)classes;
}

static attn_var *class_loss(attn_graph *g, attn_class_loss kind, attn_var *z,
                            const int32_t *labels) {
  if (!z) return NULL;
  int64_t rows = z->value.shape[0], classes = z->value.shape[1], one = 1;
  attn_tensor numbers = attn_graph_tensor(g, ATTN_F64, 2, z->value.shape);
  attn_tensor value = attn_graph_tensor(g, g->wide, 1, &one), from;
  if (!numbers.data || !value.data) return NULL;
  attn_status status = attn_tensor_copy(&z->value, &numbers);
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double *row = (double *)numbers.data + r * classes;
    total += (kind == ATTN_CLASS_BINARY ? binary : entropy)(row, classes, labels[r]) / (double)rows;
  }
  for (int64_t i = 0; i < rows * classes; ++i) ((double *)numbers.data)[i] /= (double)rows;
  if (status == ATTN_OK) status = attn_tensor_wrap(&total, ATTN_F64, 1, &one, &from);
  if (status == ATTN_OK) status = attn_tensor_copy(&from, &value);
  if (status != ATTN_OK) return attn_graph_error(g, status);
  attn_var *loss = attn_graph_result(g, value, 1, &z);
  loss_node *node = attn_graph_record(g, sizeof *node, loss, loss_backward);
  if (node) {
    node->z = z;
    node->dz = numbers;
  }
  return loss;
}

/* The trainer -----------------------------------------------------------------------------------
 */

static attn_status take_options(const attn_classifier_training *given,
                                attn_classifier_training *o) {
  *o = (attn_classifier_training)ATTN_CLASSIFIER_TRAINING_INIT;
  if (given) {
    if (given->struct_size < sizeof given->struct_size || given->struct_size > sizeof *o)
      return attn_fail(ATTN_INVALID_ARGUMENT,
                       "classifier training: options.struct_size is %zu, expected %zu: begin with "
                       "ATTN_CLASSIFIER_TRAINING_INIT",
                       given->struct_size, sizeof *o);
    memcpy(o, given, given->struct_size);
  }
  if ((unsigned)o->loss <= ATTN_CLASS_BINARY) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT, "classifier training: loss is %d", (int)o->loss);
}

static attn_status make_optimiser(attn_classifier *c, const attn_classifier_training *o,
                                  attn_optimiser **optimiser) {
  attn_adamw adamw = {.beta1 = o->beta1,
                      .beta2 = o->beta2,
                      .epsilon = o->epsilon,
                      .weight_decay = o->weight_decay,
                      .clip = o->clip};
  ATTN_TRY(attn_parameter_list_add_gradients(&c->list, NULL, NULL));
  return attn_optimiser_create_trained(&adamw, c->list.parameters, c->list.count, optimiser);
}

attn_status attn_classifier_trainer_create(attn_classifier *c,
                                           const attn_classifier_training *options,
                                           attn_classifier_trainer **trainer) {
  attn_classifier_training o;
  if (!c || !trainer)
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier_trainer_create: an argument is NULL");
  *trainer = NULL;
  ATTN_TRY(take_options(options, &o));
  attn_classifier_trainer *t = attn_alloc_zero(sizeof *t);
  if (!t) return ATTN_OUT_OF_MEMORY;
  t->c = c;
  t->loss = o.loss;
  attn_status status = make_optimiser(c, &o, &t->optimiser);
  if (status == ATTN_OK)
    *trainer = t;
  else
    attn_classifier_trainer_destroy(t);
  return status;
}

void attn_classifier_trainer_destroy(attn_classifier_trainer *t) {
  if (!t) return;
  attn_parameter_list_drop_gradients(&t->c->list);
  attn_optimiser_destroy(t->optimiser);
  attn_free(t);
}

attn_status attn_classifier_train(attn_classifier_trainer *t, const attn_frames *frames,
                                  const int32_t *labels, double learning_rate, double *loss) {
  if (!t || !labels)
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier_train: trainer or labels is NULL");
  attn_graph *g = t->c->graph;
  attn_layout layout;
  attn_graph_reset(g, true);
  attn_var *x = attn_classifier_input(g, t->c, frames, &layout);
  ATTN_TRY(attn_graph_status(g));
  for (int64_t b = 0; b < frames->sequences; ++b)
    if (labels[b] < 0 || labels[b] >= t->c->classes)
      return attn_fail(ATTN_INVALID_ARGUMENT,
                       "classifier_train: label %lld is %d, expected 0 to %lld", (long long)b,
                       labels[b], (long long)t->c->classes - 1);
  attn_optimiser_zero_gradients(t->optimiser);
  attn_var *out = class_loss(g, t->loss, attn_classifier_scores(g, t->c, &layout, x), labels);
  ATTN_TRY(attn_graph_status(g));
  double value = attn_tensor_get(&out->value, (int64_t[]){0});
  if (loss) *loss = value;
  if (!isfinite(value))
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier_train: the loss is %g", value);
  ATTN_TRY(attn_graph_backward(g, out, 1));
  return attn_optimiser_step(t->optimiser, learning_rate, 1, NULL);
}
