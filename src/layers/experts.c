/* A mixture of experts: routing, and the experts of each token.
 *
 * Rows are gathered by expert, so that each expert's weights are read once for all of its rows, and
 * what the experts give is added up in the order of the experts, whatever the threads. Routing is
 * the processor's work: the loop over experts needs to know how many rows each has. */
#include "graph/operations.h"
#include "graph/passes.h"
#include "layers/layers.h"

#include <math.h>
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

/* [rows, columns] in the processor's memory, until the reset. */
static attn_tensor host_rows(attn_graph *g, attn_dtype dtype, int64_t rows, int64_t columns) {
  attn_tensor made = {0};
  void *memory = attn_arena_alloc(g->arena, (size_t)(rows * columns) * attn_dtype_size(dtype));
  if (!memory) attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  attn_status status = attn_tensor_wrap(memory, dtype, 2, (int64_t[]){rows, columns}, &made);
  if (status != ATTN_OK) attn_graph_error(g, status);
  return made;
}

/* A wide copy of rows for the processor to look at; data is NULL after an error. */
static attn_tensor bring_home(attn_graph *g, const attn_tensor *x) {
  attn_tensor rows = attn_as_rows(g, x), copy = host_rows(g, g->wide, rows.shape[0], rows.shape[1]);
  if (!rows.data || !copy.data) return (attn_tensor){0};
  attn_status status = attn_tensor_copy(&rows, &copy);
  if (status != ATTN_OK) attn_graph_error(g, status);
  return status == ATTN_OK ? copy : (attn_tensor){0};
}

/* And what it made, on the graph's device. */
static attn_tensor send_off(attn_graph *g, const attn_tensor *made) {
  attn_tensor sent = *made;
  size_t bytes = (size_t)attn_tensor_count(made) * attn_dtype_size(made->dtype);
  sent.data = (void *)(uintptr_t)attn_pass_upload(g, made->data, bytes);
  sent.device = g->device;
  return sent;
}

