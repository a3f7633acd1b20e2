/* The vocabulary head fused with the loss.
 *
 *   loss = mean over rows of logsumexp(z) - z[target],  z = x w^T
 *   dz = (softmax(z) - onehot(target)) / rows,  dx = dz w,  dw += dz^T x
 *
 * by chunks of rows: logits exist for one chunk only. When recording, the gradients are computed in
 * the forward pass, where the logits are at hand, and scaled by the upstream gradient in backward:
 * one product with w less than recomputing the logits. */
#include "engines/dense/dense.h"
#include "graph/operations.h"

#include <math.h>
#include <string.h>

enum { CHUNK_LOGITS = 1 << 22 }; /* logits a chunk holds at most: 16 MiB of float32 */

typedef struct cross_entropy_node {
  attn_node node;
  attn_var *x;
  attn_tensor dx; /* for d loss = 1 */
  attn_tensor dw; /* likewise; data is NULL when w is not trained */
  attn_parameter *w;
} cross_entropy_node;

static attn_status cross_entropy_backward(attn_graph *g, attn_node *node) {
  cross_entropy_node *self = (cross_entropy_node *)node;
  double upstream = attn_tensor_get(&node->output->gradient, (int64_t[]){0});
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  if (dx.data) attn_add_tensor(g, &dx, &self->dx, upstream, accumulate);
  if (self->dw.data) attn_add_tensor(g, &self->w->gradient, &self->dw, upstream, true);
  return g->status;
}

void attn_cap_tensor(attn_graph *g, const attn_tensor *x, double cap) {
  int64_t count = attn_tensor_count(x);
#pragma omp parallel for num_threads(g->threads) schedule(static) if (count > ATTN_SERIAL_ELEMENTS)
  for (int64_t i = 0; i < count; ++i)
    if (x->dtype == ATTN_F64)
      ((double *)x->data)[i] = cap * tanh(((double *)x->data)[i] / cap);
    else
      ((float *)x->data)[i] = (float)cap * tanhf(((float *)x->data)[i] / (float)cap);
}

/* One chunk of rows: adds its loss to *sum, leaves its gradients in dx and dw where present. */
static attn_status chunk(attn_graph *g, attn_parameter *w, const attn_tensor *x, double cap,
                         const int32_t *targets, double weight, const attn_tensor *dx,
                         const attn_tensor *dw, bool first, double *row_loss, double *sum) {
  int64_t rows = x->shape[0], vocabulary = w->value.shape[0];
  attn_tensor logits = attn_graph_tensor(g, g->wide, 2, (int64_t[]){rows, vocabulary});
  if (!logits.data) return g->status;
  ATTN_TRY(attn_dense_forward(w->weight, x, &logits, false, g->arena));
  if (cap > 0) attn_cap_tensor(g, &logits, cap);
  const attn_kernels *kernels = g->kernels;
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (rows * vocabulary > ATTN_SERIAL_ELEMENTS)
  for (int64_t r = 0; r < rows; ++r) {
    attn_span row = attn_row(&logits, vocabulary, r);
    row_loss[r] = 0;
    if (targets[r] >= 0)
      row_loss[r] = kernels->row_cross_entropy(row, vocabulary, targets[r], weight);
    else /* whatever the logits are, infinite ones too */
      memset(row.data, 0, (size_t)vocabulary * attn_dtype_size(row.dtype));
  }
  for (int64_t r = 0; r < rows; ++r) *sum += row_loss[r];
  if (!dx->data && !dw->data) return ATTN_OK;
  attn_tensor dz = logits;
  if (g->compute != g->wide) {
    dz = attn_graph_tensor(g, g->compute, 2, logits.shape);
    if (!dz.data) return g->status;
    attn_add_tensor(g, &dz, &logits, 1, false);
  }
  if (dx->data) ATTN_TRY(attn_dense_backward_input(w->weight, &dz, dx, false, g->arena));
  if (dw->data) ATTN_TRY(attn_dense_backward_weight(&dz, x, dw, !first, g->arena));
  return ATTN_OK;
}

attn_var *attn_op_linear_cross_entropy(attn_graph *graph, attn_var *x, attn_parameter *w,
                                       double cap, const int32_t *targets) {
  if (!x) return NULL;
  if (cap > 0 && graph->recording)
    return attn_graph_fail(graph, ATTN_UNSUPPORTED,
                           "cross_entropy: capped logits have no gradient yet");
  if (!w->weight || w->value.rank != 2)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "cross_entropy: %s is not a matrix",
                           w->name ? w->name : "the head");
  int64_t rows = x->value.rank == 2 ? x->value.shape[0] : 0, vocabulary = w->value.shape[0];
  if (rows == 0 || x->value.shape[1] != w->value.shape[1] || x->value.dtype != graph->compute)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "cross_entropy: x must be [rows >= 1, %lld] in %s",
                           (long long)w->value.shape[1], attn_dtype_name(graph->compute));
  int64_t counted = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (targets[r] >= vocabulary)
      return attn_graph_fail(graph, ATTN_INVALID_ARGUMENT,
                             "cross_entropy: target %d of row %lld is not below %lld", targets[r],
                             (long long)r, (long long)vocabulary);
    counted += targets[r] >= 0;
  }
  double weight = counted ? 1.0 / (double)counted : 0;

  attn_tensor value = attn_graph_tensor(graph, graph->wide, 1, (int64_t[]){1});
  attn_var *loss = attn_graph_result(graph, value, 1, &x);
  if (!loss) return NULL;
  bool trains = graph->recording && w->gradient.data;
  if (trains) loss->needs_gradient = true;
  attn_tensor dx = {0}, dw = {0};
  if (graph->recording && x->needs_gradient)
    dx = attn_graph_tensor(graph, graph->compute, 2, x->value.shape);
  if (trains) dw = attn_graph_tensor(graph, w->gradient.dtype, 2, w->value.shape);
  if (graph->status != ATTN_OK) return NULL;

  attn_tensor rows_x = attn_as_rows(graph, &x->value);
  int64_t step = CHUNK_LOGITS / vocabulary ? CHUNK_LOGITS / vocabulary : 1;
  double sum = 0;
  for (int64_t start = 0; start < rows; start += step) {
    int64_t length = rows - start < step ? rows - start : step;
    attn_arena_mark mark = attn_arena_get_mark(graph->arena);
    double *row_loss = attn_arena_alloc(graph->arena, (size_t)length * sizeof *row_loss);
    attn_tensor part_x, part_dx = dx;
    attn_status status = row_loss ? ATTN_OK : ATTN_OUT_OF_MEMORY;
    if (status == ATTN_OK) status = attn_tensor_slice(&rows_x, 0, start, length, &part_x);
    if (status == ATTN_OK && dx.data) status = attn_tensor_slice(&dx, 0, start, length, &part_dx);
    if (status == ATTN_OK)
      status = chunk(graph, w, &part_x, cap, targets + start, weight, &part_dx, &dw, start == 0,
                     row_loss, &sum);
    if (status != ATTN_OK) return attn_graph_error(graph, status);
    attn_arena_release(graph->arena, mark);
  }
  attn_status status = attn_tensor_fill(&value, sum * weight);
  if (status != ATTN_OK) return attn_graph_error(graph, status);
  cross_entropy_node *node = attn_graph_record(graph, sizeof *node, loss, cross_entropy_backward);
  if (node) {
    node->x = x;
    node->dx = dx;
    node->dw = dw;
    node->w = w;
  }
  return loss;
}
