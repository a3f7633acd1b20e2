/* What LMUFormer claims, in miniature (docs/claims.md): how well its memory keeps the past, what a
 * streamed frame costs, and how often its neurons fire. Prints tables; takes about a minute.
 *
 *   bench_lmuformer */
#include "attn/base.h"
#include "attn/classifier.h"
#include "base/random.h"
#include "engines/legendre/legendre.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static const double pi = 3.14159265358979323846;

static void need(attn_status status) {
  if (status == ATTN_OK) return;
  fprintf(stderr, "bench_lmuformer: %s\n", attn_error_message());
  exit(1);
}

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The past, read back -----------------------------------------------------------------------------
 */

enum { WAVES = 16, SHORTEST = 16 };

/* Waves of 16 tokens and longer, the same for every memory. */
static double signal(double t) {
  double sum = 0;
  for (int w = 0; w < WAVES; ++w)
    sum += sin(2 * pi * t / (SHORTEST * (1 + 0.37 * w)) + 1.7 * w) * sqrt(2.0 / WAVES);
  return sum;
}

/* P_i(r), shifted Legendre polynomials, by their recurrence. */
static void polynomials(double r, int64_t n, double *p) {
  double x = 2 * r - 1;
  for (int64_t i = 0; i < n; ++i)
    p[i] = i == 0 ? 1
           : i == 1
               ? x
               : ((2.0 * (double)i - 1) * x * p[i - 1] - ((double)i - 1) * p[i - 2]) / (double)i;
}

/* The root mean square of what is read back less what was, over the last theta tokens; the
 * signal's is 1. */
static double delay_error(int64_t n, int theta) {
  double *abar = malloc((size_t)(n * n) * sizeof *abar), *bbar = malloc((size_t)n * sizeof *bbar);
  double *m = calloc((size_t)n, sizeof *m), *next = calloc((size_t)n, sizeof *next);
  double *p = malloc((size_t)n * sizeof *p), sum = 0;
  int64_t count = 0, settled = 6 * (int64_t)theta, end = settled + 200;
  need(attn_legendre_matrices(n, theta, abar, bbar));
  for (int64_t t = 0; t < end; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      next[i] = bbar[i] * signal((double)t);
      for (int64_t j = 0; j < n; ++j) next[i] += abar[i * n + j] * m[j];
    }
    double *swap = m;
    m = next, next = swap;
    for (int tau = 0; t >= settled && t % 10 == 0 && tau <= theta; ++tau) {
      double read = 0, was = signal((double)t + 0.5 - tau);
      polynomials((double)tau / theta, n, p);
      for (int64_t i = 0; i < n; ++i) read += m[i] * p[i];
      sum += (read - was) * (read - was);
      ++count;
    }
  }
  free(abar), free(bbar), free(m), free(next), free(p);
  return sqrt(sum / (double)count);
}

static void delays(void) {
  static const int64_t sizes[] = {4, 8, 16, 32, 64, 128};
  static const int thetas[] = {32, 128, 512};
  printf("Error of the past read back, of a signal of root mean square 1\n\n");
  printf("| memory_dim | theta 32 | theta 128 | theta 512 |\n|---|---|---|---|\n");
  for (int s = 0; s < 6; ++s) {
    printf("| %d |", (int)sizes[s]);
    for (int t = 0; t < 3; ++t) printf(" %.2g |", delay_error(sizes[s], thetas[t]));
    printf("\n");
  }
}

/* A streamed frame -------------------------------------------------------------------------------
 */

/* Multiply-adds of a frame: convolutions, u, the memory, h, its projection, feed-forward, head. */
static double operations(const attn_classifier_info *i, double memory) {
  double h = (double)i->hidden, width = 4 * h;
  return 3 * h * (double)i->input_size + 12 * h * h + h + memory * memory + (memory + h) * h +
         h * h + 2 * h * width + h * (double)i->classes;
}

static void stream(bool spiking, int memory) {
  enum { FRAMES = 512, WARM = 64 };
  char config[512];
  attn_classifier *c;
  attn_classifier_stream *s;
  attn_classifier_info info;
  snprintf(config, sizeof config,
           "{\"model_type\": \"lmuformer\", \"input_size\": 128, \"num_classes\": 35, "
           "\"hidden_size\": 256, \"memory_dim\": %d, \"theta\": 128, \"spiking\": %s}",
           memory, spiking ? "true" : "false");
  need(attn_classifier_create(config, 1, ATTN_F32, &c));
  need(attn_classifier_get_info(c, &info));
  need(attn_classifier_stream_create(c, &s));
  float frame[128];
  attn_random random = {.seed = 5};
  double start = 0;
  for (int t = 0; t < WARM + FRAMES; ++t) {
    if (t == WARM) start = seconds();
    for (int i = 0; i < 128; ++i) frame[i] = (float)attn_random_normal(&random);
    need(attn_classifier_stream_feed(s, frame, 1));
  }
  double each = (seconds() - start) / FRAMES;
  printf("| %s | %.2f M | %.2f M | %.2f ms |\n", spiking ? "spiking" : "plain",
         (double)info.parameters / 1e6, operations(&info, memory) / 1e6, each * 1e3);
  attn_classifier_stream_destroy(s);
  attn_classifier_destroy(c);
}

