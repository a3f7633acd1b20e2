/* Batch normalisation (arXiv 1502.03167): every channel over all rows.
 *
 *   y = w (x - mean) f + b,  f = 1 / sqrt(variance + epsilon)
 *
 * with the statistics of the rows at hand where the statistics are trained (parameter.h), else with
 * the running ones, which makes it affine. With xn = (x - mean) f and g = w dy, sums over rows,
 *
 *   db = sum dy,  dw = sum dy xn,  dx = w f dy, or f (g - (sum g) / rows - xn (sum g xn) / rows)
 *
 * The running statistics' "gradient" is their distance from those of the rows, so that the
 * optimiser's step takes them along: micro-batches, pieces and checkpoints of activations then need
 * no care of their own. */
#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/layers.h"

typedef struct batch_norm_node {
  attn_node node;
  attn_var *x, *weight, *bias;
  attn_tensor mean, variance, factor; /* [n], wide */
  attn_batch_norm norm;
  bool of_batch;
} batch_norm_node;

/* A vector [n] for all rows of `like`. */
static attn_tensor repeated(const attn_tensor *vector, const attn_tensor *like) {
  attn_tensor rows = *like;
  rows.data = vector->data;
  rows.dtype = vector->dtype;
  rows.stride[0] = 0;
  rows.stride[1] = 1;
  return rows;
}

static attn_tensor vector_of(attn_graph *g, int64_t n) {
  return attn_graph_tensor(g, g->wide, 1, &n);
}

/* y = x - mean */
static void centre(attn_graph *g, const attn_tensor *y, const attn_tensor *x,
                   const attn_tensor *mean) {
  attn_tensor rows = repeated(mean, x);
  attn_pass_add(g, y, 1, x, -1, &rows);
}

/* y (+)= a (.) v for every row */
static void scale(attn_graph *g, const attn_tensor *y, bool accumulate, const attn_tensor *a,
                  const attn_tensor *v) {
  attn_tensor rows = repeated(v, y);
  attn_pass_multiply_sum(g, y, accumulate, 1, a, &rows);
}

/* The statistics of the rows x, whose centred values are left in z. */
static void measure(attn_graph *g, const attn_tensor *x, const attn_tensor *z,
                    const attn_tensor *mean, const attn_tensor *variance) {
  double share = 1 / (double)x->shape[0];
  attn_pass_column_dot(g, mean, x, NULL);
  attn_pass_add(g, mean, share, mean, 0, NULL);
  centre(g, z, x, mean);
  attn_pass_column_dot(g, variance, z, z);
  attn_pass_add(g, variance, share, variance, 0, NULL);
}

/* gradient += scale (running - estimate) */
static void add_distance(attn_graph *g, attn_parameter *running, const attn_tensor *estimate,
                         double correction) {
  attn_tensor *to = &running->gradient;
  attn_pass_add(g, to, 1, to, g->scale, &running->value);
  attn_pass_add(g, to, 1, to, -g->scale * correction, estimate);
}

static attn_status batch_norm_backward(attn_graph *g, attn_node *node) {
  batch_norm_node *self = (batch_norm_node *)node;
  const attn_tensor *dy = &node->output->gradient, *x = &self->x->value;
  int64_t rows = x->shape[0], n = x->shape[1];
  attn_tensor z = attn_graph_tensor(g, g->wide, 2, x->shape);
  attn_tensor dw = vector_of(g, n), db = vector_of(g, n), slope = vector_of(g, n);
  if (g->status != ATTN_OK) return g->status;
  centre(g, &z, x, &self->mean);
  scale(g, &z, false, &z, &self->factor); /* xn */
  attn_pass_column_dot(g, &dw, dy, &z);
  attn_pass_column_dot(g, &db, dy, NULL);
  attn_gradient_add(g, self->weight, &dw);
  attn_gradient_add(g, self->bias, &db);
  if (self->of_batch) {
    add_distance(g, self->norm.mean, &self->mean, 1);
    double unbiased = rows > 1 ? (double)rows / (double)(rows - 1) : 1;
    add_distance(g, self->norm.variance, &self->variance, unbiased);
  }
  if (!self->x->needs_gradient) return g->status;
  attn_pass_multiply_sum(g, &slope, false, 1, &self->weight->value, &self->factor);
  if (self->of_batch) {
    double share = 1 / (double)rows;
    scale(g, &z, false, &z, &dw);
    attn_tensor sums = repeated(&db, &z);
    attn_pass_add(g, &z, -share, &z, -share, &sums);
    attn_pass_add(g, &z, 1, &z, 1, dy);
    scale(g, &z, false, &z, &slope);
  } else {
    scale(g, &z, false, dy, &slope);
  }
  attn_gradient_add(g, self->x, &z);
  return g->status;
}

