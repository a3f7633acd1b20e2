/* A mixture of experts: routing, and the experts of each token.
 *
 * Rows are gathered by expert, so that each expert's weights are read once for all of its rows, and
 * what the experts give is added up row by row in the order of the choice, whatever the threads. */
#include "graph/operations.h"
#include "layers/layers.h"

#include <math.h>
#include <omp.h>
#include <string.h>

enum { MOST_ACTIVE = 64 };

/* Numbers of a row of the wide dtype. */
static double get(const attn_tensor *t, int64_t r, int64_t c) {
  int64_t at = r * t->shape[1] + c;
  return t->dtype == ATTN_F64 ? ((const double *)t->data)[at]
                              : (double)((const float *)t->data)[at];
}

static void set(const attn_tensor *t, int64_t r, int64_t c, double value) {
  int64_t at = r * t->shape[1] + c;
  if (t->dtype == ATTN_F64)
    ((double *)t->data)[at] = value;
  else
    ((float *)t->data)[at] = (float)value;
}

/* Routing ---------------------------------------------------------------------------------------
 */

typedef struct route_node {
  attn_node node;
  attn_var *logits;
  const attn_routing *routing;
  const int32_t *chosen; /* [rows, active] */
  double *scores;        /* [rows, experts] */
} route_node;

static void find_scores(const attn_routing *routing, const attn_tensor *logits, int64_t r,
                        double *scores) {
  double most = get(logits, r, 0), sum = 0;
  for (int64_t e = 1; e < routing->experts; ++e) most = fmax(most, get(logits, r, e));
  for (int64_t e = 0; e < routing->experts; ++e) {
    double z = get(logits, r, e);
    scores[e] = routing->sigmoid ? 1 / (1 + exp(-z)) : exp(z - most);
    sum += scores[e];
  }
  for (int64_t e = 0; e < routing->experts && !routing->sigmoid; ++e) scores[e] /= sum;
}

/* The `count` largest of values[0 .. n), in descending order; of equal ones the first. */
static void choose(const double *values, int64_t n, int64_t count, int32_t *chosen) {
  for (int64_t k = 0; k < count; ++k) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i) {
      bool taken = false;
      for (int64_t j = 0; j < k && !taken; ++j) taken = chosen[j] == i;
      if (!taken && (best < 0 || values[i] > values[best])) best = i;
    }
    chosen[k] = (int32_t)best;
  }
}

/* How much a group of experts promises: its best, or the sum of its two best. */
static double group_value(const attn_routing *routing, const double *merit, int64_t size) {
  int32_t best[2];
  int64_t count = routing->best_two && size > 1 ? 2 : 1;
  choose(merit, size, count, best);
  return merit[best[0]] + (count == 2 ? merit[best[1]] : 0);
}

/* Experts outside of the best groups are out of the question. */
static void leave_best_groups(const attn_routing *routing, double *merit, double *values) {
  int64_t size = routing->experts / routing->groups;
  int32_t best[MOST_ACTIVE];
  for (int64_t i = 0; i < routing->groups; ++i)
    values[i] = group_value(routing, merit + i * size, size);
  choose(values, routing->groups, routing->active_groups, best);
  for (int64_t i = 0; i < routing->groups; ++i) {
    bool kept = false;
    for (int64_t j = 0; j < routing->active_groups && !kept; ++j) kept = best[j] == i;
    for (int64_t e = 0; e < size && !kept; ++e) merit[i * size + e] = -INFINITY;
  }
}

/* scale score_e / (sum of the chosen scores, or 1) */
static double total_of(const attn_routing *routing, const double *scores, const int32_t *chosen) {
  double total = 0;
  if (!routing->normalise) return 1;
  for (int64_t k = 0; k < routing->active; ++k) total += scores[chosen[k]];
  return total + 1e-20;
}

/* d logits of one row from d weights. */
static void route_row_backward(const attn_routing *routing, const double *scores,
                               const int32_t *chosen, const attn_tensor *dw, int64_t r,
                               double *d_scores) {
  double total = total_of(routing, scores, chosen), mean = 0, sum = 0;
  memset(d_scores, 0, (size_t)routing->experts * sizeof *d_scores);
  for (int64_t k = 0; k < routing->active; ++k) mean += get(dw, r, k) * scores[chosen[k]] / total;
  for (int64_t k = 0; k < routing->active; ++k)
    d_scores[chosen[k]] =
        routing->scale / total * (get(dw, r, k) - (routing->normalise ? mean : 0));
  for (int64_t e = 0; e < routing->experts; ++e) sum += d_scores[e] * scores[e];
  for (int64_t e = 0; e < routing->experts; ++e)
    d_scores[e] = routing->sigmoid ? d_scores[e] * scores[e] * (1 - scores[e])
                                   : scores[e] * (d_scores[e] - sum);
}

