/* Inside a classifier: its parameters and the network that streams and batches share. */
#ifndef ATTN_MODELS_CLASSIFIER_H
#define ATTN_MODELS_CLASSIFIER_H

#include "attn/classifier.h"
#include "graph/operations.h"
#include "models/parameter_list.h"

enum { ATTN_CLASSIFIER_CONVOLUTIONS = 5, ATTN_CLASSIFIER_TAPS = 3 };

typedef struct attn_norm_parameters {
  attn_parameter *weight, *bias, *mean, *variance;
} attn_norm_parameters;

typedef struct attn_classifier_layer {
  attn_parameter *mixer[ATTN_MIXER_PARAMETERS];
  attn_norm_parameters mixer_norm;         /* not of a spiking one, whose mixer has it */
  attn_parameter *up[2], *down[2];         /* weight, bias */
  attn_norm_parameters up_norm, down_norm; /* behind the products; spiking: before them */
} attn_classifier_layer;

struct attn_classifier {
  json_t *config;
  attn_dtype compute;
  int64_t input, classes, hidden, width, layer_count;
  bool spiking;
  double epsilon;
  const attn_mixer *mixer;
  attn_mixer_options options;
  attn_parameter_list list;
  attn_parameter *convolution[ATTN_CLASSIFIER_CONVOLUTIONS]; /* [hidden, 3 inputs] */
  attn_norm_parameters convolution_norm[ATTN_CLASSIFIER_CONVOLUTIONS];
  attn_classifier_layer *layers;
  attn_norm_parameters head_norm; /* spiking */
  attn_parameter *head[2];
  attn_graph *graph; /* of batches */
};

/* Neurons outside of mixers, in the order in which they step, and how many each group has. */
int64_t attn_classifier_neurons(const attn_classifier *classifier);
int64_t attn_classifier_neuron_width(const attn_classifier *classifier, int64_t group);

/* What the head is given, [rows, hidden], for frames x [rows, input], in whole sequences: neurons
 * have fired already. */
attn_var *attn_classifier_features(attn_graph *graph, const attn_classifier *classifier,
                                   const attn_layout *layout, attn_var *x);
/* Scores [sequences, classes], wide. */
attn_var *attn_classifier_scores(attn_graph *graph, const attn_classifier *classifier,
                                 const attn_layout *layout, attn_var *x);
/* Frames as a graph's input and their layout; NULL after an error: ATTN_INVALID_ARGUMENT. */
attn_var *attn_classifier_input(attn_graph *graph, const attn_classifier *classifier,
                                const attn_frames *frames, attn_layout *layout);

#endif
