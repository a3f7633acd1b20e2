/* What multi-head latent attention needs besides products: heads with channels that all share, and
 * the products by head that its absorbed form is made of. */
#include "engines/dense/dense.h"
#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/layers.h"

/* Channels behind channels ----------------------------------------------------------------------
 */

typedef struct append_node {
  attn_node node;
  attn_var *a, *b;
} append_node;

/* Channels [first, first + count) of x [rows, heads, n] for `heads` heads: one goes to every head.
 */
static attn_tensor channels(const attn_tensor *x, int64_t heads, int64_t first, int64_t count) {
  attn_tensor part = *x;
  part.data = (char *)x->data + first * (int64_t)attn_dtype_size(x->dtype);
  part.shape[1] = heads;
  if (x->shape[1] != heads) part.stride[1] = 0;
  part.shape[2] = count;
  part.stride[2] = 1;
  return part;
}

static attn_status append_backward(attn_graph *g, attn_node *node) {
  append_node *self = (append_node *)node;
  const attn_tensor *dy = &node->output->gradient;
  int64_t heads = dy->shape[1], n = self->a->value.shape[2], m = self->b->value.shape[2];
  attn_tensor of_a = channels(dy, heads, 0, n), of_b = channels(dy, heads, n, m);
  attn_gradient_add(g, self->a, &of_a);
  if (self->b->value.shape[1] == heads) {
    attn_gradient_add(g, self->b, &of_b);
    return g->status;
  }
  attn_tensor sum = attn_graph_tensor_like(g, g->wide, &self->b->value);
  for (int64_t h = 0; h < heads && sum.data; ++h) {
    attn_tensor head;
    ATTN_TRY(attn_tensor_slice(&of_b, 1, h, 1, &head));
    attn_add_tensor(g, &sum, &head, 1, h > 0);
  }
  attn_gradient_add(g, self->b, &sum);
  return g->status;
}

static bool is_heads(const attn_var *x) {
  return x->value.rank == 3 && (x->value.stride[2] == 1 || x->value.shape[2] == 1);
}

attn_var *attn_layer_append_channels(attn_graph *graph, attn_var *a, attn_var *b) {
  if (!a || !b) return NULL;
  char text_a[128], text_b[128];
  if (!is_heads(a) || !is_heads(b) || a->value.shape[0] != b->value.shape[0] ||
      (b->value.shape[1] != 1 && b->value.shape[1] != a->value.shape[1]) ||
      a->value.dtype != b->value.dtype)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE, "append_channels: %s behind %s",
                           attn_shape_text(&b->value, text_b), attn_shape_text(&a->value, text_a));
  int64_t rows = a->value.shape[0], heads = a->value.shape[1];
  int64_t n = a->value.shape[2], m = b->value.shape[2];
  attn_tensor value = attn_graph_tensor(graph, a->value.dtype, 3, (int64_t[]){rows, heads, n + m});
  if (!value.data) return NULL;
  attn_tensor to_a = channels(&value, heads, 0, n), to_b = channels(&value, heads, n, m);
  attn_tensor from_a = channels(&a->value, heads, 0, n);
  attn_tensor from_b = channels(&b->value, heads, 0, m);
  attn_add_tensor(graph, &to_a, &from_a, 1, false);
  attn_add_tensor(graph, &to_b, &from_b, 1, false);
  attn_var *y = attn_graph_result(graph, value, 2, (attn_var *[]){a, b});
  append_node *node = attn_graph_record(graph, sizeof *node, y, append_backward);
  if (node) {
    node->a = a;
    node->b = b;
  }
  return y;
}

/* Products by head ------------------------------------------------------------------------------
 * For a few rows of a decode step: W is read once, row by row, as it is stored; on a GPU, as a
 * batch of products, one a head. */

/* One head of one token. */
static attn_span head_of(const attn_tensor *t, int64_t r, int64_t h) {
  return attn_row(t, 1, r * t->stride[0] + (t->shape[1] == 1 ? 0 : h * t->stride[1]));
}

static attn_span further(attn_span span, int64_t elements) {
  span.data = (char *)span.data + (size_t)elements * attn_dtype_size(span.dtype);
  return span;
}

/* Row i of W: in place, or unpacked from its blocks to `unpacked`. */
static attn_span weight_row(const attn_parameter *w, int64_t i, float *unpacked, bool *failed) {
  if (!w->blocks) return attn_row(&w->value, w->value.stride[0], i);
  *failed |= attn_parameter_row(w, i, unpacked) != ATTN_OK;
  return (attn_span){unpacked, ATTN_F32};
}

/* A number of any dtype that rows have. */
static double number(const attn_graph *g, attn_span x, int64_t c) {
  double one = 1;
  return g->kernels->row_dot(further(x, c), (attn_span){&one, ATTN_F64}, 1);
}

typedef struct by_head {
  attn_tensor value, sums;           /* the result; its rows in the wide dtype, for absorbing */
  float *unpacked;                   /* a row of W for each head */
  int64_t rows, heads, inner, outer; /* W is [heads * inner, outer] */
} by_head;

