/* A spiking LMUFormer that learns which of three tones a sequence of frames has, and says so as
 * soon as it is sure, while the frames still arrive.
 *
 *   example_classify_stream */
#include "attn/classifier.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCH = 16, LENGTH = 48, INPUT = 4, CLASSES = 3, STEPS = 120 };

static const char config[] =
    "{\"model_type\": \"lmuformer\", \"input_size\": 4, \"num_classes\": 3, \"hidden_size\": 16, "
    "\"theta\": 48, \"spiking\": true}";

static void check(attn_status status) {
  if (status == ATTN_OK) return;
  fprintf(stderr, "%s: %s\n", attn_status_name(status), attn_error_message());
  exit(1);
}

/* Frames of a tone, four microphones a little apart. */
static void play(int tone, double phase, float *frames) {
  for (int t = 0; t < LENGTH; ++t)
    for (int c = 0; c < INPUT; ++c)
      frames[t * INPUT + c] = (float)sin(0.25 * (tone + 1) * t + phase + 0.3 * c);
}

int main(void) {
  attn_classifier *classifier;
  attn_classifier_trainer *trainer;
  attn_classifier_stream *stream;
  static float frames[BATCH * LENGTH * INPUT];
  int32_t labels[BATCH];
  double loss = 0;

  check(attn_classifier_create(config, 1, ATTN_F32, &classifier));
  check(attn_classifier_trainer_create(classifier, NULL, &trainer));
  for (int step = 0; step < STEPS; ++step) {
    for (int b = 0; b < BATCH; ++b) {
      labels[b] = (b + step) % CLASSES;
      play(labels[b], 0.7 * b + 0.1 * step, frames + b * LENGTH * INPUT);
    }
    attn_frames batch = {.values = frames, .rows = BATCH * LENGTH, .sequences = BATCH};
    check(attn_classifier_train(trainer, &batch, labels, 5e-3, &loss));
  }
  attn_classifier_trainer_destroy(trainer);
  printf("loss %.3f\n", loss);

  check(attn_classifier_stream_create(classifier, &stream));
  for (int tone = 0; tone < CLASSES; ++tone) {
    int64_t best = 0;
    int t = 0;
    attn_classifier_stream_clear(stream);
    play(tone, 0.4, frames);
    for (; t < LENGTH; ++t) {
      check(attn_classifier_stream_feed(stream, frames + t * INPUT, 1));
      double confidence = attn_classifier_stream_confidence(stream, &best);
      if (attn_classifier_stream_counted(stream) >= 8 && confidence > 0.8) break;
    }
    if (t == LENGTH) check(attn_classifier_stream_finish(stream));
    attn_classifier_stream_confidence(stream, &best);
    printf("tone %d: heard %d after %d of %d frames\n", tone, (int)best, t < LENGTH ? t + 1 : t,
           LENGTH);
  }
  attn_classifier_stream_destroy(stream);
  attn_classifier_destroy(classifier);
  return 0;
}