static bool is_vector(const attn_tensor *t, int64_t n) {
  return t->rank == 1 && t->shape[0] == n;
}

static bool fits(attn_graph *g, const attn_var *x, const attn_var *weight, const attn_var *bias,
                 const attn_batch_norm *norm) {
  char text[128];
  int64_t n = x->value.rank == 2 ? x->value.shape[1] : 0;
  bool right = n > 0 && (n == 1 || x->value.stride[1] == 1) && is_vector(&weight->value, n) &&
               is_vector(&bias->value, n) && is_vector(&norm->mean->value, n) &&
               is_vector(&norm->variance->value, n);
  if (!right)
    attn_graph_fail(g, ATTN_INVALID_SHAPE,
                    "batch_norm: x is %s, expected [rows, n] with vectors of n numbers",
                    attn_shape_text(&x->value, text));
  return right;
}

/* A parameter [n] in the wide dtype. */
static void take(attn_graph *g, const attn_tensor *to, const attn_parameter *p) {
  attn_add_tensor(g, to, &p->value, 1, false);
}

attn_var *attn_layer_batch_norm(attn_graph *graph, attn_var *x, attn_var *weight, attn_var *bias,
                                const attn_batch_norm *norm, attn_dtype dtype) {
  if (!x || !weight || !bias || !fits(graph, x, weight, bias, norm)) return NULL;
  int64_t n = x->value.shape[1];
  bool trains = graph->recording || graph->records_later;
  bool of_batch = trains && norm->mean->gradient.data && norm->variance->gradient.data;
  attn_tensor mean = vector_of(graph, n), variance = vector_of(graph, n);
  attn_tensor factor = vector_of(graph, n), slope = vector_of(graph, n);
  attn_tensor value = attn_graph_tensor(graph, dtype, 2, x->value.shape);
  attn_graph_mark mark = attn_graph_get_mark(graph);
  attn_tensor z = attn_graph_tensor(graph, graph->wide, 2, x->value.shape);
  if (graph->status != ATTN_OK) return NULL;
  if (of_batch) {
    measure(graph, &x->value, &z, &mean, &variance);
  } else {
    take(graph, &mean, norm->mean);
    take(graph, &variance, norm->variance);
    centre(graph, &z, &x->value, &mean);
  }
  attn_pass_inverse_root(graph, &factor, &variance, norm->epsilon);
  attn_pass_multiply_sum(graph, &slope, false, 1, &weight->value, &factor);
  scale(graph, &z, false, &z, &slope);
  attn_tensor shifts = repeated(&bias->value, &value);
  attn_pass_add(graph, &value, 1, &z, 1, &shifts);
  attn_graph_release(graph, mark);
  attn_var *y = attn_graph_result(graph, value, 3, (attn_var *[]){x, weight, bias});
  batch_norm_node *node = attn_graph_record(graph, sizeof *node, y, batch_norm_backward);
  if (node) {
    node->x = x;
    node->weight = weight;
    node->bias = bias;
    node->mean = mean;
    node->variance = variance;
    node->factor = factor;
    node->norm = *norm;
    node->of_batch = of_batch;
  }
  return y;
}
