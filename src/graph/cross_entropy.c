/* The vocabulary head fused with the loss.
 *
 *   loss = mean over rows of logsumexp(z) - z[target],  z = x w^T + b
 *   dz = (softmax(z) - onehot(target)) / rows,  dx = dz w,  dw += dz^T x,  db += sum over rows of
 * dz
 *
 * by chunks of rows: logits exist for one chunk only. When recording, the gradients are computed in
 * the forward pass, where the logits are at hand, and scaled by the upstream gradient in backward:
 * one product with w less than recomputing the logits. On a GPU, where passes over them count and
 * the upstream gradient is known beforehand (attn_graph_expect), they are final there: nothing is
 * scaled and dw is added up in its place. */
#include "base/status.h"
#include "engines/dense/dense.h"
#include "graph/operations.h"
#include "graph/passes.h"

/* Logits a chunk holds at most: 16 MiB of float32, 512 MiB on a GPU, where products need the rows:
 * the fewer chunks, the fewer times dw is read and written. There rows come in whole tiles. */
enum { CHUNK_LOGITS = 1 << 22, GPU_CHUNK_LOGITS = 1 << 27, GPU_TILE = 256 };

typedef struct cross_entropy_node {
  attn_node node;
  attn_var *x;
  attn_tensor dx; /* for d loss = 1 */
  attn_tensor dw; /* likewise; data is NULL when w is not trained */
  attn_tensor db; /* of the bias, likewise */
  bool final;     /* dx is for the loss that is expected, dw and db have been added */
  attn_parameter *w, *bias;
} cross_entropy_node;

static attn_status final_backward(attn_graph *g, cross_entropy_node *self) {
  if (g->loss != self->node.output)
    return attn_fail(ATTN_INVALID_ARGUMENT, "cross_entropy: backward was expected to start here");
  attn_var *x = self->x;
  if (!self->dx.data) return ATTN_OK;
  if (x->root || x->gradient.data)
    attn_gradient_add(g, x, &self->dx);
  else
    x->gradient = self->dx;
  return g->status;
}

static attn_status cross_entropy_backward(attn_graph *g, attn_node *node) {
  cross_entropy_node *self = (cross_entropy_node *)node;
  if (self->final) return final_backward(g, self);
  const attn_tensor *upstream = &node->output->gradient;
  bool accumulate;
  attn_tensor dx = attn_gradient_of(g, self->x, &accumulate);
  if (dx.data) attn_pass_scale_by(g, &dx, accumulate, upstream, &self->dx);
  if (self->dw.data) attn_pass_scale_by(g, &self->w->gradient, true, upstream, &self->dw);
  if (self->db.data) attn_pass_scale_by(g, &self->bias->gradient, true, upstream, &self->db);
  return g->status;
}

/* z += bias, row by row. */
static void add_bias(attn_graph *g, const attn_tensor *z, const attn_parameter *bias) {
  attn_tensor rows = *z;
  rows.dtype = bias->value.dtype;
  rows.data = bias->value.data;
  rows.stride[0] = 0;
  attn_pass_add(g, z, 1, z, 1, &rows);
}

/* db (+)= the sum of the rows of dz */
static void add_bias_gradient(attn_graph *g, const attn_tensor *db, bool accumulate,
                              const attn_tensor *dz) {
  attn_tensor sum = attn_graph_tensor(g, g->wide, 1, &dz->shape[1]);
  if (!sum.data) return;
  attn_pass_column_dot(g, &sum, dz, NULL);
  attn_add_tensor(g, db, &sum, 1, accumulate);
}

/* One chunk of rows: leaves its losses in `losses`, its gradients in dx, dw and db where present.
 */
