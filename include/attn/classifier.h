/* Classification of sequences, whole or as they arrive: LMUFormer (arXiv 2402.04882) and its
 * spiking version. Frames (feature vectors: mel bins of speech, one-hot symbols) go in, one score a
 * class comes out.
 *
 *   embedding   4 centred convolutions of 3 frames, each with ReLU and batch norm, and x + a fifth
 *   layers      x + BN(lmu(x)),  x + relu(BN(W2 gelu(BN(W1 x))))
 *   head        the mean over time of W x + b
 *
 * Spiking: x + spiking_lmu(x) and, everywhere else, BN and neurons that fire before a convolution
 * instead of an activation after it. docs/mixers.md describes both mixers.
 *
 * config.json: model_type "lmuformer", input_size, num_classes, hidden_size (required);
 * num_hidden_layers (1), intermediate_size (4 hidden_size), num_attention_heads (1: channels of the
 * memory), memory_dim (hidden_size, spiking twice that), theta (128), spiking (false), spike_tau,
 * spike_threshold, norm_eps (1e-5).
 *
 * On the processor. One classifier, its trainer and its streams belong to one thread at a time. */
#ifndef ATTN_CLASSIFIER_H
#define ATTN_CLASSIFIER_H

#include "attn/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_classifier attn_classifier;

typedef struct attn_classifier_info {
  int64_t input_size, classes, hidden, layers;
  int64_t parameters; /* numbers that are learnt */
  int64_t delay;      /* frames that a stream is behind: one a convolution, five */
  bool spiking;
} attn_classifier_info;

/* A fresh one from the text of a config.json. compute: bfloat16, float32 or float64.
 * ATTN_BAD_FORMAT names a key that is wrong or not known; ATTN_UNSUPPORTED another model_type or
 * dtype; ATTN_OUT_OF_MEMORY. */
ATTN_API attn_status attn_classifier_create(const char *config, uint64_t seed, attn_dtype compute,
                                            attn_classifier **classifier);
/* From a directory with config.json and model.safetensors. Besides: ATTN_NOT_FOUND, ATTN_IO_ERROR,
 * and ATTN_BAD_FORMAT for a tensor that is missing or has another shape. */
ATTN_API attn_status attn_classifier_load(const char *directory, attn_dtype compute,
                                          attn_classifier **classifier);
/* Writes such a directory, made if needed; weights as float32 (of float64 ones, float64). */
ATTN_API attn_status attn_classifier_save(const attn_classifier *classifier, const char *directory);
ATTN_API void attn_classifier_destroy(attn_classifier *classifier); /* NULL is fine */
ATTN_API attn_status attn_classifier_get_info(const attn_classifier *classifier,
                                              attn_classifier_info *info);

/* Sequences of frames, one behind the other: values [rows, input_size]. Equally long ones (rows is
 * a multiple of `sequences`) have no offsets; else offsets [sequences + 1] are cumulative, from 0
 * to rows. No sequence is empty. */
typedef struct attn_frames {
  const float *values;
  int64_t rows, sequences;
  const int32_t *offsets;
} attn_frames;

/* scores [sequences, classes], before any softmax, with running statistics. spike_rate, if not
 * NULL: the share of neurons' steps that were spikes; 0 without neurons. ATTN_INVALID_ARGUMENT. */
ATTN_API attn_status attn_classifier_run(attn_classifier *classifier, const attn_frames *frames,
                                         float *scores, double *spike_rate);

/* Streams: frames one by one or in pieces; states are of fixed size. However frames are cut into
 * pieces, the scores after attn_classifier_stream_finish are those of attn_classifier_run, up to
 * rounding. The classifier must not be trained or destroyed while it has streams. */
typedef struct attn_classifier_stream attn_classifier_stream;
ATTN_API attn_status attn_classifier_stream_create(attn_classifier *classifier,
                                                   attn_classifier_stream **stream);
ATTN_API void attn_classifier_stream_destroy(attn_classifier_stream *stream); /* NULL is fine */
/* Takes `count` frames [count, input_size]. After an error or the end: attn_classifier_stream_clear
 * before anything else. */
ATTN_API attn_status attn_classifier_stream_feed(attn_classifier_stream *stream,
                                                 const float *frames, int64_t count);
/* There are no more frames: what the delay still holds is counted. ATTN_INVALID_ARGUMENT without
 * any frame. */
ATTN_API attn_status attn_classifier_stream_finish(attn_classifier_stream *stream);
/* Back to no frames. */
ATTN_API void attn_classifier_stream_clear(attn_classifier_stream *stream);
/* Frames whose scores are in the running mean: `delay` less than were fed until the end. */
ATTN_API int64_t attn_classifier_stream_counted(const attn_classifier_stream *stream);
/* The running mean [classes]; zeros before anything is counted. For early stopping:
 * attn_classifier_stream_confidence is the largest of their softmax, *best (may be NULL) whose it
 * is. */
ATTN_API void attn_classifier_stream_scores(const attn_classifier_stream *stream, float *scores);
ATTN_API double attn_classifier_stream_confidence(const attn_classifier_stream *stream,
                                                  int64_t *best);

/* Training: AdamW on the mean loss of a batch, whose statistics the batch norms take; the running
 * ones follow. */
typedef enum attn_class_loss {
  ATTN_CLASS_CROSS_ENTROPY = 0, /* -log softmax(scores)[label] */
  ATTN_CLASS_BINARY, /* the paper's: binary cross entropy with logits on one-hot labels, the
                      * mean over classes */
} attn_class_loss;

typedef struct attn_classifier_training {
  size_t struct_size; /* set by ATTN_CLASSIFIER_TRAINING_INIT */
  attn_class_loss loss;
  double beta1, beta2, epsilon, weight_decay, clip; /* AdamW; see attn_training_options */
} attn_classifier_training;

#define ATTN_CLASSIFIER_TRAINING_INIT                                                              \
  {                                                                                                \
    .struct_size = sizeof(attn_classifier_training), .beta1 = 0.9, .beta2 = 0.999,                 \
    .epsilon = 1e-8, .weight_decay = 0.01, .clip = 1.0                                             \
  }

typedef struct attn_classifier_trainer attn_classifier_trainer;
/* The classifier must outlive it, and have no other. */
ATTN_API attn_status attn_classifier_trainer_create(attn_classifier *classifier,
                                                    const attn_classifier_training *options,
                                                    attn_classifier_trainer **trainer);
ATTN_API void attn_classifier_trainer_destroy(attn_classifier_trainer *trainer); /* NULL is fine */
/* One step on a batch: labels [sequences], 0 to classes - 1. *loss (may be NULL) is that before the
 * step. When it or its gradient is not finite nothing is changed: ATTN_INVALID_ARGUMENT. */
ATTN_API attn_status attn_classifier_train(attn_classifier_trainer *trainer,
                                           const attn_frames *frames, const int32_t *labels,
                                           double learning_rate, double *loss);

#ifdef __cplusplus
}
#endif
#endif