static bool prepare(attn_graph *g, attn_var *x, const attn_parameter *w, bool absorbs, by_head *b) {
  char text[128];
  if (!x) return false;
  bool fits = is_heads(x) && w->value.rank == 2 && w->value.shape[0] % x->value.shape[1] == 0;
  if (fits) {
    *b = (by_head){.rows = x->value.shape[0], .heads = x->value.shape[1]};
    b->inner = w->value.shape[0] / b->heads;
    b->outer = w->value.shape[1];
    fits = x->value.shape[2] == (absorbs ? b->inner : b->outer);
  }
  if (!fits || g->recording) {
    attn_graph_fail(g, ATTN_INVALID_SHAPE, "products by head: %s with x %s%s", w->name,
                    attn_shape_text(&x->value, text), g->recording ? ", recording" : "");
    return false;
  }
  int64_t shape[3] = {b->rows, b->heads, absorbs ? b->outer : b->inner};
  b->value = attn_graph_tensor(g, g->compute, 3, shape);
  if (g->gpu) return b->value.data != NULL;
  b->sums = attn_graph_tensor(g, g->wide, 3, shape);
  b->unpacked = attn_arena_alloc(g->arena, (size_t)(b->heads * b->outer) * sizeof *b->unpacked);
  if (!b->unpacked) attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  return b->value.data && b->sums.data && b->unpacked;
}

/* y_h = x_h W_h, or x_h W_h^T: x [rows, heads, ..] as a batch of [rows, ..]. */
static attn_var *multiply_on_gpu(attn_graph *g, const attn_tensor *x, const attn_parameter *w,
                                 bool absorbs, const by_head *b) {
  static const int heads_first[3] = {1, 0, 2};
  attn_tensor from, to, matrices, all = attn_weight_values(w->weight);
  if (w->blocks) { /* unpacked for the products */
    all = attn_graph_tensor(g, g->compute, 2, w->value.shape);
    if (!all.data) return NULL;
    attn_pass_expand_blocks(g, &all, 1, w, NULL);
  }
  int64_t shape[3] = {b->heads, b->inner, b->outer};
  attn_cuda_dense *dense;
  attn_status status = attn_gpu_dense(g->gpu, &dense);
  if (status == ATTN_OK) status = attn_tensor_permute(x, heads_first, &from);
  if (status == ATTN_OK) status = attn_tensor_permute(&b->value, heads_first, &to);
  if (status == ATTN_OK) status = attn_tensor_reshape(&all, 3, shape, &matrices);
  for (int64_t r = 0; r < b->rows && status == ATTN_OK; ++r) { /* as they would be one by one */
    attn_tensor x_row, y_row;
    status = attn_tensor_slice(&from, 1, r, 1, &x_row);
    if (status == ATTN_OK) status = attn_tensor_slice(&to, 1, r, 1, &y_row);
    if (status == ATTN_OK)
      status =
          attn_gpu_check(g->gpu, g->gpu->cuda->matmul(dense, &x_row, false, &matrices, !absorbs,
                                                      &y_row, false, attn_gpu_stream(g->gpu)));
  }
  if (status != ATTN_OK) return attn_graph_error(g, status);
  return attn_graph_result(g, b->value, 0, NULL);
}

static attn_var *deliver(attn_graph *g, by_head *b, bool failed) {
  if (failed) return attn_graph_fail(g, ATTN_UNSUPPORTED, "products by head: blocks not unpacked");
  attn_add_tensor(g, &b->value, &b->sums, 1, false);
  return attn_graph_result(g, b->value, 0, NULL);
}

attn_var *attn_layer_absorb(attn_graph *graph, attn_var *x, const attn_parameter *w) {
  by_head b;
  bool failed = false;
  if (!prepare(graph, x, w, true, &b)) return NULL;
  if (graph->gpu) return multiply_on_gpu(graph, &x->value, w, true, &b);
#pragma omp parallel for num_threads(graph->threads) schedule(static) reduction(|| : failed)
  for (int64_t h = 0; h < b.heads; ++h)
    for (int64_t c = 0; c < b.inner; ++c) {
      attn_span row = weight_row(w, h * b.inner + c, b.unpacked + h * b.outer, &failed);
      for (int64_t r = 0; r < b.rows; ++r) {
        attn_span sum = head_of(&b.sums, r, h);
        double factor = number(graph, head_of(&x->value, r, h), c);
        graph->kernels->row_add(sum, factor, row, c ? 1 : 0, c ? sum : (attn_span){0}, b.outer);
      }
    }
  return deliver(graph, &b, failed);
}

attn_var *attn_layer_expand(attn_graph *graph, attn_var *x, const attn_parameter *w) {
  by_head b;
  bool failed = false;
  if (!prepare(graph, x, w, false, &b)) return NULL;
  if (graph->gpu) return multiply_on_gpu(graph, &x->value, w, false, &b);
#pragma omp parallel for num_threads(graph->threads) schedule(static) reduction(|| : failed)
  for (int64_t h = 0; h < b.heads; ++h)
    for (int64_t i = 0; i < b.inner; ++i) {
      attn_span row = weight_row(w, h * b.inner + i, b.unpacked + h * b.outer, &failed);
      for (int64_t r = 0; r < b.rows; ++r) {
        double dot = graph->kernels->row_dot(head_of(&x->value, r, h), row, b.outer);
        attn_span to = further(head_of(&b.sums, r, h), i);
        if (to.dtype == ATTN_F64)
          *(double *)to.data = dot;
        else
          *(float *)to.data = (float)dot;
      }
    }
  return deliver(graph, &b, failed);
}