static attn_status route_backward(attn_graph *g, attn_node *node) {
  route_node *self = (route_node *)node;
  const attn_routing *routing = self->routing;
  attn_tensor dz = attn_graph_tensor_like(g, g->wide, &self->logits->value);
  double *row = attn_arena_alloc(g->arena, (size_t)routing->experts * sizeof *row);
  if (!dz.data || !row) return attn_fail(ATTN_OUT_OF_MEMORY, "experts: no memory for gradients");
  for (int64_t r = 0; r < dz.shape[0]; ++r) {
    route_row_backward(routing, self->scores + r * routing->experts,
                       self->chosen + r * routing->active, &node->output->gradient, r, row);
    for (int64_t e = 0; e < routing->experts; ++e) set(&dz, r, e, row[e]);
  }
  attn_gradient_add(g, self->logits, &dz);
  return g->status;
}

bool attn_routing_fits(const attn_routing *routing) {
  bool some =
      routing->active >= 1 && routing->active <= routing->experts && routing->active <= MOST_ACTIVE;
  if (!some || routing->groups == 0) return some;
  return routing->experts % routing->groups == 0 && routing->active_groups >= 1 &&
         routing->active_groups <= routing->groups && routing->active_groups <= MOST_ACTIVE &&
         routing->active <= routing->experts / routing->groups * routing->active_groups;
}

/* The weights [rows, active] of the chosen experts, wide. */
static attn_var *route(attn_graph *g, const attn_routing *routing, attn_var *logits,
                       const attn_tensor *bias, int32_t *chosen) {
  int64_t rows = logits->value.shape[0], experts = routing->experts;
  attn_tensor weights = attn_graph_tensor(g, g->wide, 2, (int64_t[]){rows, routing->active});
  double *scores = attn_arena_alloc(g->arena, (size_t)(rows * experts) * sizeof *scores);
  double *merit = attn_arena_alloc(g->arena, (size_t)(2 * experts) * sizeof *merit);
  attn_tensor z = attn_as_rows(g, &logits->value);
  if (!weights.data || !z.data) return NULL;
  if (!scores || !merit) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  for (int64_t r = 0; r < rows; ++r) {
    double *row = scores + r * experts;
    int32_t *choice = chosen + r * routing->active;
    find_scores(routing, &z, r, row);
    for (int64_t e = 0; e < experts; ++e) merit[e] = row[e] + (bias ? get(bias, 0, e) : 0);
    if (routing->groups > 1) leave_best_groups(routing, merit, merit + experts);
    choose(merit, experts, routing->active, choice);
    double total = total_of(routing, row, choice);
    for (int64_t k = 0; k < routing->active; ++k)
      set(&weights, r, k, routing->scale * row[choice[k]] / total);
  }
  attn_var *y = attn_graph_result(g, weights, 1, &logits);
  route_node *node = attn_graph_record(g, sizeof *node, y, route_backward);
  if (node) {
    node->logits = logits;
    node->routing = routing;
    node->chosen = chosen;
    node->scores = scores;
  }
  return y;
}

/* Gathering and adding up -----------------------------------------------------------------------
 */

/* Which (row, choice) pairs each expert has: pairs[first[e] .. first[e + 1]), and place[pair],
 * where a pair stands in that list. */
typedef struct arrangement {
  int32_t *first, *pairs, *place;
} arrangement;

static bool arrange(attn_graph *g, const attn_routing *routing, const int32_t *chosen, int64_t rows,
                    arrangement *a) {
  int64_t count = rows * routing->active, experts = routing->experts;
  int32_t *memory =
      attn_arena_alloc_zero(g->arena, (size_t)(2 * count + experts + 2) * sizeof *memory);
  if (!memory) {
    attn_graph_error(g, ATTN_OUT_OF_MEMORY);
    return false;
  }
  *a = (arrangement){memory, memory + experts + 2, memory + experts + 2 + count};
  int32_t *next = a->first + 1; /* becomes the ends, which are the beginnings one further */
  for (int64_t i = 0; i < count; ++i) ++next[chosen[i] + 1];
  for (int64_t e = 0; e < experts; ++e) next[e + 1] += next[e];
  for (int64_t i = 0; i < count; ++i) {
    a->place[i] = next[chosen[i]]++;
    a->pairs[a->place[i]] = (int32_t)i;
  }
  return true;
}

