/* attn eval: how well a model predicts a text.
 *
 *   perplexity = exp(mean of -ln p(token)),   bits per byte = sum of -log2 p(token) / bytes
 *
 * per token of the model; bits per byte count the bytes of the text. Or, with --task, how often it
 * gives the right answer (src/tasks/). */
#include "cli/cli.h"
#include "base/memory.h"
#include "base/progress.h"
#include "files/corpus.h"
#include "models/model.h"
#include "tasks/task.h"

#include <math.h>

typedef struct eval_options {
  attn_words data;
  const char *task; /* NULL: a text */
  attn_task_options task_options;
  int64_t examples;
  uint64_t seed;
  int64_t window, overlap, limit, threads;
  attn_dtype dtype;
  const char *device, *lora;
  bool json;
} eval_options;

typedef struct evaluation {
  char *path;
  attn_model *model;
  int32_t *tokens;
  int64_t count, counted, bytes;
  double loss, seconds;
} evaluation;

static double bits_per_byte(const evaluation *e) {
  return e->loss * (double)e->counted / log(2) / (double)e->bytes;
}

/* The whole text: the corpus gives its bytes as numbers. */
static attn_status read_text(const eval_options *o, attn_text *text) {
  attn_corpus *corpus;
  enum { PIECE = 4096 };
  int32_t numbers[PIECE];
  ATTN_TRY(attn_corpus_open(o->data.items, o->data.count, 0, &corpus));
  int64_t size = attn_corpus_size(corpus, ATTN_TRAINING);
  attn_status status = ATTN_OK;
  for (int64_t first = 0; first < size && status == ATTN_OK; first += PIECE) {
    int64_t count = size - first < PIECE ? size - first : PIECE;
    char bytes[PIECE];
    status = attn_corpus_read(corpus, ATTN_TRAINING, first, count, numbers);
    for (int64_t i = 0; status == ATTN_OK && i < count; ++i) bytes[i] = (char)numbers[i];
    if (status == ATTN_OK) attn_text_add(text, bytes, (size_t)count);
  }
  attn_corpus_close(corpus);
  return status == ATTN_OK && text->failed ? ATTN_OUT_OF_MEMORY : status;
}

/* Bytes that the counted tokens stand for: all but the first token. */
static attn_status count_bytes(evaluation *e) {
  size_t size = 0;
  ATTN_TRY(attn_model_decode(e->model, e->tokens + 1, e->count - 1, 0, NULL, 0, &size));
  e->bytes = size ? (int64_t)size : 1;
  return ATTN_OK;
}

static attn_status encode_text(const eval_options *o, evaluation *e) {
  attn_text text = {0};
  attn_status status = read_text(o, &text);
  const char *data = text.length ? text.data : "";
  if (status == ATTN_OK)
    status = attn_model_encode(e->model, data, text.length, ATTN_ENCODE_ENDS, NULL, 0, &e->count);
  if (status == ATTN_OK && e->count < 2)
    status = attn_fail(ATTN_INVALID_ARGUMENT, "%s has %lld tokens, expected at least 2",
                       o->data.items[0], (long long)e->count);
  if (status == ATTN_OK) e->tokens = attn_alloc_array((size_t)e->count, sizeof *e->tokens);
  if (status == ATTN_OK && !e->tokens) status = ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK)
    status = attn_model_encode(e->model, data, text.length, ATTN_ENCODE_ENDS, e->tokens, e->count,
                               &e->count);
  attn_text_free(&text);
  ATTN_TRY(status);
  if (o->limit && e->count > o->limit) e->count = o->limit;
  return count_bytes(e);
}

static attn_status evaluate(const eval_options *o, const char *model, evaluation *e) {
  ATTN_TRY(attn_set_threads((int)o->threads));
  ATTN_TRY(attn_open_model(model, o->lora, o->dtype, o->device, &e->model, &e->path));
  ATTN_TRY(encode_text(o, e));
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
  printf("bits per byte   %.4f\n", bits_per_byte(e));
  printf("speed           %s tokens/s\n", attn_format_count(rate, speed, sizeof speed));
}

