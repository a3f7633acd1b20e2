/* attn list: the table of mixers. docs/systems.md is written from it too. */
#include "cli/cli.h"
#include "base/memory.h"
#include "base/progress.h"
#include "base/io.h"

typedef struct list_options {
  int64_t hidden, heads, dim;
  attn_dtype dtype;
  bool json;
  const char *systems_md;
} list_options;

typedef struct ability {
  unsigned bit;
  char letter;
  const char *name;
} ability;

static const ability abilities[] = {
    {ATTN_ABILITY_CAUSAL, 'c', "causal"}, {ATTN_ABILITY_BIDIRECTIONAL, 'b', "bidirectional"},
    {ATTN_ABILITY_CROSS, 'x', "cross"},   {ATTN_ABILITY_DECODE, 'd', "decode"},
    {ATTN_ABILITY_RAGGED, 'r', "ragged"}, {ATTN_ABILITY_TRAINABLE, 't', "trainable"},
};

typedef struct row {
  attn_mixer_info info;
  bool fits;                /* whether the mixer can have the shape */
  int64_t fixed, per_token; /* bytes of state */
} row;

static attn_status get_row(const list_options *o, int index, row *out) {
  ATTN_TRY(attn_mixer_get_info(index, &out->info));
  attn_status status =
      attn_mixer_state_bytes(index, o->hidden, o->heads, o->dim, (int64_t)attn_dtype_size(o->dtype),
                             &out->fixed, &out->per_token);
  out->fits = status == ATTN_OK;
  return status == ATTN_INVALID_ARGUMENT ? ATTN_OK : status;
}

static json_t *bytes_json(const row *r, int64_t bytes) {
  return r->fits ? json_integer((json_int_t)bytes) : json_null();
}

static const char *format_bytes(const row *r, int64_t bytes, char text[ATTN_FORMAT_SIZE]) {
  return r->fits ? attn_format_bytes((double)bytes, text, ATTN_FORMAT_SIZE) : "-";
}

static json_t *row_json(const list_options *o, const row *r) {
  json_t *names = json_array();
  for (int i = 0; i < ATTN_COUNT(abilities); ++i)
    if (r->info.abilities & abilities[i].bit)
      json_array_append_new(names, json_string(abilities[i].name));
  return json_pack("{s:s, s:s, s:s, s:s, s:o, s:{s:o, s:o, s:{s:I, s:I, s:I, s:s}}}", "name",
                   r->info.name, "title", r->info.title, "arxiv", r->info.arxiv, "summary",
                   r->info.summary, "abilities", names, "state_bytes", "fixed",
                   bytes_json(r, r->fixed), "per_token", bytes_json(r, r->per_token), "shape",
                   "hidden", (json_int_t)o->hidden, "heads", (json_int_t)o->heads, "dim",
                   (json_int_t)o->dim, "dtype", attn_dtype_name(o->dtype));
}

static void letters(unsigned bits, char text[ATTN_COUNT(abilities) + 1]) {
  for (int i = 0; i < ATTN_COUNT(abilities); ++i)
    text[i] = bits & abilities[i].bit ? abilities[i].letter : '-';
  text[ATTN_COUNT(abilities)] = '\0';
}

static void print_heading(void) {
  printf("%-16s %-11s %-9s %21s %16s\n", "mixer", "arXiv", "abilities", "state of a layer",
         "and per token");
}

static void print_row(const row *r) {
  char can[ATTN_COUNT(abilities) + 1], fixed[ATTN_FORMAT_SIZE], token[ATTN_FORMAT_SIZE];
  attn_text text = {0};
  letters(r->info.abilities, can);
  printf("%-16s %-11s %-9s %21s %16s\n", r->info.name, r->info.arxiv, can,
         format_bytes(r, r->fixed, fixed), format_bytes(r, r->per_token, token));
  attn_text_wrap(&text, r->info.summary, 2, 0);
  if (!text.failed && text.length) fputs(text.data, stdout);
  attn_text_free(&text);
}

static void print_legend(const list_options *o) {
  printf("\nabilities:");
  for (int i = 0; i < ATTN_COUNT(abilities); ++i)
    printf("%s %c %s", i ? "," : "", abilities[i].letter, abilities[i].name);
  printf("\nstate: for width %lld, %lld heads of %lld, %s; -: not of this shape\n",
         (long long)o->hidden, (long long)o->heads, (long long)o->dim, attn_dtype_name(o->dtype));
}

