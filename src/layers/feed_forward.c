#include "graph/operations.h"
#include "layers/layers.h"

attn_var *attn_layer_gated_feed_forward(attn_graph *graph, attn_activation f, attn_var *x,
                                        attn_parameter *w1, attn_parameter *w2,
                                        attn_parameter *w3) {
  attn_var *gate = attn_op_linear(graph, x, w1);
  attn_var *up = attn_op_linear(graph, x, w2);
  return attn_op_gated_linear(graph, f, gate, up, w3);
}

static attn_var *linear_with_bias(attn_graph *g, attn_var *x, attn_parameter *w,
                                  attn_parameter *b) {
  attn_var *y = attn_op_linear(g, x, w);
  return b ? attn_op_add_bias(g, y, attn_graph_parameter(g, b)) : y;
}

attn_var *attn_layer_mlp(attn_graph *graph, attn_activation f, attn_var *x, attn_parameter *w1,
                         attn_parameter *b1, attn_parameter *w2, attn_parameter *b2) {
  attn_var *inner = attn_op_activate(graph, f, linear_with_bias(graph, x, w1, b1));
  return linear_with_bias(graph, inner, w2, b2);
}
