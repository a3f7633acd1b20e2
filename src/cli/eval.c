/* attn eval: how well a model predicts a text.
 *
 *   perplexity = exp(mean of -ln p(token)),   bits per byte = mean of -log2 p(token)
 *
 * per token, which is a byte. */
#include "cli/cli.h"
#include "base/memory.h"
#include "base/progress.h"
#include "files/corpus.h"

#include <math.h>

typedef struct eval_options {
  attn_words data;
  int64_t window, overlap, limit, threads;
  attn_dtype dtype;
  bool json;
} eval_options;

typedef struct evaluation {
  char *path;
  attn_model *model;
  int32_t *tokens;
  int64_t count, counted;
  double loss, seconds;
} evaluation;

static attn_status read_text(const eval_options *o, evaluation *e) {
  attn_corpus *corpus;
  ATTN_TRY(attn_corpus_open(o->data.items, o->data.count, 0, &corpus));
  e->count = attn_corpus_size(corpus, ATTN_TRAINING);
  if (o->limit && e->count > o->limit) e->count = o->limit;
  attn_status status = ATTN_OK;
  if (e->count < 2)
    status = attn_fail(ATTN_INVALID_ARGUMENT, "%s has %lld bytes, expected at least 2",
                       o->data.items[0], (long long)e->count);
  if (status == ATTN_OK) {
    e->tokens = attn_alloc_array((size_t)e->count, sizeof *e->tokens);
    status = e->tokens ? attn_corpus_read(corpus, ATTN_TRAINING, 0, e->count, e->tokens)
                       : ATTN_OUT_OF_MEMORY;
  }
  attn_corpus_close(corpus);
  return status;
}

static attn_status evaluate(const eval_options *o, const char *model, evaluation *e) {
  ATTN_TRY(attn_set_threads((int)o->threads));
  ATTN_TRY(attn_open_model(model, o->dtype, &e->model, &e->path));
  ATTN_TRY(read_text(o, e));
  double start = attn_now();
  ATTN_TRY(attn_model_evaluate(e->model, e->tokens, e->count, o->window, o->overlap, &e->loss,
                               &e->counted));
  e->seconds = attn_now() - start;
  return ATTN_OK;
}

static void print_text(const eval_options *o, const evaluation *e, double rate) {
  char count[ATTN_FORMAT_SIZE], speed[ATTN_FORMAT_SIZE];
  printf("model           %s\n", e->path);
  printf("tokens          %s, in windows of %lld that overlap by %lld\n",
         attn_format_count((double)e->counted, count, sizeof count), (long long)o->window,
         (long long)o->overlap);
  printf("perplexity      %.4f for each token\n", exp(e->loss));
  printf("bits per byte   %.4f\n", e->loss / log(2));
  printf("speed           %s tokens/s\n", attn_format_count(rate, speed, sizeof speed));
}

static json_t *to_json(const eval_options *o, const evaluation *e, double rate) {
  return json_pack("{s:s, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o}", "model", e->path, "tokens",
                   (json_int_t)e->counted, "window", (json_int_t)o->window, "overlap",
                   (json_int_t)o->overlap, "loss", attn_json_real(e->loss), "perplexity",
                   attn_json_real(exp(e->loss)), "bits_per_byte", attn_json_real(e->loss / log(2)),
                   "seconds", attn_json_real(e->seconds), "tokens_per_second",
                   attn_json_real(rate));
}

static int run(const attn_command *command, void *options, const attn_words *words) {
  const eval_options *o = options;
  evaluation e = {0};
  if (!o->data.count) return attn_misuse(command, "--data is missing: the text to predict");
  if (o->overlap >= o->window - 1)
    return attn_misuse(command, "--overlap is %lld, expected less than --window - 1, %lld",
                       (long long)o->overlap, (long long)o->window - 1);
  attn_status status = evaluate(o, words->count ? words->items[0] : NULL, &e);
  double rate = e.seconds > 0 ? (double)e.counted / e.seconds : 0;
  int code = ATTN_EXIT_OK;
  if (status != ATTN_OK)
    code = attn_report(command, status);
  else if (o->json)
    code = attn_print_json(command, to_json(o, &e, rate), false);
  else
    print_text(o, &e, rate);
  attn_free(e.tokens);
  attn_model_destroy(e.model);
  attn_free(e.path);
  return code;
}

static const eval_options defaults = {.window = 2048, .dtype = ATTN_BF16};

#define AT(field) ATTN_FIELD(eval_options, field)
static const attn_option table[] = {
    {"data", 'd', ATTN_OPTION_WORDS, "PATH...", "The text: files, and directories of files.",
     AT(data), 0, 0, NULL},
    {"window", 0, ATTN_OPTION_INT, "N", "Tokens that are read at once.", AT(window), 2, 1 << 30,
     NULL},
    {"overlap", 0, ATTN_OPTION_INT, "N",
     "Tokens of the window before that are read again, as "
     "context, and not counted.",
     AT(overlap), 0, 1 << 30, NULL},
    {"limit", 0, ATTN_OPTION_INT, "N", "Only the first N tokens; 0: all of them.", AT(limit), 0,
     1LL << 40, NULL},
    {"dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of the computation", AT(dtype), 0, 0,
     attn_compute_dtypes},
    {"threads", 0, ATTN_OPTION_INT, "N", "Threads; 0: as many as there are processors.",
     AT(threads), 0, 4096, NULL},
    {"json", 0, ATTN_OPTION_FLAG, NULL, "Print a JSON object.", AT(json), 0, 0, NULL},
};

const attn_command attn_command_eval = {
    .name = "eval",
    .summary = "measure how well a model predicts a text",
    .usage = "[MODEL]",
    .description =
        "Prints the perplexity of a text for each token, which is a byte, the bits per byte, and "
        "the speed. The text is cut into windows that each start afresh, but for --overlap tokens "
        "of context. Without MODEL, the small model that comes with attn.",
    .examples = "attn eval runs/mine --data book.txt\tone's own model\n"
                "attn eval runs/mine --data book.txt --window 4K --overlap 1K\twith more context",
    .options = table,
    .option_count = ATTN_COUNT(table),
    .defaults = &defaults,
    .size = sizeof defaults,
    .most_words = 1,
    .run = run,
};
