/* attn info: what a model is made of, and what a context costs. */
#include "cli/info.h"
#include "base/memory.h"
#include "base/progress.h"
#include "base/io.h"
#include "files/json.h"
#include "models/model.h"

#include <stdlib.h>
#include <string.h>

typedef struct info_options {
  attn_dtype dtype;
  bool json;
} info_options;

typedef struct context_size {
  const char *name;
  int64_t tokens;
} context_size;

static const context_size contexts[] = {
    {"1K", 1 << 10}, {"32K", 1 << 15}, {"1M", 1 << 20}, /* tokens */
};

static attn_status open_subject(attn_info_subject *s, const char *given, attn_dtype dtype) {
  s->path = attn_find_model(given);
  if (!s->path) return ATTN_NOT_FOUND;
  ATTN_TRY(attn_model_read(s->path, dtype, &s->model));
  return attn_model_get_info(s->model, &s->info);
}

static int64_t context_bytes(const attn_info_subject *s, int64_t tokens) {
  return s->info.state_fixed_bytes + tokens * s->info.state_token_bytes;
}

json_t *attn_info_json(const attn_info_subject *s) {
  const attn_model_info *i = &s->info;
  json_t *mixers = json_array(), *memory = json_array();
  for (int64_t l = 0; l < i->layers; ++l)
    json_array_append_new(mixers, json_string(attn_model_mixer(s->model, l)));
  for (int c = 0; c < ATTN_COUNT(contexts); ++c)
    json_array_append_new(memory,
                          json_pack("{s:I, s:I}", "tokens", (json_int_t)contexts[c].tokens, "bytes",
                                    (json_int_t)context_bytes(s, contexts[c].tokens)));
  return json_pack("{s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:s, s:s, s:o, s:{s:I, s:I}, s:o, s:O}",
                   "model", s->path, "type", i->type, "parameters", (json_int_t)i->parameters,
                   "weight_bytes", (json_int_t)i->weight_bytes, "layers", (json_int_t)i->layers,
                   "hidden", (json_int_t)i->hidden, "vocabulary", (json_int_t)i->vocabulary,
                   "stored", i->stored_type, "compute", attn_dtype_name(i->compute), "mixers",
                   mixers, "state_bytes", "fixed", (json_int_t)i->state_fixed_bytes, "per_token",
                   (json_int_t)i->state_token_bytes, "context_memory", memory, "config",
                   s->model->config.json);
}

/* "0-10 lightning, 11 softmax": runs of layers that have the same mixer. */
static void print_layers(const attn_info_subject *s) {
  attn_text text = {0};
  for (int64_t first = 0, last; first < s->info.layers; first = last) {
    const char *mixer = attn_model_mixer(s->model, first);
    for (last = first + 1; last < s->info.layers; ++last)
      if (strcmp(attn_model_mixer(s->model, last), mixer) != 0) break;
    attn_text_print(&text, "%s%lld", first ? ", " : "", (long long)first);
    if (last - first > 1) attn_text_print(&text, "-%lld", (long long)last - 1);
    attn_text_print(&text, " %s", mixer);
  }
  attn_text lines = {0};
  if (!text.failed && text.length) attn_text_wrap(&lines, text.data, 16, 16);
  printf("layers          %s", lines.failed || !lines.length ? "\n" : lines.data);
  attn_text_free(&lines);
  attn_text_free(&text);
}

void attn_info_print(const attn_info_subject *s) {
  const attn_model_info *i = &s->info;
  char count[ATTN_FORMAT_SIZE], bytes[ATTN_FORMAT_SIZE];
  printf("model           %s\n", s->path);
  printf("type            %s, width %lld, vocabulary %lld\n", i->type, (long long)i->hidden,
         (long long)i->vocabulary);
  printf("parameters      %s (%lld)\n",
         attn_format_count((double)i->parameters, count, sizeof count), (long long)i->parameters);
  printf("weights         %s, %s; computed in %s\n",
         attn_format_bytes((double)i->weight_bytes, bytes, sizeof bytes), i->stored_type,
         attn_dtype_name(i->compute));
  print_layers(s);
  printf("state           %s",
         attn_format_bytes((double)i->state_fixed_bytes, bytes, sizeof bytes));
  printf(", and %s for each token\n",
         attn_format_bytes((double)i->state_token_bytes, bytes, sizeof bytes));
  printf("context memory ");
  for (int c = 0; c < ATTN_COUNT(contexts); ++c)
    printf("%s %s at %s", c ? "," : "",
           attn_format_bytes((double)context_bytes(s, contexts[c].tokens), bytes, sizeof bytes),
           contexts[c].name);
  printf(" tokens\n");
}

static void print_config(const attn_info_subject *s) {
  const char *key;
  json_t *value;
  printf("configuration\n");
  json_object_foreach(s->model->config.json, key, value) {
    char *text = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY);
    printf("  %-24s %s\n", key, text ? text : "?");
    free(text);
  }
}

static int run(const attn_command *command, void *options, const attn_words *words) {
  const info_options *o = options;
  const char *given = words->count ? words->items[0] : NULL;
  if (given && attn_is_gguf(given)) return attn_info_gguf(command, given, o->dtype, o->json);
  attn_info_subject s = {0};
  attn_status status = open_subject(&s, given, o->dtype);
  int code = ATTN_EXIT_OK;
  if (status != ATTN_OK)
    code = attn_report(command, status);
  else if (o->json)
    code = attn_print_json(command, attn_info_json(&s), false);
  else {
    attn_info_print(&s);
    print_config(&s);
  }
  attn_model_destroy(s.model);
  attn_free(s.path);
  return code;
}

static const info_options defaults = {.dtype = ATTN_BF16};

#define AT(field) ATTN_FIELD(info_options, field)
static const attn_option table[] = {
    {"dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of the computation, and of the caches", AT(dtype), 0,
     0, attn_compute_dtypes},
    {"json", 0, ATTN_OPTION_FLAG, NULL, "Print a JSON object.", AT(json), 0, 0, NULL},
};

const attn_command attn_command_info = {
    .name = "info",
    .summary = "describe a model: parameters, layers, memory of a context",
    .usage = "[MODEL]",
    .description =
        "Describes a model: its configuration, parameters and dtypes, the mixer of each layer, the "
        "state that decoding keeps, and what contexts of 1K, 32K and 1M tokens need. Without "
        "MODEL, "
        "the small model that comes with attn. MODEL may also be a GGUF file: then also its "
        "metadata and how its tensors are stored; only those where the model cannot be run.",
    .examples = "attn info\tthe model that comes with attn\n"
                "attn info runs/mine --json\tone's own, for programs\n"
                "attn info model.gguf\ta GGUF file",
    .options = table,
    .option_count = ATTN_COUNT(table),
    .defaults = &defaults,
    .size = sizeof defaults,
    .most_words = 1,
    .run = run,
};
