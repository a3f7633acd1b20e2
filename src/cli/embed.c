/* attn embed: the embeddings of texts, a line of numbers each.
 *
 * Texts are words of the command line, or lines of a file or of standard input, which are read,
 * computed and printed a few hundred at a time. */
#include "cli/cli.h"
#include "base/memory.h"
#include "base/progress.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* What is read before it is computed. */
enum { CHUNK_TEXTS = 512, CHUNK_TOKENS = 1 << 16 };

typedef struct embed_options {
  const char *file;
  int pooling; /* attn_pooling */
  bool normalize, no_normalize;
  attn_dtype dtype;
  const char *device;
  int64_t threads;
  bool json, stats;
} embed_options;

typedef struct embedder {
  const embed_options *options;
  char *path;
  attn_model *model;
  attn_embedding_info info;
  attn_embedding_options how;
  /* where texts come from: words, or lines */
  const attn_words *words;
  int word;
  FILE *lines;
  char *line;
  size_t line_capacity;
  /* a chunk */
  int32_t *tokens;
  int64_t capacity, offsets[CHUNK_TEXTS + 1], texts;
  bool cut[CHUNK_TEXTS];
  float *embeddings;
  /* of all */
  int64_t all_texts, all_tokens, all_cut;
  double seconds;
  json_t *list, *counts;
} embedder;

/* Texts ------------------------------------------------------------------------------------------
 */

/* The next text, borrowed until the next call; *text is NULL behind the last. */
static attn_status next_text(embedder *e, const char **text, size_t *size) {
  *text = NULL;
  if (!e->lines) { /* the first word is the model */
    if (e->word + 1 >= e->words->count) return ATTN_OK;
    *text = e->words->items[++e->word];
    *size = strlen(*text);
    return ATTN_OK;
  }
  errno = 0;
  ssize_t length = getline(&e->line, &e->line_capacity, e->lines);
  if (length < 0 && feof(e->lines)) return ATTN_OK;
  if (length < 0)
    return attn_fail(ATTN_IO_ERROR, "%s: %s", e->options->file ? e->options->file : "stdin",
                     strerror(errno));
  if (length && e->line[length - 1] == '\n') --length;
  if (length && e->line[length - 1] == '\r') --length;
  *text = e->line;
  *size = (size_t)length;
  return ATTN_OK;
}

static attn_status make_room(embedder *e, int64_t tokens) {
  if (tokens <= e->capacity) return ATTN_OK;
  int32_t *more = attn_alloc_array((size_t)(2 * tokens), sizeof *more);
  if (!more) return ATTN_OUT_OF_MEMORY;
  if (e->tokens) memcpy(more, e->tokens, (size_t)e->offsets[e->texts] * sizeof *more);
  attn_free(e->tokens);
  e->tokens = more;
  e->capacity = 2 * tokens;
  return ATTN_OK;
}

static attn_status add_text(embedder *e, const char *text, size_t size) {
  int64_t used = e->offsets[e->texts], count;
  bool *cut = &e->cut[e->texts];
  ATTN_TRY(attn_model_encode_for_embedding(
      e->model, text, size, e->tokens ? e->tokens + used : NULL, e->capacity - used, &count, cut));
  if (used + count > e->capacity) {
    ATTN_TRY(make_room(e, used + count));
    ATTN_TRY(attn_model_encode_for_embedding(e->model, text, size, e->tokens + used,
                                             e->capacity - used, &count, cut));
  }
  if (!count)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "text %lld is empty, and the model puts no token around",
                     (long long)e->all_texts + e->texts + 1);
  e->offsets[++e->texts] = used + count;
  return ATTN_OK;
}

/* Fills the chunk; no texts: there are no more. */
static attn_status read_chunk(embedder *e) {
  e->texts = 0;
  while (e->texts < CHUNK_TEXTS && e->offsets[e->texts] < CHUNK_TOKENS) {
    const char *text;
    size_t size;
    ATTN_TRY(next_text(e, &text, &size));
    if (!text) break;
    ATTN_TRY(add_text(e, text, size));
  }
  return ATTN_OK;
}

/* Embeddings -------------------------------------------------------------------------------------
 */

static void print_line(const float *embedding, int64_t size) {
  for (int64_t i = 0; i < size; ++i) printf("%s%.9g", i ? " " : "", (double)embedding[i]);
  putchar('\n');
}

