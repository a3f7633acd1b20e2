/* The memory of a Legendre memory unit, m_t = Abar m_{t-1} + Bbar u_t, whose matrices are fixed
 * (engines/legendre/): products of passes over all chunks of all sequences at once.
 *
 * A sequence is cut into chunks of C tokens. With s the chunk and j the place in it:
 *
 *   start_{s+1} = Abar^C start_s + sum over j of Abar^(C - 1 - j) Bbar u_{s,j}    (chunk by chunk)
 *   m_{s,j} = Abar m_{s,j-1} + Bbar u_{s,j},  m_{s,-1} = start_s                  (all s at once)
 *
 * and back, with l_j = dm_j + Abar^T l_{j+1} as if nothing followed the chunk and J_s what the next
 * chunk's first token hands back:
 *
 *   J_{s-1} = Abar^T l_{s,0} + (Abar^C)^T J_s
 *   du_{s,j} = Bbar . l_{s,j} + (Abar^(C - 1 - j) Bbar) . J_s
 *
 * So a token costs one product with Abar, in C products of as many rows as there are chunks.
 * Chunks begin at fixed tokens, so that what follows does not change a bit. */
#include "engines/plan_cache.h"
#include "graph/operations.h"
#include "graph/passes.h"

#include <string.h>

enum { CHUNK = ATTN_LEGENDRE_CHUNK };

/* Chunks in the order that products want: the first of all sequences, the second of those that have
 * one, and so on; sequences by falling length, so that each group continues the first ones of the
 * group before. */
typedef struct chunks {
  const attn_layout *layout;
  int64_t heads, size;
  int64_t groups;    /* chunks of the longest sequence */
  int64_t *sequence; /* [batch] */
  int64_t *first;    /* [groups + 1]: of each group; the last is the number of chunks */
  int64_t longest;   /* tokens of the longest chunk */
} chunks;

static int64_t chunks_of(const attn_layout *layout, int64_t b) {
  return (attn_layout_length(layout, b) + CHUNK - 1) / CHUNK;
}

static bool order_chunks(attn_graph *g, const attn_layout *layout, int64_t heads, int64_t size,
                         chunks *c) {
  *c = (chunks){.layout = layout, .heads = heads, .size = size};
  int64_t most = (layout->length + CHUNK - 1) / CHUNK;
  c->longest = layout->length < CHUNK ? layout->length : CHUNK;
  c->sequence = attn_arena_alloc(g->arena, (size_t)layout->batch * sizeof(int64_t));
  c->first = attn_arena_alloc(g->arena, (size_t)(most + 2) * sizeof(int64_t));
  if (!c->sequence || !c->first) {
    attn_graph_error(g, ATTN_OUT_OF_MEMORY);
    return false;
  }
  c->groups = most;
  memset(c->first, 0, (size_t)(most + 2) * sizeof(int64_t));
  /* Sorted by counting: how many sequences have n chunks or more, then the place of each. */
  for (int64_t b = 0; b < layout->batch; ++b)
    for (int64_t n = 0; n < chunks_of(layout, b); ++n) ++c->first[n + 1];
  int64_t place = 0;
  for (int64_t n = most; n >= 0; --n)
    for (int64_t b = 0; b < layout->batch && place < layout->batch; ++b)
      if (chunks_of(layout, b) == n) c->sequence[place++] = b;
  for (int64_t n = 0; n < most; ++n) c->first[n + 1] += c->first[n];
  return true;
}

static int64_t group_size(const chunks *c, int64_t s) {
  return c->first[s + 1] - c->first[s];
}

static int64_t rows_of(const chunks *c) {
  return c->first[c->groups] * c->heads;
}

/* Rows [rows, heads, width] by tokens on one side; on the other by chunks: the j-th token of chunk
 * i, head h, has its numbers at j * place + (i * heads + h) * row. */
typedef struct by_chunk {
  attn_tensor tensor;
  int64_t place, row;
} by_chunk;

/* Chunks s .. s + groups - 1 of `batch` sequences, the first of which is the r-th, of `length`
 * tokens: copied from tokens to chunks, or back. */
static void copy_block(attn_graph *g, const chunks *c, const attn_tensor *tokens,
                       const by_chunk *chunked, bool back, int64_t s, int64_t groups, int64_t r,
                       int64_t batch, int64_t length) {
  int64_t heads = c->heads, width = tokens->shape[2], b = c->sequence[r];
  int64_t stride = tokens->stride[0], size = (int64_t)attn_dtype_size(tokens->dtype);
  attn_tensor one = *tokens, other = chunked->tensor;
  const int64_t shape[5] = {groups, batch, length, heads, width};
  const int64_t by_token[5] = {CHUNK * stride, c->layout->length * stride, stride,
                               tokens->stride[1], 1};
  const int64_t by_place[5] = {group_size(c, s) * heads * chunked->row, heads * chunked->row,
                               chunked->place, chunked->row, 1};
  one.rank = other.rank = 5;
  memcpy(one.shape, shape, sizeof shape);
  memcpy(other.shape, shape, sizeof shape);
  memcpy(one.stride, by_token, sizeof by_token);
  memcpy(other.stride, by_place, sizeof by_place);
  one.data = (char *)one.data + (attn_layout_first(c->layout, b) + s * CHUNK) * stride * size;
  other.data = (char *)other.data + (c->first[s] + r) * heads * chunked->row * size;
  attn_add_tensor(g, back ? &one : &other, back ? &other : &one, 1, false);
}