static json_t *to_json(const eval_options *o, const evaluation *e, double rate) {
  return json_pack("{s:s, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o}", "model", e->path, "tokens",
                   (json_int_t)e->counted, "window", (json_int_t)o->window, "overlap",
                   (json_int_t)o->overlap, "loss", attn_json_real(e->loss), "perplexity",
                   attn_json_real(exp(e->loss)), "bits_per_byte", attn_json_real(bits_per_byte(e)),
                   "seconds", attn_json_real(e->seconds), "tokens_per_second",
                   attn_json_real(rate));
}

/* Tasks -----------------------------------------------------------------------------------------
 */

typedef struct answers {
  attn_model *model;
  const attn_task *task;
  attn_task_options options; /* settled */
  double accuracy, seconds;
} answers;

static attn_status make_task(const eval_options *o, answers *a) {
  attn_model_info info;
  ATTN_TRY(attn_task_find(o->task, &a->task));
  ATTN_TRY(attn_model_get_info(a->model, &info));
  a->options = o->task_options;
  if (!a->options.vocabulary) a->options.vocabulary = info.vocabulary;
  if (a->options.vocabulary <= info.vocabulary) return attn_task_settle(a->task, &a->options);
  return attn_fail(ATTN_INVALID_ARGUMENT, "--vocabulary is %lld, the model has %lld tokens",
                   (long long)a->options.vocabulary, (long long)info.vocabulary);
}

static attn_status answer(const eval_options *o, const char *path, answers *a) {
  ATTN_TRY(attn_set_threads((int)o->threads));
  ATTN_TRY(attn_open_model(path, o->lora, o->dtype, o->device, &a->model, NULL));
  ATTN_TRY(make_task(o, a));
  int64_t numbers = o->examples * a->options.length;
  int32_t *inputs = attn_alloc_array((size_t)numbers, 2 * sizeof *inputs);
  if (!inputs) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_task_generate(a->task, &a->options, o->seed, ATTN_TASK_TEST, 0,
                                          o->examples, inputs, inputs + numbers);
  double start = attn_now();
  if (status == ATTN_OK)
    status = attn_model_accuracy(a->model, inputs, inputs + numbers, o->examples, a->options.length,
                                 &a->accuracy);
  a->seconds = attn_now() - start;
  attn_free(inputs);
  return status;
}

static json_t *answers_json(const eval_options *o, const answers *a, double rate) {
  return json_pack("{s:s, s:I, s:I, s:I, s:I, s:o, s:o, s:o, s:o}", "task", o->task, "examples",
                   (json_int_t)o->examples, "length", (json_int_t)a->options.length, "pairs",
                   (json_int_t)a->options.pairs, "vocabulary", (json_int_t)a->options.vocabulary,
                   "accuracy", attn_json_real(a->accuracy), "chance",
                   attn_json_real(a->task->chance(&a->options)), "seconds",
                   attn_json_real(a->seconds), "tokens_per_second", attn_json_real(rate));
}

static void print_answers(const eval_options *o, const answers *a, double rate) {
  char speed[ATTN_FORMAT_SIZE];
  printf("task            %s: %lld examples of %lld tokens, ", o->task, (long long)o->examples,
         (long long)a->options.length);
  if (a->options.pairs) printf("%lld pairs, ", (long long)a->options.pairs);
  printf("vocabulary %lld\n", (long long)a->options.vocabulary);
  printf("accuracy        %.2f %% (a guess among the answers: %.2f %%)\n", 100 * a->accuracy,
         100 * a->task->chance(&a->options));
  printf("speed           %s tokens/s\n", attn_format_count(rate, speed, sizeof speed));
}

