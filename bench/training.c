/* Training throughput of the default model (or of a configuration file), on random bytes:
 *
 *   bench_training [--config FILE] [--steps N] [--batch N] [--length N] [--accumulation N]
 *                  [--compute DTYPE] [--checkpoint-activations] [--data FILE]
 *
 * FLOP are counted as 6 x parameters x tokens. The last line is of the fastest step during which
 * the processors were left alone, and of the raw rate in the same moments (samples.h). */
#include "attn/training.h"
#include "samples.h"
#include "base/memory.h"
#include "base/io.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The first steps warm up. */
enum { WARM_UP = 2 };

static bool after_step(void *context, const attn_training_progress *progress) {
  samples *s = context;
  if (progress->step > WARM_UP) samples_end(s);
  if (progress->step % 10 == 0 || progress->step == progress->steps) printf("%s\n", progress->line);
  fflush(stdout);
  if (progress->step >= WARM_UP) samples_begin(s);
  return true;
}

/* Text of a kind that a model can learn, so that the loss is seen to fall. */
static bool write_text(const char *path) {
  static const char *const words[] = {"light", "and ", "dark ", "the ",  "water",
                                      " of ",  "day",  "\n",    "night", " was "};
  FILE *file = fopen(path, "w");
  if (!file) return false;
  unsigned state = 1;
  for (int i = 0; i < 200000; ++i) {
    state = state * 1664525u + 1013904223u;
    fputs(words[(state >> 16) % 10], file);
  }
  return fclose(file) == 0;
}

static int fail(const char *what) {
  fprintf(stderr, "bench_training: %s\n", what);
  return 1;
}

int main(int argc, char **argv) {
  attn_training_options options = ATTN_TRAINING_OPTIONS_INIT;
  char directory[] = "/tmp/attn-bench-XXXXXX", text[64], *config = NULL;
  const char *data = text;
  options.steps = 30;
  options.checkpoint_every = 0;
  options.validation_fraction = 0; /* steps only */
  for (int i = 1; i < argc; ++i) {
    const char *value = i + 1 < argc ? argv[i + 1] : "";
    if (strcmp(argv[i], "--checkpoint-activations") == 0) {
      options.checkpoint_activations = true;
      continue;
    }
    if (strcmp(argv[i], "--steps") == 0)
      options.steps = atoll(value);
    else if (strcmp(argv[i], "--batch") == 0)
      options.batch = atoll(value);
    else if (strcmp(argv[i], "--length") == 0)
      options.length = atoll(value);
    else if (strcmp(argv[i], "--accumulation") == 0)
      options.accumulation = atoll(value);
    else if (strcmp(argv[i], "--learning-rate") == 0)
      options.learning_rate = atof(value);
    else if (strcmp(argv[i], "--data") == 0)
      data = value;
    else if (strcmp(argv[i], "--compute") == 0) {
      if (attn_dtype_parse(value, &options.compute) != ATTN_OK) return fail(attn_error_message());
    } else if (strcmp(argv[i], "--config") == 0) {
      if (attn_file_read(value, 1 << 20, &config, NULL) != ATTN_OK)
        return fail(attn_error_message());
    } else {
      return fail("unknown option; see bench/training.c");
    }
    ++i;
  }
  if (!mkdtemp(directory)) return fail("no temporary directory");
  snprintf(text, sizeof text, "%s/text", directory);
  if (!write_text(text)) return fail("cannot write the text");
  options.config = config;
  options.data = &data;
  options.data_count = 1;
  options.output = directory;
  samples s = samples_new(attn_get_threads(), (int)options.steps);
  attn_training_result result;
  attn_status status = attn_train(&options, after_step, &s, &result);
  if (status != ATTN_OK) return fail(attn_error_message());
  printf("%lld parameters, %.1f s, %.0f tokens/s, %.3f TFLOP/s, peak %.0f MiB, loss %.3f\n",
         (long long)result.parameters, result.seconds, result.tokens_per_second,
         1e-12 * result.flop_per_second, (double)result.peak_bytes / (1 << 20), result.loss);
  double tokens = (double)(options.batch * options.length * options.accumulation) / s.fastest;
  double flops = 6 * (double)result.parameters * tokens;
  if (s.counted)
    printf("left alone: %.0f tokens/s, %.3f TFLOP/s, %.1f %% of %.2f TFLOP/s bf16; %d steps\n",
           tokens, 1e-12 * flops, 100 * flops / s.bf16_rate, 1e-12 * s.bf16_rate, s.counted);
  else
    printf("the processors were never left alone for a step\n");
  attn_free(config);
  const char *const files[] = {"text",     "training.safetensors", "model.safetensors",
                               "loss.svg", "config.json",          "loss.csv"};
  for (int i = 0; i < 6; ++i) {
    char path[96];
    snprintf(path, sizeof path, "%s/%s", directory, files[i]);
    unlink(path);
  }
  rmdir(directory);
  return 0;
}