/* Spikes ------------------------------------------------------------------------------------------
 */

enum { BATCH = 32, LENGTH = 64, INPUT = 8, CLASSES = 8, TESTS = 256 };

/* Which of eight tones a sequence of noise has. */
static void tones(int64_t count, attn_random *random, float *frames, int32_t *labels) {
  for (int64_t b = 0; b < count; ++b) {
    labels[b] = (int32_t)attn_random_below(random, CLASSES);
    double phase = 2 * pi * attn_random_uniform(random);
    for (int64_t i = 0; i < LENGTH * INPUT; ++i) {
      double t = (double)(i / INPUT), tone = sin(0.15 * (labels[b] + 1) * t + phase);
      frames[b * LENGTH * INPUT + i] = (float)(tone + 1.5 * attn_random_normal(random));
    }
  }
}

static int best_of(const float *scores) {
  int best = 0;
  for (int k = 1; k < CLASSES; ++k)
    if (scores[k] > scores[best]) best = k;
  return best;
}

/* Right answers and the mean share of frames that were read, stopping at a confidence. */
static double stop_early(attn_classifier *c, const float *frames, const int32_t *labels,
                         double confidence, double *read) {
  attn_classifier_stream *s;
  int right = 0;
  *read = 0;
  need(attn_classifier_stream_create(c, &s));
  for (int64_t b = 0; b < TESTS; ++b) {
    int64_t t = 0, best = 0;
    bool sure = false;
    attn_classifier_stream_clear(s);
    for (; t < LENGTH && !sure; ++t) {
      need(attn_classifier_stream_feed(s, frames + (b * LENGTH + t) * INPUT, 1));
      sure = attn_classifier_stream_counted(s) > 0 &&
             attn_classifier_stream_confidence(s, &best) > confidence;
    }
    if (!sure) need(attn_classifier_stream_finish(s));
    attn_classifier_stream_confidence(s, &best);
    *read += (double)t / LENGTH / TESTS;
    right += best == labels[b];
  }
  attn_classifier_stream_destroy(s);
  return (double)right / TESTS;
}

static void learn(bool spiking) {
  char config[512];
  attn_classifier *c;
  attn_classifier_trainer *t;
  snprintf(config, sizeof config,
           "{\"model_type\": \"lmuformer\", \"input_size\": %d, \"num_classes\": %d, "
           "\"hidden_size\": 32, \"theta\": %d, \"spiking\": %s}",
           INPUT, CLASSES, LENGTH, spiking ? "true" : "false");
  need(attn_classifier_create(config, 1, ATTN_F32, &c));
  need(attn_classifier_trainer_create(c, NULL, &t));
  float *frames = malloc((size_t)TESTS * LENGTH * INPUT * sizeof *frames);
  float *scores = malloc((size_t)TESTS * CLASSES * sizeof *scores);
  int32_t labels[TESTS];
  attn_random random = {.seed = 1};
  for (int step = 0; step < 300; ++step) {
    attn_frames f = {.values = frames, .rows = BATCH * LENGTH, .sequences = BATCH};
    tones(BATCH, &random, frames, labels);
    need(attn_classifier_train(t, &f, labels, 5e-3 * (1 - step / 300.0), NULL));
  }
  attn_classifier_trainer_destroy(t);
  random = (attn_random){.seed = 2};
  tones(TESTS, &random, frames, labels);
  attn_frames f = {.values = frames, .rows = TESTS * LENGTH, .sequences = TESTS};
  double rate, read;
  int right = 0;
  need(attn_classifier_run(c, &f, scores, &rate));
  for (int b = 0; b < TESTS; ++b) right += best_of(scores + b * CLASSES) == labels[b];
  double early = stop_early(c, frames, labels, 0.9, &read);
  printf("| %s | %.1f %% | %.1f %% | %.0f %% | %.1f %% |\n", spiking ? "spiking" : "plain",
         100.0 * right / TESTS, 100 * early, 100 * read, 100 * rate);
  free(frames), free(scores);
  attn_classifier_destroy(c);
}

int main(void) {
  delays();
  printf("\nA streamed frame, the paper's sizes\n\n");
  printf("| | parameters | multiply-adds | time |\n|---|---|---|---|\n");
  stream(false, 256);
  stream(true, 512);
  printf("\nEight tones in noise\n\n");
  printf(
      "| | right | right, stopped at 0.9 | frames read then | spikes |\n|---|---|---|---|---|\n");
  learn(false);
  learn(true);
  return 0;
}