typedef struct gather_node {
  attn_node node;
  attn_var *x;
  const int32_t *pairs;
  int64_t active;
} gather_node;

static attn_status gather_backward(attn_graph *g, attn_node *node) {
  gather_node *self = (gather_node *)node;
  const attn_tensor *dy = &node->output->gradient;
  attn_tensor sum = attn_graph_tensor_like(g, g->wide, &self->x->value);
  if (!sum.data) return g->status;
  ATTN_TRY(attn_tensor_fill(&sum, 0));
  int64_t width = dy->shape[1];
  for (int64_t i = 0; i < dy->shape[0]; ++i) {
    attn_span to = attn_row(&sum, width, self->pairs[i] / self->active);
    g->kernels->row_add(to, 1, to, 1, attn_row(dy, width, i), width);
  }
  attn_gradient_add(g, self->x, &sum);
  return g->status;
}

/* The rows of x that `count` pairs name. */
static attn_var *gather(attn_graph *g, attn_var *x, const int32_t *pairs, int64_t count,
                        int64_t active) {
  attn_tensor from = attn_as_rows(g, &x->value);
  int64_t width = from.shape[1];
  attn_tensor value = attn_graph_tensor(g, x->value.dtype, 2, (int64_t[]){count, width});
  if (!from.data || !value.data) return NULL;
  size_t size = (size_t)width * attn_dtype_size(value.dtype);
  for (int64_t i = 0; i < count; ++i)
    memcpy(attn_row(&value, width, i).data, attn_row(&from, from.stride[0], pairs[i] / active).data,
           size);
  attn_var *y = attn_graph_result(g, value, 1, &x);
  gather_node *node = attn_graph_record(g, sizeof *node, y, gather_backward);
  if (node) {
    node->x = x;
    node->pairs = pairs;
    node->active = active;
  }
  return y;
}

typedef struct mixture_node {
  attn_node node;
  attn_var *weights, **parts; /* what each expert gives; NULL where it has no rows */
  const attn_routing *routing;
  const int32_t *chosen;
  arrangement of;
} mixture_node;

/* Where the answer to pair i is, in a tensor for each expert. */
static attn_span answer(const attn_tensor *tensors, const int32_t *chosen, const arrangement *of,
                        int64_t i) {
  const attn_tensor *t = &tensors[chosen[i]];
  return attn_row(t, t->shape[1], of->place[i] - of->first[chosen[i]]);
}

static attn_status mixture_backward(attn_graph *g, attn_node *node) {
  mixture_node *self = (mixture_node *)node;
  int64_t active = self->routing->active, experts = self->routing->experts;
  attn_tensor dy = attn_as_rows(g, &node->output->gradient);
  attn_tensor dw = attn_graph_tensor_like(g, g->wide, &self->weights->value);
  attn_tensor *values = attn_arena_alloc_zero(g->arena, (size_t)experts * sizeof *values);
  attn_tensor *targets = attn_arena_alloc_zero(g->arena, (size_t)experts * sizeof *targets);
  if (!dy.data || !dw.data || !values || !targets) return ATTN_OUT_OF_MEMORY;
  int64_t rows = dy.shape[0], width = dy.shape[1];
  for (int64_t e = 0; e < experts; ++e) {
    if (!self->parts[e]) continue;
    values[e] = self->parts[e]->value;
    targets[e] = attn_gradient_overwrite(g, self->parts[e]);
  }
  ATTN_TRY(g->status);
  for (int64_t i = 0; i < rows * active; ++i) {
    int64_t r = i / active, k = i % active;
    attn_span from = attn_row(&dy, dy.stride[0], r);
    set(&dw, r, k, g->kernels->row_dot(from, answer(values, self->chosen, &self->of, i), width));
    if (targets[self->chosen[i]].data)
      g->kernels->row_add(answer(targets, self->chosen, &self->of, i),
                          get(&self->weights->value, r, k), from, 0, (attn_span){0}, width);
  }
  for (int64_t e = 0; e < experts; ++e)
    if (targets[e].data) attn_gradient_add(g, self->parts[e], &targets[e]);
  attn_gradient_add(g, self->weights, &dw);
  return g->status;
}