static void keep_in_json(embedder *e, const float *embedding, int64_t tokens) {
  json_t *numbers = json_array();
  for (int64_t i = 0; i < e->info.size; ++i)
    json_array_append_new(numbers, attn_json_real((double)embedding[i]));
  json_array_append_new(e->list, numbers);
  json_array_append_new(e->counts, json_integer(tokens));
}

static attn_status embed_chunk(embedder *e) {
  double start = attn_now();
  ATTN_TRY(attn_model_embed(e->model, e->tokens, e->offsets, e->texts, &e->how, e->embeddings));
  e->seconds += attn_now() - start;
  for (int64_t i = 0; i < e->texts; ++i) {
    const float *embedding = e->embeddings + i * e->info.size;
    int64_t tokens = e->offsets[i + 1] - e->offsets[i];
    e->all_tokens += tokens;
    e->all_cut += e->cut[i];
    if (e->options->json)
      keep_in_json(e, embedding, tokens);
    else
      print_line(embedding, e->info.size);
  }
  e->all_texts += e->texts;
  if (!e->options->json && fflush(stdout) != 0)
    return attn_fail(ATTN_IO_ERROR, "cannot write to standard output: %s", strerror(errno));
  return ATTN_OK;
}

static attn_status open_lines(embedder *e) {
  const char *file = e->options->file;
  if (e->words->count > 1) return ATTN_OK;
  e->lines = file && strcmp(file, "-") != 0 ? fopen(file, "r") : stdin;
  if (e->lines) return ATTN_OK;
  return attn_fail(errno == ENOENT ? ATTN_NOT_FOUND : ATTN_IO_ERROR, "%s: %s", file,
                   strerror(errno));
}

static attn_status prepare(embedder *e) {
  const embed_options *o = e->options;
  ATTN_TRY(attn_set_threads((int)o->threads));
  ATTN_TRY(attn_open_model(e->words->items[0], NULL, o->dtype, o->device, &e->model, &e->path));
  ATTN_TRY(attn_model_get_embedding_info(e->model, &e->info));
  e->how = (attn_embedding_options)ATTN_EMBEDDING_OPTIONS_INIT;
  e->how.pooling = (attn_pooling)o->pooling;
  if (o->normalize || o->no_normalize) e->how.normalize = o->normalize;
  e->embeddings = attn_alloc_array((size_t)(CHUNK_TEXTS * e->info.size), sizeof *e->embeddings);
  e->list = json_array();
  e->counts = json_array();
  if (!e->embeddings || !e->list || !e->counts) return ATTN_OUT_OF_MEMORY;
  return open_lines(e);
}

static attn_status embed_all(embedder *e) {
  ATTN_TRY(prepare(e));
  attn_catch_interrupts();
  do {
    ATTN_TRY(read_chunk(e));
    if (e->texts) ATTN_TRY(embed_chunk(e));
    if (attn_interrupted) return attn_fail(ATTN_INTERRUPTED, "interrupted");
  } while (e->texts);
  return ATTN_OK;
}

/* Output -----------------------------------------------------------------------------------------
 */

static const char *pooling_name(const embedder *e) {
  return attn_pooling_name(e->how.pooling ? e->how.pooling : e->info.pooling);
}

static bool normalizes(const embedder *e) {
  return e->how.normalize < 0 ? e->info.normalize : e->how.normalize;
}

static json_t *to_json(const embedder *e) {
  return json_pack("{s:s, s:I, s:s, s:b, s:I, s:O, s:O, s:I, s:o}", "model", e->path, "size",
                   (json_int_t)e->info.size, "pooling", pooling_name(e), "normalized",
                   normalizes(e), "most_tokens", (json_int_t)e->info.most_tokens, "embeddings",
                   e->list, "tokens", e->counts, "cut", (json_int_t)e->all_cut, "seconds",
                   attn_json_real(e->seconds));
}

static void print_stats(const embedder *e) {
  char texts[ATTN_FORMAT_SIZE], tokens[ATTN_FORMAT_SIZE];
  double seconds = e->seconds > 0 ? e->seconds : 1e-9;
  fprintf(stderr,
          "%lld texts, %lld tokens, %lld texts cut; %s pooling%s; %s texts/s, %s tokens/s\n",
          (long long)e->all_texts, (long long)e->all_tokens, (long long)e->all_cut, pooling_name(e),
          normalizes(e) ? ", normalised" : "",
          attn_format_count((double)e->all_texts / seconds, texts, sizeof texts),
          attn_format_count((double)e->all_tokens / seconds, tokens, sizeof tokens));
}

