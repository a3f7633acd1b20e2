/* Spikes of leaky integrate-and-fire neurons on the tape (kernels/spikes.h): sequences one by one
 * where they are packed, all at once where they are equally long. */
#include "graph/operations.h"
#include "graph/passes.h"

typedef struct lif_node {
  attn_node node;
  attn_var *x;
  attn_tensor potential;
  attn_lif neuron;
  attn_layout layout;
} lif_node;

enum { TENSORS = 5 };

static void each_sequence(attn_graph *g, const attn_layout *layout, const attn_lif *neuron,
                          const attn_tensor *const all[TENSORS], const attn_tensor *state,
                          bool back) {
  int64_t step = layout->offsets ? 1 : layout->batch;
  for (int64_t b = 0; b < layout->batch; b += step) {
    attn_tensor part[TENSORS];
    const attn_tensor *of[TENSORS] = {0};
    if (attn_layout_length(layout, b) == 0) continue;
    for (int i = 0; i < TENSORS; ++i)
      if (all[i]) {
        part[i] = attn_sequences_of(all[i], layout, b);
        of[i] = &part[i];
      }
    attn_lif_tensors x = {.x = of[0],
                          .spikes = of[1],
                          .potential = of[2],
                          .d_spikes = of[3],
                          .dx = of[4],
                          .state = state,
                          .tau = neuron->tau,
                          .threshold = neuron->threshold};
    if (back)
      attn_pass_lif_backward(g, &x);
    else
      attn_pass_lif(g, &x);
  }
}

static attn_status lif_backward(attn_graph *g, attn_node *node) {
  lif_node *self = (lif_node *)node;
  attn_tensor dx = attn_graph_tensor_like(g, g->wide, &self->x->value);
  if (!dx.data) return g->status;
  const attn_tensor *const all[TENSORS] = {NULL, NULL, &self->potential, &node->output->gradient,
                                           &dx};
  each_sequence(g, &self->layout, &self->neuron, all, NULL, true);
  attn_gradient_add(g, self->x, &dx);
  return g->status;
}

static void count_spikes(attn_graph *g, const attn_tensor *spikes) {
  for (int64_t r = 0; r < spikes->shape[0]; ++r) {
    attn_span row = attn_row(spikes, spikes->stride[0], r);
    g->spikes->fired += g->kernels->row_dot(row, row, spikes->shape[1]); /* 1 times 1 */
  }
  g->spikes->steps += (double)attn_tensor_count(spikes);
}

attn_var *attn_op_lif(attn_graph *graph, const attn_layout *layout, const attn_lif *neuron,
                      attn_var *x, attn_dtype dtype, const attn_tensor *state) {
  if (!x) return NULL;
  char text[128];
  const attn_tensor *in = &x->value;
  bool right = in->rank == 2 && in->shape[0] == layout->rows && in->dtype == graph->wide &&
               (in->stride[1] == 1 || in->shape[1] == 1) && neuron->tau >= 1 &&
               neuron->threshold > 0;
  if (right && state)
    right = layout->batch == 1 && state->rank == 1 && state->shape[0] == in->shape[1] &&
            state->dtype == graph->wide;
  if (!right)
    return attn_graph_fail(graph, ATTN_INVALID_SHAPE,
                           "lif: x is %s, tau %g and the threshold %g, expected [%lld, n], wide, 1 "
                           "or more and above 0%s",
                           attn_shape_text(in, text), neuron->tau, neuron->threshold,
                           (long long)layout->rows,
                           state ? ", and a state [n] of one sequence" : "");
  attn_tensor value = attn_graph_tensor_like(graph, dtype, in), potential = {0};
  attn_var *spikes = attn_graph_result(graph, value, 1, &x);
  bool kept = spikes && spikes->needs_gradient;
  if (kept) potential = attn_graph_tensor_like(graph, graph->wide, in);
  if (graph->status != ATTN_OK) return NULL;
  const attn_tensor *const all[TENSORS] = {in, &value, kept ? &potential : NULL};
  each_sequence(graph, layout, neuron, all, state, false);
  if (graph->spikes && !graph->gpu) count_spikes(graph, &value);
  lif_node *node = attn_graph_record(graph, sizeof *node, spikes, lif_backward);
  if (node) {
    node->x = x;
    node->potential = potential;
    node->neuron = *neuron;
    node->layout = *layout;
  }
  return spikes;
}