static int run_task(const attn_command *command, const eval_options *o, const char *path) {
  answers a = {0};
  attn_status status = answer(o, path, &a);
  attn_model_destroy(a.model);
  if (status != ATTN_OK) return attn_report(command, status);
  double tokens = (double)(o->examples * a.options.length);
  double rate = a.seconds > 0 ? tokens / a.seconds : 0;
  if (o->json) return attn_print_json(command, answers_json(o, &a, rate), false);
  print_answers(o, &a, rate);
  return ATTN_EXIT_OK;
}

static const eval_options defaults = {
    .window = 2048, .examples = 1000, .dtype = ATTN_BF16, .device = ATTN_DEVICE_AUTO};

static bool is_for_tasks(const eval_options *o) {
  const attn_task_options *t = &o->task_options;
  return o->examples != defaults.examples || t->length || t->pairs || t->vocabulary ||
         t->power != 0 || t->zeros || o->seed;
}

static bool is_for_texts(const eval_options *o) {
  return o->data.count || o->window != defaults.window || o->overlap || o->limit;
}

static int run(const attn_command *command, void *options, const attn_words *words) {
  const eval_options *o = options;
  evaluation e = {0};
  if (o->task && is_for_texts(o))
    return attn_misuse(command, "--data, --window, --overlap and --limit do not go with --task");
  if (!o->task && is_for_tasks(o))
    return attn_misuse(command, "--examples, --length, --pairs, --vocabulary, --power, --zeros and "
                                "--seed need --task");
  if (o->task) return run_task(command, o, words->count ? words->items[0] : NULL);
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

#define AT(field) ATTN_FIELD(eval_options, field)
#define OF(field) ATTN_FIELD(eval_options, task_options.field)
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
    ATTN_TASK_OPTION(AT(task)),
    ATTN_PAIRS_OPTION(OF(pairs)),
    ATTN_POWER_OPTION(OF(power)),
    ATTN_ZEROS_OPTION(OF(zeros)),
    {"examples", 0, ATTN_OPTION_INT, "N", "Of the task.", AT(examples), 1, 1 << 24, NULL},
    {"length", 0, ATTN_OPTION_INT, "N", "Tokens of an example; 0: as is usual for the task.",
     OF(length), 0, 1 << 24, NULL},
    {"vocabulary", 0, ATTN_OPTION_INT, "N", "Tokens that the task uses; 0: the model's.",
     OF(vocabulary), 0, 1 << 30, NULL},
    {"seed", 0, ATTN_OPTION_SEED, "N", "Of the examples.", AT(seed), 0, 0, NULL},
    {"dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of the computation", AT(dtype), 0, 0,
     attn_compute_dtypes},
    ATTN_DEVICE_OPTION(AT(device)),
    ATTN_LORA_OPTION(AT(lora)),
    {"threads", 0, ATTN_OPTION_INT, "N", "Threads; 0: as many as there are processors.",
     AT(threads), 0, 4096, NULL},
    {"json", 0, ATTN_OPTION_FLAG, NULL, "Print a JSON object.", AT(json), 0, 0, NULL},
};

const attn_command attn_command_eval = {
    .name = "eval",
    .summary = "measure how well a model predicts a text",
    .usage = "[MODEL]",
    .description =
        "Prints the perplexity of a text for each token, the bits per byte, and the speed. The "
        "text is cut into windows that each start afresh, but for --overlap tokens "
        "of context. Without MODEL, the small model that comes with attn. With --task, the share "
        "of right answers in the examples of a task that judges mixers, which the model has to "
        "have been trained on.",
    .examples = "attn eval runs/mine --data book.txt\tone's own model\n"
                "attn eval runs/mine --data book.txt --window 4K --overlap 1K\twith more context\n"
                "attn eval runs/mine --task mqar --length 256 --pairs 16\tassociative recall",
    .options = table,
    .option_count = ATTN_COUNT(table),
    .defaults = &defaults,
    .size = sizeof defaults,
    .most_words = 1,
    .run = run,
};