static void release(embedder *e) {
  if (e->lines && e->lines != stdin) fclose(e->lines);
  free(e->line); /* getline's own */
  json_decref(e->list);
  json_decref(e->counts);
  attn_free(e->embeddings);
  attn_free(e->tokens);
  attn_model_destroy(e->model);
  attn_free(e->path);
  attn_free(e);
}

static int run(const attn_command *command, void *options, const attn_words *words) {
  const embed_options *o = options;
  if (o->normalize && o->no_normalize)
    return attn_misuse(command, "both --normalize and --no-normalize are given");
  if (o->file && words->count > 1) return attn_misuse(command, "both --file and texts are given");
  embedder *e = attn_alloc_zero(sizeof *e);
  if (!e) return attn_report(command, ATTN_OUT_OF_MEMORY);
  e->options = o;
  e->words = words;
  attn_status status = embed_all(e);
  int code = ATTN_EXIT_OK;
  if (status != ATTN_OK)
    code = attn_report(command, status);
  else if (o->json)
    code = attn_print_json(command, to_json(e), false);
  if (status == ATTN_OK && o->stats) print_stats(e);
  release(e);
  return code;
}

static const embed_options defaults = {.dtype = ATTN_F32, .device = ATTN_DEVICE_AUTO};
static const char *const poolings[] = {"default",   "mean",          "cls", "last", "max",
                                       "mean-sqrt", "weighted-mean", NULL}; /* as attn_pooling */

#define AT(field) ATTN_FIELD(embed_options, field)
static const attn_option table[] = {
    {"file", 'f', ATTN_OPTION_TEXT, "PATH", "A text a line; -: standard input.", AT(file), 0, 0,
     NULL},
    {"pooling", 0, ATTN_OPTION_CHOICE, "HOW", "How a text's tokens become one vector", AT(pooling),
     0, 0, poolings},
    {"normalize", 0, ATTN_OPTION_FLAG, NULL,
     "Scale embeddings to length 1, whatever the model's files say.", AT(normalize), 0, 0, NULL},
    {"no-normalize", 0, ATTN_OPTION_FLAG, NULL,
     "Leave their length, whatever the model's files say.", AT(no_normalize), 0, 0, NULL},
    {"dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of the computation", AT(dtype), 0, 0,
     attn_compute_dtypes},
    ATTN_DEVICE_OPTION(AT(device)),
    {"threads", 0, ATTN_OPTION_INT, "N", "Threads; 0: as many as there are processors.",
     AT(threads), 0, 4096, NULL},
    {"stats", 0, ATTN_OPTION_FLAG, NULL, "Print counts and speed on standard error.", AT(stats), 0,
     0, NULL},
    {"json", 0, ATTN_OPTION_FLAG, NULL, "Print a JSON object.", AT(json), 0, 0, NULL},
};

const attn_command attn_command_embed = {
    .name = "embed",
    .summary = "turn texts into vectors",
    .usage = "MODEL [TEXT...]",
    .description =
        "Prints the embedding of each text as a line of numbers. Texts are the words behind MODEL, "
        "or else the lines of --file or of standard input. MODEL may be an encoder (BERT, MiniLM, "
        "RoBERTa, DistilBERT) or any other model.\n\n"
        "Pooling, normalising and the most tokens of a text are as the files of "
        "sentence-transformers beside the model say, or the metadata of a GGUF file; the mean, not "
        "normalised, where they say nothing. Longer texts are cut.",
    .examples = "attn embed all-MiniLM-L6-v2 \"a cat\" \"a dog\"\ttwo lines of 384 numbers\n"
                "attn embed all-MiniLM-L6-v2 --file texts.txt --json\ta text a line\n"
                "attn embed model.gguf --pooling last --normalize <texts.txt\tany model",
    .options = table,
    .option_count = ATTN_COUNT(table),
    .defaults = &defaults,
    .size = sizeof defaults,
    .least_words = 1,
    .most_words = ATTN_MOST_WORDS,
    .run = run,
};