static attn_status chunk(attn_graph *g, attn_parameter *w, const attn_parameter *bias,
                         const attn_tensor *x, double cap, const int32_t *targets, double slope,
                         const attn_tensor *dx, const attn_tensor *dw, const attn_tensor *db,
                         bool accumulate, const attn_tensor *losses) {
  int64_t rows = x->shape[0], vocabulary = w->value.shape[0];
  attn_tensor logits = attn_graph_tensor(g, g->wide, 2, (int64_t[]){rows, vocabulary});
  if (!logits.data) return g->status;
  ATTN_TRY(attn_dense_forward(w->weight, x, &logits, false, g->arena));
  if (bias) add_bias(g, &logits, bias);
  if (cap > 0) attn_pass_cap(g, &logits, cap);
  bool trains = dx->data || dw->data || db->data;
  attn_tensor dz = logits;
  if (trains && g->compute != g->wide && g->gpu) { /* in the place of the logits, row by row */
    dz.dtype = g->compute;
    dz.stride[0] *= (int64_t)(attn_dtype_size(g->wide) / attn_dtype_size(g->compute));
  } else if (trains && g->compute != g->wide) {
    dz = attn_graph_tensor(g, g->compute, 2, logits.shape);
  }
  if (!dz.data) return g->status;
  attn_pass_cross_entropy(g, &logits, targets, slope, &dz, losses);
  if (dx->data) ATTN_TRY(attn_dense_backward_input(w->weight, &dz, dx, false, g->arena));
  if (dw->data) ATTN_TRY(attn_dense_backward_weight(&dz, x, dw, accumulate, g->arena));
  if (db->data) add_bias_gradient(g, db, accumulate, &dz);
  return g->status;
}

/* Where the gradient of a parameter that is trained goes. */
static attn_tensor gradient_for(attn_graph *g, const attn_parameter *p, bool final) {
  if (!p || !g->recording || !p->gradient.data) return (attn_tensor){0};
  return final ? p->gradient : attn_graph_tensor_like(g, p->gradient.dtype, &p->value);
}

static attn_var *cross_entropy(attn_graph *graph, attn_var *x, attn_parameter *w,
                               attn_parameter *bias, double cap, const int32_t *targets) {
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
  if (bias && (bias->value.rank != 1 || bias->value.shape[0] != vocabulary))
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "cross_entropy: the bias is not [%lld]",
                           (long long)vocabulary);
  attn_tensor dx = {0};
  if (graph->recording && x->needs_gradient)
    dx = attn_graph_tensor(graph, graph->compute, 2, x->value.shape);
  bool final = graph->gpu && graph->recording && graph->expected != 0;
  attn_tensor dw = gradient_for(graph, w, final), db = gradient_for(graph, bias, final);
  if (dw.data || db.data) loss->needs_gradient = true;
  if (graph->status != ATTN_OK) return NULL;

  attn_tensor rows_x = attn_as_rows(graph, &x->value);
  attn_tensor losses = attn_graph_tensor(graph, ATTN_F64, 1, &rows);
  targets = attn_pass_upload(graph, targets, (size_t)rows * sizeof *targets);
  if (!rows_x.data || !losses.data || !targets) return NULL;
  int64_t step = (graph->gpu ? GPU_CHUNK_LOGITS : CHUNK_LOGITS) / vocabulary;
  if (graph->gpu && step > GPU_TILE) step -= step % GPU_TILE;
  if (step < 1) step = 1;
  double slope = weight * (final ? graph->expected : 1);
  for (int64_t start = 0; start < rows; start += step) {
    int64_t length = rows - start < step ? rows - start : step;
    attn_graph_mark mark = attn_graph_get_mark(graph);
    attn_tensor part_x, part_losses, part_dx = dx;
    attn_status status = attn_tensor_slice(&rows_x, 0, start, length, &part_x);
    if (status == ATTN_OK) status = attn_tensor_slice(&losses, 0, start, length, &part_losses);
    if (status == ATTN_OK && dx.data) status = attn_tensor_slice(&dx, 0, start, length, &part_dx);
    if (status == ATTN_OK)
      status = chunk(graph, w, bias, &part_x, cap, targets + start, slope, &part_dx, &dw, &db,
                     final || start > 0, &part_losses);
    if (status != ATTN_OK) return attn_graph_error(graph, status);
    attn_graph_release(graph, mark);
  }
  attn_pass_total(graph, &value, weight, &losses);
  if (graph->status != ATTN_OK) return NULL;
  cross_entropy_node *node = attn_graph_record(graph, sizeof *node, loss, cross_entropy_backward);
  if (node) {
    node->x = x;
    node->dx = dx;
    node->dw = dw;
    node->db = db;
    node->final = final;
    node->w = w;
    node->bias = bias;
  }
  return loss;
}

attn_var *attn_op_linear_cross_entropy(attn_graph *graph, attn_var *x, attn_parameter *w,
                                       double cap, const int32_t *targets) {
  return cross_entropy(graph, x, w, NULL, cap, targets);
}

attn_var *attn_op_affine_cross_entropy(attn_graph *graph, attn_var *x, attn_parameter *w,
                                       attn_parameter *bias, const int32_t *targets) {
  return cross_entropy(graph, x, w, bias, 0, targets);
}