/* docs/systems.md */

static void markdown_row(attn_text *text, const row *r) {
  const char *separator = "";
  attn_text_print(text, "| `%s` | [%s](https://arxiv.org/abs/%s) | ", r->info.name, r->info.title,
                  r->info.arxiv);
  for (int i = 0; i < ATTN_COUNT(abilities); ++i)
    if (r->info.abilities & abilities[i].bit) {
      attn_text_print(text, "%s%s", separator, abilities[i].name);
      separator = ", ";
    }
  attn_text_print(text, " | %s | %lld | %lld |\n", r->info.summary, (long long)r->fixed,
                  (long long)r->per_token);
}

static int write_markdown(const attn_command *command, const list_options *o) {
  attn_text text = {0};
  char *result;
  attn_text_print(
      &text,
      "# Mixers\n\nWritten by `make docs` from the table in `src/mixers/mixers.c`; `attn "
      "list` prints it.\nState: bytes of one layer at width %lld with %lld heads of "
      "%lld, caches in %s.\n\n| name | paper | abilities | what it is | state, bytes | "
      "and for each token |\n|---|---|---|---|---:|---:|\n",
      (long long)o->hidden, (long long)o->heads, (long long)o->dim, attn_dtype_name(o->dtype));
  for (int i = 0; i < attn_mixer_count(); ++i) {
    row r;
    attn_status status = get_row(o, i, &r);
    if (status != ATTN_OK) {
      attn_text_free(&text);
      return attn_report(command, status);
    }
    markdown_row(&text, &r);
  }
  size_t size = text.length;
  attn_status status = attn_text_take(&text, &result);
  if (status == ATTN_OK) status = attn_file_write(o->systems_md, result, size);
  attn_free(result);
  return status == ATTN_OK ? ATTN_EXIT_OK : attn_report(command, status);
}

static int run(const attn_command *command, void *options, const attn_words *words) {
  const list_options *o = options;
  json_t *json = o->json ? json_array() : NULL;
  (void)words;
  if (o->systems_md) return write_markdown(command, o);
  if (!json) print_heading();
  for (int i = 0; i < attn_mixer_count(); ++i) {
    row r;
    attn_status status = get_row(o, i, &r);
    if (status != ATTN_OK) {
      json_decref(json);
      return attn_report(command, status);
    }
    if (json)
      json_array_append_new(json, row_json(o, &r));
    else
      print_row(&r);
  }
  if (json) return attn_print_json(command, json, false);
  print_legend(o);
  return ATTN_EXIT_OK;
}

static const char *const dtypes[] = {"bfloat16", "float32", NULL};
static const list_options defaults = {.hidden = 1024, .heads = 8, .dim = 128, .dtype = ATTN_BF16};

#define AT(field) ATTN_FIELD(list_options, field)
static const attn_option list_table[] = {
    {"hidden", 0, ATTN_OPTION_INT, "H", "Width of the model.", AT(hidden), 1, 1 << 20, NULL},
    {"heads", 0, ATTN_OPTION_INT, "N", "Heads of a layer.", AT(heads), 1, 1 << 14, NULL},
    {"dim", 0, ATTN_OPTION_INT, "D", "Dimension of a head.", AT(dim), 1, 256, NULL},
    {"dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of cached keys and values", AT(dtype), 0, 0, dtypes},
    {"json", 0, ATTN_OPTION_FLAG, NULL, "Print a JSON array, one object a mixer.", AT(json), 0, 0,
     NULL},
    {"systems-md", 0, ATTN_OPTION_TEXT, "FILE", NULL, AT(systems_md), 0, 0, NULL},
};

const attn_command attn_command_list = {
    .name = "list",
    .summary = "list the attention mechanisms, what they can do and what they remember",
    .usage = "",
    .description =
        "Lists the mixers, which are the attention mechanisms that a model's layers may use: name, "
        "paper, abilities, and the bytes of state that decoding keeps for one layer of the stated "
        "shape, whatever the length and for each token.",
    .examples = "attn list\tthe table\n"
                "attn list --hidden 4096 --heads 32 --dim 128\tstate sizes for a larger layer\n"
                "attn list --json\tfor programs, with the papers' titles",
    .options = list_table,
    .option_count = ATTN_COUNT(list_table),
    .defaults = &defaults,
    .size = sizeof defaults,
    .run = run,
};