/* All tokens. What chunks have beyond their sequences' ends is made zero on the way there. */
static void copy_tokens(attn_graph *g, const chunks *c, const attn_tensor *tokens,
                        const by_chunk *chunked, bool back) {
  const attn_layout *layout = c->layout;
  if (!back && c->first[c->groups] * CHUNK != layout->rows) {
    attn_status status = attn_tensor_fill(&chunked->tensor, 0);
    if (status != ATTN_OK) attn_graph_error(g, status);
  }
  if (!layout->offsets) {
    int64_t whole = layout->length / CHUNK, rest = layout->length % CHUNK;
    if (whole) copy_block(g, c, tokens, chunked, back, 0, whole, 0, layout->batch, CHUNK);
    if (rest) copy_block(g, c, tokens, chunked, back, whole, 1, 0, layout->batch, rest);
    return;
  }
  for (int64_t s = 0; s < c->groups; ++s)
    for (int64_t r = 0; r < group_size(c, s); ++r) {
      int64_t left = attn_layout_length(layout, c->sequence[r]) - s * CHUNK;
      copy_block(g, c, tokens, chunked, back, s, 1, r, 1, left < CHUNK ? left : CHUNK);
    }
}

/* Rows [from, from + count) of a contiguous matrix. */
static attn_tensor some_rows(const attn_tensor *matrix, int64_t from, int64_t count) {
  attn_tensor rows = *matrix;
  rows.shape[0] = count;
  rows.data = (char *)rows.data + from * rows.stride[0] * (int64_t)attn_dtype_size(rows.dtype);
  return rows;
}

/* The j-th tokens of all chunks, [chunks * heads, size]. */
static attn_tensor at_place(const attn_tensor *z, int64_t j) {
  attn_tensor rows = {0};
  if (attn_tensor_select(z, 0, j, &rows) != ATTN_OK) rows.data = NULL;
  return rows;
}

static attn_tensor batch_of_one(const attn_tensor *matrix) {
  attn_tensor batch = *matrix;
  batch.rank = 3;
  batch.shape[0] = 1;
  batch.stride[0] = matrix->shape[0] * matrix->stride[0];
  for (int i = 0; i < 2; ++i) {
    batch.shape[i + 1] = matrix->shape[i];
    batch.stride[i + 1] = matrix->stride[i];
  }
  return batch;
}

/* y (+)= x W^T, or with `back` y (+)= x W: by the products that sum a row the same way whatever the
 * number of rows, so that a chunk does not depend on how many there are. */
static void multiply(attn_graph *g, const attn_tensor *w, bool back, const attn_tensor *x,
                     const attn_tensor *y, bool accumulate) {
  if (g->status != ATTN_OK || x->shape[0] == 0) return;
  attn_tensor a = batch_of_one(x), b = batch_of_one(w), c = batch_of_one(y);
  attn_status status = attn_dense_batch(&a, &b, !back, &c, accumulate, g->arena);
  if (status != ATTN_OK) attn_graph_error(g, status);
}

/* Bbar for every row of a tensor [.., size]. */
static attn_tensor input_rows(const attn_legendre *l, const attn_tensor *like) {
  attn_tensor rows = *like;
  rows.data = l->input.data;
  for (int i = 0; i < like->rank - 1; ++i) rows.stride[i] = 0;
  rows.stride[like->rank - 1] = 1;
  return rows;
}

/* Chunks' scalars [chunks * heads, C] as [C, chunks * heads]. */
static attn_tensor turned(const attn_tensor *u) {
  attn_tensor t = *u;
  t.shape[0] = u->shape[1], t.stride[0] = u->stride[1];
  t.shape[1] = u->shape[0], t.stride[1] = u->stride[0];
  return t;
}