/* y[r] = sum over choices of weight (.) the expert's row, in the dtype of the parts. */
static attn_var *mix(attn_graph *g, const attn_routing *routing, attn_var *weights,
                     attn_var **parts, const int32_t *chosen, const arrangement *of, int64_t width,
                     attn_dtype dtype) {
  int64_t rows = weights->value.shape[0], active = routing->active;
  attn_tensor value = attn_graph_tensor(g, dtype, 2, (int64_t[]){rows, width});
  attn_tensor sums = attn_graph_tensor(g, g->wide, 2, (int64_t[]){g->threads, width});
  attn_tensor *values = attn_arena_alloc_zero(g->arena, (size_t)routing->experts * sizeof *values);
  attn_var **inputs =
      attn_arena_alloc(g->arena, (size_t)(routing->experts + 1) * sizeof(attn_var *));
  if (!value.data || !sums.data) return NULL;
  if (!values || !inputs) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  int input_count = 0;
  inputs[input_count++] = weights;
  for (int64_t e = 0; e < routing->experts; ++e) {
    if (!parts[e]) continue;
    values[e] = parts[e]->value;
    inputs[input_count++] = parts[e];
  }
#pragma omp parallel for num_threads(g->threads)                                                   \
    schedule(static) if (rows * active * width > ATTN_SERIAL_ELEMENTS)
  for (int64_t r = 0; r < rows; ++r) {
    attn_span total = attn_row(&sums, width, omp_get_thread_num());
    for (int64_t k = 0; k < active; ++k)
      g->kernels->row_add(total, get(&weights->value, r, k),
                          answer(values, chosen, of, r * active + k), k ? 1 : 0,
                          k ? total : (attn_span){0}, width);
    g->kernels->row_add(attn_row(&value, width, r), 1, total, 0, (attn_span){0}, width);
  }
  attn_var *y = attn_graph_result(g, value, input_count, inputs);
  mixture_node *node = attn_graph_record(g, sizeof *node, y, mixture_backward);
  if (node) {
    node->weights = weights;
    node->parts = parts;
    node->routing = routing;
    node->chosen = chosen;
    node->of = *of;
  }
  return y;
}

attn_var *attn_layer_experts(attn_graph *graph, attn_activation f, const attn_routing *routing,
                             attn_var *x, attn_var *logits, attn_parameter *bias,
                             attn_parameter *const *experts) {
  if (!x || !logits) return NULL;
  int64_t rows = attn_rows(&x->value), active = routing->active;
  if (!attn_routing_fits(routing) || logits->value.rank != 2 || logits->value.shape[0] != rows ||
      logits->value.shape[1] != routing->experts)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "experts: %lld of %lld, of %lld of %lld groups, do not fit the router",
                           (long long)active, (long long)routing->experts,
                           (long long)routing->active_groups, (long long)routing->groups);
  attn_tensor correction = {0};
  if (bias) {
    correction = attn_graph_tensor(graph, graph->wide, 2, (int64_t[]){1, routing->experts});
    attn_tensor flat = correction;
    flat.rank = 1, flat.shape[0] = routing->experts, flat.stride[0] = 1;
    attn_status status = correction.data ? attn_tensor_copy(&bias->value, &flat) : graph->status;
    if (status != ATTN_OK) return attn_graph_error(graph, status);
  }
  arrangement of;
  int32_t *chosen = attn_arena_alloc(graph->arena, (size_t)(rows * active) * sizeof *chosen);
  attn_var **parts =
      attn_arena_alloc_zero(graph->arena, (size_t)routing->experts * sizeof(attn_var *));
  if (!chosen || !parts) return attn_graph_error(graph, ATTN_OUT_OF_MEMORY);
  attn_var *weights = route(graph, routing, logits, bias ? &correction : NULL, chosen);
  if (!weights || !arrange(graph, routing, chosen, rows, &of)) return NULL;
  for (int64_t e = 0; e < routing->experts; ++e) {
    int64_t count = of.first[e + 1] - of.first[e];
    attn_parameter *const *w = experts + 3 * e;
    if (count == 0) continue;
    attn_var *own = gather(graph, x, of.pairs + of.first[e], count, active);
    parts[e] = attn_layer_gated_feed_forward(graph, f, own, w[0], w[1], w[2]);
    if (!parts[e]) return NULL;
  }
  int64_t width = experts[2]->value.shape[0];
  return mix(graph, routing, weights, parts, chosen, &of, width, graph->compute);
}