static attn_status route_backward(attn_graph *g, attn_node *node) {
  route_node *self = (route_node *)node;
  const attn_routing *routing = self->routing;
  int64_t rows = attn_rows(&self->logits->value);
  attn_tensor dw = bring_home(g, &node->output->gradient);
  attn_tensor dz = host_rows(g, g->wide, rows, routing->experts);
  double *row = attn_arena_alloc(g->arena, (size_t)routing->experts * sizeof *row);
  if (!dz.data || !dw.data || !row) return ATTN_OUT_OF_MEMORY;
  for (int64_t r = 0; r < dz.shape[0]; ++r) {
    route_row_backward(routing, self->scores + r * routing->experts,
                       self->chosen + r * routing->active, &dw, r, row);
    for (int64_t e = 0; e < routing->experts; ++e) set(&dz, r, e, row[e]);
  }
  attn_tensor sent = send_off(g, &dz);
  if (!sent.data) return g->status;
  attn_gradient_add(g, self->logits, &sent);
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
  attn_tensor weights = host_rows(g, g->wide, rows, routing->active);
  double *scores = attn_arena_alloc(g->arena, (size_t)(rows * experts) * sizeof *scores);
  double *merit = attn_arena_alloc(g->arena, (size_t)(2 * experts) * sizeof *merit);
  attn_tensor z = bring_home(g, &logits->value);
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
  weights = send_off(g, &weights);
  if (!weights.data) return NULL;
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

/* Which (row, choice) pairs each expert has: pairs[first[e] .. first[e + 1]), and their rows;
 * `first` for the processor, the other two as the device reads them. */
typedef struct arrangement {
  int32_t *first;
  const int32_t *pairs, *rows;
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
  int32_t *pairs = memory + experts + 2, *rows_of = pairs + count;
  int32_t *next = memory + 1; /* becomes the ends, which are the beginnings one further */
  for (int64_t i = 0; i < count; ++i) ++next[chosen[i] + 1];
  for (int64_t e = 0; e < experts; ++e) next[e + 1] += next[e];
  for (int64_t i = 0; i < count; ++i) {
    int32_t place = next[chosen[i]]++;
    pairs[place] = (int32_t)i;
    rows_of[place] = (int32_t)(i / routing->active);
  }
  size_t bytes = (size_t)count * sizeof *pairs;
  *a =
      (arrangement){memory, attn_pass_upload(g, pairs, bytes), attn_pass_upload(g, rows_of, bytes)};
  return a->pairs && a->rows;
}

typedef struct gather_node {
  attn_node node;
  attn_var *x;
  const int32_t *rows;
} gather_node;

static attn_status gather_backward(attn_graph *g, attn_node *node) {
  gather_node *self = (gather_node *)node;
  attn_tensor sum = attn_graph_tensor_like(g, g->wide, &self->x->value);
  if (!sum.data) return g->status;
  ATTN_TRY(attn_tensor_fill(&sum, 0));
  attn_pass_scatter_add(g, &sum, 1, &node->output->gradient, self->rows);
  attn_gradient_add(g, self->x, &sum);
  return g->status;
}

/* `count` rows of x. */
static attn_var *gather(attn_graph *g, attn_var *x, const int32_t *rows, int64_t count) {
  attn_tensor from = attn_as_rows(g, &x->value);
  attn_tensor value = attn_graph_tensor(g, x->value.dtype, 2, (int64_t[]){count, from.shape[1]});
  if (!from.data || !value.data) return NULL;
  attn_pass_gather(g, &value, 1, &from, rows);
  attn_var *y = attn_graph_result(g, value, 1, &x);
  gather_node *node = attn_graph_record(g, sizeof *node, y, gather_backward);
  if (node) {
    node->x = x;
    node->rows = rows;
  }
  return y;
}

typedef struct mixture_node {
  attn_node node;
  attn_var *weights, **parts; /* what each expert gives; NULL where it has no rows */
  int64_t experts;
  arrangement of;
} mixture_node;

/* Weights [rows, active] as a table of pairs [rows * active, 1]. */
static attn_tensor by_pair(const attn_tensor *weights) {
  attn_tensor table = *weights;
  table.shape[0] = attn_tensor_count(weights), table.stride[0] = 1;
  table.shape[1] = table.stride[1] = 1;
  return table;
}

/* The weights of one expert's pairs: [count, 1]. */
static attn_tensor weights_of(attn_graph *g, const attn_tensor *weights, const arrangement *of,
                              int64_t e, int64_t count) {
  attn_tensor table = by_pair(weights);
  attn_tensor own = attn_graph_tensor(g, g->wide, 2, (int64_t[]){count, 1});
  if (own.data) attn_pass_gather(g, &own, 1, &table, of->pairs + of->first[e]);
  return own;
}

static attn_status mixture_backward(attn_graph *g, attn_node *node) {
  mixture_node *self = (mixture_node *)node;
  const arrangement *of = &self->of;
  attn_tensor dy = attn_as_rows(g, &node->output->gradient);
  attn_tensor dw = attn_graph_tensor_like(g, g->wide, &self->weights->value), table = by_pair(&dw);
  if (!dy.data || !dw.data) return g->status;
  ATTN_TRY(attn_tensor_fill(&dw, 0));
  for (int64_t e = 0; e < self->experts; ++e) {
    if (!self->parts[e]) continue;
    const attn_tensor *part = &self->parts[e]->value;
    int64_t count = part->shape[0];
    attn_tensor upstream = attn_graph_tensor(g, dy.dtype, 2, part->shape);
    attn_tensor dots = attn_graph_tensor(g, g->wide, 2, (int64_t[]){count, 1}), column = dots;
    attn_tensor own = weights_of(g, &self->weights->value, of, e, count);
    if (!upstream.data || !dots.data || !own.data) return g->status;
    attn_pass_gather(g, &upstream, 1, &dy, of->rows + of->first[e]);
    column.rank = 1;
    attn_pass_row_dot(g, &column, &upstream, part);
    attn_pass_scatter_add(g, &table, 1, &dots, of->pairs + of->first[e]);
    attn_tensor target = attn_gradient_overwrite(g, self->parts[e]);
    if (!target.data) continue;
    attn_pass_scale_rows(g, &target, false, &own, &upstream);
    attn_gradient_add(g, self->parts[e], &target);
  }
  attn_gradient_add(g, self->weights, &dw);
  return g->status;
}

/* y[r] = sum over experts of weight (.) the expert's row, in the compute dtype. */
static attn_var *mix(attn_graph *g, int64_t experts, attn_var *weights, attn_var **parts,
                     const arrangement *of, int64_t width) {
  int64_t shape[2] = {weights->value.shape[0], width};
  attn_tensor value = attn_graph_tensor(g, g->compute, 2, shape);
  attn_tensor total = attn_graph_tensor(g, g->wide, 2, shape);
  attn_var **inputs = attn_arena_alloc(g->arena, (size_t)(experts + 1) * sizeof(attn_var *));
  if (!value.data || !total.data) return NULL;
  if (!inputs) return attn_graph_error(g, ATTN_OUT_OF_MEMORY);
  attn_status status = attn_tensor_fill(&total, 0);
  if (status != ATTN_OK) return attn_graph_error(g, status);
  int input_count = 0;
  inputs[input_count++] = weights;
  for (int64_t e = 0; e < experts; ++e) {
    if (!parts[e]) continue;
    inputs[input_count++] = parts[e];
    const attn_tensor *part = &parts[e]->value;
    attn_tensor scaled = attn_graph_tensor(g, g->wide, 2, part->shape);
    attn_tensor own = weights_of(g, &weights->value, of, e, part->shape[0]);
    if (!scaled.data || !own.data) return NULL;
    attn_pass_scale_rows(g, &scaled, false, &own, part);
    attn_pass_scatter_add(g, &total, 1, &scaled, of->rows + of->first[e]);
  }
  attn_add_tensor(g, &value, &total, 1, false);
  attn_var *y = attn_graph_result(g, value, input_count, inputs);
  mixture_node *node = attn_graph_record(g, sizeof *node, y, mixture_backward);
  if (node) {
    node->weights = weights;
    node->parts = parts;
    node->experts = experts;
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
    correction = host_rows(graph, graph->wide, 1, routing->experts);
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
    attn_var *own = gather(graph, x, of.rows + of.first[e], count);
    parts[e] = attn_layer_gated_feed_forward(graph, f, own, w[0], w[1], w[2]);
    if (!parts[e]) return NULL;
  }
  int64_t width = experts[2]->value.shape[0];
  return mix(graph, routing->experts, weights, parts, &of, width);
}