/* Tokens one by one behind a state: m [rows, heads, size]. */
static void walk(attn_graph *g, const attn_legendre *l, const attn_tensor *u, const attn_tensor *m,
                 const attn_tensor *state) {
  attn_tensor last = *state;
  for (int64_t t = 0; t < u->shape[0] && g->status == ATTN_OK; ++t) {
    attn_tensor now, inputs;
    if (attn_tensor_select(m, 0, t, &now) != ATTN_OK ||
        attn_tensor_select(u, 0, t, &inputs) != ATTN_OK)
      return;
    attn_tensor by = input_rows(l, &now);
    attn_status status = attn_dense_forward(l->step_weight, &last, &now, false, g->arena);
    if (status != ATTN_OK) attn_graph_error(g, status);
    attn_pass_scale_rows(g, &now, true, &inputs, &by);
    last = now;
  }
  attn_add_tensor(g, state, &last, 1, false);
}

/* start [chunks * heads, size] of each chunk. */
static void find_starts(attn_graph *g, const attn_legendre *l, const chunks *c,
                        const attn_tensor *u, const attn_tensor *start, const attn_tensor *state) {
  attn_tensor ends = attn_graph_tensor(g, start->dtype, 2, start->shape);
  attn_tensor first = some_rows(start, 0, c->first[1] * c->heads);
  if (!ends.data) return;
  if (state) {
    attn_add_tensor(g, &first, state, 1, false);
  } else {
    attn_status status = attn_tensor_fill(&first, 0);
    if (status != ATTN_OK) attn_graph_error(g, status);
  }
  multiply(g, &l->sums, false, u, &ends, false);
  for (int64_t s = 0; s + 1 < c->groups && g->status == ATTN_OK; ++s) {
    int64_t count = group_size(c, s + 1) * c->heads;
    attn_tensor from = some_rows(start, c->first[s] * c->heads, count);
    attn_tensor to = some_rows(start, c->first[s + 1] * c->heads, count);
    attn_tensor end = some_rows(&ends, c->first[s] * c->heads, count);
    attn_add_tensor(g, &to, &end, 1, false);
    multiply(g, &l->jump, false, &from, &to, true);
  }
}

static void forward(attn_graph *g, const attn_legendre *l, const attn_layout *layout,
                    const attn_tensor *u, const attn_tensor *m, const attn_tensor *state) {
  chunks c;
  if (!order_chunks(g, layout, u->shape[1], l->size, &c)) return;
  int64_t rows = rows_of(&c);
  attn_tensor inputs = attn_graph_tensor(g, g->wide, 2, (int64_t[]){rows, CHUNK});
  attn_tensor z = attn_graph_tensor(g, g->wide, 3, (int64_t[]){c.longest, rows, c.size});
  if (!inputs.data || !z.data) return;
  attn_tensor scalars = *u; /* [rows, heads, 1] */
  scalars.rank = 3;
  scalars.shape[2] = scalars.stride[2] = 1;
  copy_tokens(g, &c, &scalars, &(by_chunk){inputs, 1, CHUNK}, false);
  attn_tensor by = input_rows(l, &z), factors = turned(&inputs);
  factors.shape[0] = c.longest;
  attn_pass_scale_rows(g, &z, false, &factors, &by);
  if (state || c.groups > 1) {
    attn_tensor start = attn_graph_tensor(g, g->wide, 2, (int64_t[]){rows, c.size});
    attn_tensor first = at_place(&z, 0);
    if (!start.data) return;
    find_starts(g, l, &c, &inputs, &start, state);
    multiply(g, &l->step, false, &start, &first, true);
  }
  for (int64_t j = 1; j < c.longest; ++j) {
    attn_tensor from = at_place(&z, j - 1), to = at_place(&z, j);
    multiply(g, &l->step, false, &from, &to, true);
  }
  if (g->status != ATTN_OK) return;
  copy_tokens(g, &c, m, &(by_chunk){z, rows * c.size, c.size}, true);
  attn_tensor last;
  if (state && attn_tensor_select(m, 0, layout->rows - 1, &last) == ATTN_OK)
    attn_add_tensor(g, state, &last, 1, false);
}

/* Backward --------------------------------------------------------------------------------------
 */

typedef struct legendre_node {
  attn_node node;
  attn_var *u;
  attn_layout layout;
  int64_t size;
  double theta;
} legendre_node;

/* J of each chunk, [chunks * heads, size]; z has l. */
static void find_returns(attn_graph *g, const attn_legendre *l, const chunks *c,
                         const attn_tensor *z, const attn_tensor *back) {
  attn_tensor firsts = at_place(z, 0);
  attn_status status = attn_tensor_fill(back, 0);
  if (status != ATTN_OK) attn_graph_error(g, status);
  for (int64_t s = c->groups - 2; s >= 0 && g->status == ATTN_OK; --s) {
    int64_t next = c->first[s + 1] * c->heads, count = group_size(c, s + 1) * c->heads;
    attn_tensor to = some_rows(back, c->first[s] * c->heads, count);
    attn_tensor own = some_rows(&firsts, next, count), after = some_rows(back, next, count);
    multiply(g, &l->step, true, &own, &to, false);
    multiply(g, &l->jump, true, &after, &to, true);
  }
}

static void backward(attn_graph *g, const attn_legendre *l, const attn_layout *layout,
                     const attn_tensor *dm, const attn_tensor *du) {
  chunks c;
  if (!order_chunks(g, layout, dm->shape[1], l->size, &c)) return;
  int64_t rows = rows_of(&c);
  attn_tensor sums = attn_graph_tensor(g, g->wide, 2, (int64_t[]){rows, CHUNK});
  attn_tensor z = attn_graph_tensor(g, g->wide, 3, (int64_t[]){c.longest, rows, c.size});
  if (!sums.data || !z.data) return;
  copy_tokens(g, &c, dm, &(by_chunk){z, rows * c.size, c.size}, false);
  for (int64_t j = c.longest - 2; j >= 0; --j) {
    attn_tensor from = at_place(&z, j + 1), to = at_place(&z, j);
    multiply(g, &l->step, true, &from, &to, true);
  }
  if (g->status != ATTN_OK) return;
  attn_tensor by = input_rows(l, &z), dots = turned(&sums);
  dots.shape[0] = c.longest;
  attn_pass_row_dot(g, &dots, &z, &by);
  if (c.groups > 1) {
    attn_tensor returns = attn_graph_tensor(g, g->wide, 2, (int64_t[]){rows, c.size});
    if (!returns.data) return;
    find_returns(g, l, &c, &z, &returns);
    int64_t count = c.first[c.groups - 1] * c.heads;
    attn_tensor from = some_rows(&returns, 0, count), to = some_rows(&sums, 0, count);
    multiply(g, &l->sums, true, &from, &to, true);
  }
  if (g->status != ATTN_OK) return;
  attn_tensor scalars = *du;
  scalars.rank = 3;
  scalars.shape[2] = scalars.stride[2] = 1;
  copy_tokens(g, &c, &scalars, &(by_chunk){sums, 1, CHUNK}, true);
}

static attn_status legendre_backward(attn_graph *g, attn_node *node) {
  legendre_node *self = (legendre_node *)node;
  attn_legendre *l;
  ATTN_TRY(attn_plan_cache_legendre(g->plans, g->device, g->wide, self->size, self->theta, &l));
  attn_tensor du = attn_graph_tensor_like(g, g->wide, &self->u->value);
  if (!du.data) return g->status;
  attn_graph_mark mark = attn_graph_get_mark(g);
  backward(g, l, &self->layout, &node->output->gradient, &du);
  attn_graph_release(g, mark);
  attn_gradient_add(g, self->u, &du);
  return g->status;
}

/* -- The operation -- */

static bool fits(attn_graph *g, const attn_layout *layout, const attn_tensor *u, int64_t size,
                 const attn_tensor *state) {
  char text[128];
  bool right = u->rank == 2 && u->shape[0] == layout->rows && u->dtype == g->wide &&
               attn_tensor_is_contiguous(u);
  if (state && right)
    right = layout->batch == 1 && state->rank == 2 && state->shape[0] == u->shape[1] &&
            state->shape[1] == size && state->dtype == g->wide &&
            attn_tensor_is_contiguous(state) && !g->recording;
  if (!right)
    attn_graph_fail(g, ATTN_INVALID_SHAPE,
                    "legendre_memory: u is %s, expected [%lld, heads], wide and contiguous%s",
                    attn_shape_text(u, text), (long long)layout->rows,
                    state ? ", and a state [heads, size] of one sequence, without gradients" : "");
  return right;
}

attn_var *attn_op_legendre_memory(attn_graph *graph, const attn_layout *layout, attn_var *u,
                                  int64_t size, double theta, const attn_tensor *state) {
  if (!u || !fits(graph, layout, &u->value, size, state)) return NULL;
  attn_legendre *l;
  attn_status status =
      attn_plan_cache_legendre(graph->plans, graph->device, graph->wide, size, theta, &l);
  if (status != ATTN_OK) return attn_graph_error(graph, status);
  int64_t shape[3] = {layout->rows, u->value.shape[1], size};
  attn_tensor value = attn_graph_tensor(graph, graph->wide, 3, shape);
  if (!value.data) return NULL;
  attn_graph_mark mark = attn_graph_get_mark(graph);
  if (state && layout->rows <= ATTN_FEW_ROWS)
    walk(graph, l, &u->value, &value, state);
  else
    forward(graph, l, layout, &u->value, &value, state);
  attn_graph_release(graph, mark);
  attn_var *m = attn_graph_result(graph, value, 1, &u);
  legendre_node *node = attn_graph_record(graph, sizeof *node, m, legendre_backward);
  if (node) {
    node->u = u;
    node->layout = *layout;
    node->size = size;
    node->theta = theta;
  }
  return graph->status == ATTN_OK ? m : NULL;
}
