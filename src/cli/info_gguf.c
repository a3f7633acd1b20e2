/* attn info of a GGUF file: the model in it, what its metadata says, and how its tensors are
 * stored. */
#include "base/io.h"
#include "base/memory.h"
#include "base/progress.h"
#include "cli/info.h"
#include "base/utf8.h"
#include "files/gguf.h"
#include "models/model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { KEY_SIZE = 256, ABSENT = -1 };

/* The values of general.file_type: the block type of most tensors, and how much is kept finer. */
static const char *const file_types[] = {
    [0] = "F32",      [1] = "F16",      [2] = "Q4_0",    [3] = "Q4_1",    [7] = "Q8_0",
    [8] = "Q5_0",     [9] = "Q5_1",     [10] = "Q2_K",   [11] = "Q3_K_S", [12] = "Q3_K_M",
    [13] = "Q3_K_L",  [14] = "Q4_K_S",  [15] = "Q4_K_M", [16] = "Q5_K_S", [17] = "Q5_K_M",
    [18] = "Q6_K",    [19] = "IQ2_XXS", [20] = "IQ2_XS", [21] = "Q2_K_S", [22] = "IQ3_XS",
    [23] = "IQ3_XXS", [24] = "IQ1_S",   [25] = "IQ4_NL", [26] = "IQ3_S",  [27] = "IQ3_M",
    [28] = "IQ2_S",   [29] = "IQ2_M",   [30] = "IQ4_XS", [31] = "IQ1_M",  [32] = "BF16",
    [36] = "TQ1_0",   [37] = "TQ2_0",   [38] = "MXFP4",  [39] = "NVFP4",  [40] = "Q1_0",
};

typedef struct block_sum {
  int64_t tensors, elements, bytes;
} block_sum;

typedef struct summary {
  attn_gguf *file;
  attn_gguf_text architecture, name, tokenizer; /* NULL where absent */
  const char *file_type;                        /* NULL where absent or unknown */
  int64_t layers, hidden, context, vocabulary;  /* ABSENT where absent */
  block_sum blocks[ATTN_BLOCK_TYPES], all;
  attn_info_subject subject; /* no model: it cannot be loaded */
  char *reason;              /* why not */
} summary;

/* "llama.context_length": the numbers of a model stand below its architecture. */
static attn_status read_number(const summary *s, const char *name, int64_t *value) {
  char key[KEY_SIZE];
  *value = ABSENT;
  if (!s->architecture.data) return ATTN_OK;
  snprintf(key, sizeof key, "%.*s.%s", s->architecture.size < 64 ? (int)s->architecture.size : 64,
           s->architecture.data, name);
  return attn_gguf_int(s->file, key, ATTN_OPTIONAL, 0, INT64_MAX, value);
}

/* The list of tokens counts; files without one may have the number. */
static attn_status read_vocabulary(summary *s) {
  attn_gguf_list tokens = {.count = ABSENT};
  ATTN_TRY(attn_gguf_strings(s->file, "tokenizer.ggml.tokens", ATTN_OPTIONAL, &tokens));
  if (tokens.count == ABSENT) return read_number(s, "vocab_size", &s->vocabulary);
  s->vocabulary = tokens.count;
  return ATTN_OK;
}

static attn_status read_metadata(summary *s) {
  int64_t file_type = ABSENT;
  ATTN_TRY(attn_gguf_string(s->file, "general.architecture", ATTN_OPTIONAL, &s->architecture));
  ATTN_TRY(attn_gguf_string(s->file, "general.name", ATTN_OPTIONAL, &s->name));
  ATTN_TRY(attn_gguf_string(s->file, "tokenizer.ggml.model", ATTN_OPTIONAL, &s->tokenizer));
  ATTN_TRY(attn_gguf_int(s->file, "general.file_type", ATTN_OPTIONAL, 0, INT64_MAX, &file_type));
  if (file_type >= 0 && file_type < ATTN_COUNT(file_types)) s->file_type = file_types[file_type];
  ATTN_TRY(read_number(s, "block_count", &s->layers));
  ATTN_TRY(read_number(s, "embedding_length", &s->hidden));
  ATTN_TRY(read_number(s, "context_length", &s->context));
  return read_vocabulary(s);
}

static void add_tensor(block_sum *sum, const attn_gguf_tensor *tensor) {
  sum->tensors += 1;
  sum->elements += tensor->count;
  sum->bytes += (int64_t)tensor->bytes;
}

static attn_status summarise(const char *path, summary *s) {
  ATTN_TRY(attn_gguf_open(path, &s->file));
  for (int64_t i = 0; i < attn_gguf_tensor_count(s->file); ++i) {
    const attn_gguf_tensor *tensor = attn_gguf_tensor_at(s->file, i);
    add_tensor(&s->blocks[tensor->type], tensor);
    add_tensor(&s->all, tensor);
  }
  return read_metadata(s);
}

/* The model in the file, if it is one that can be run. */
static attn_status load_model(char *path, attn_dtype dtype, summary *s) {
  s->subject.path = path;
  if (attn_model_read(path, dtype, &s->subject.model) == ATTN_OK)
    return attn_model_get_info(s->subject.model, &s->subject.info);
  s->subject.model = NULL;
  s->reason = attn_strdup(attn_error_message());
  return s->reason ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

/* Bytes of a file as text that may be shown: valid UTF-8, and for people without what a terminal
 * would obey. Freed by attn_text_free. */
static attn_text to_text(const char *data, size_t size, bool for_people) {
  attn_utf8 utf8 = {.for_terminal = for_people};
  attn_text text = {0};
  for (size_t i = 0; i < size; ++i) {
    bool is_break = for_people && (data[i] == '\n' || data[i] == '\t');
    attn_utf8_push(&utf8, is_break ? ' ' : (unsigned char)data[i], &text);
  }
  attn_utf8_finish(&utf8, &text);
  attn_text_add(&text, "", 0); /* terminated even when empty */
  return text;
}

/* -- For programs -- */

static json_t *json_text(attn_gguf_text bytes) {
  if (!bytes.data) return json_null();
  attn_text text = to_text(bytes.data, bytes.size, false);
  json_t *value = text.failed ? NULL : json_stringn(text.data, text.length);
  attn_text_free(&text);
  return value;
}

static json_t *json_number(int64_t value) {
  return value == ABSENT ? json_null() : json_integer(value);
}

static json_t *json_blocks(const summary *s) {
  json_t *blocks = json_array();
  for (int type = 0; type < ATTN_BLOCK_TYPES; ++type) {
    const block_sum *sum = &s->blocks[type];
    if (!sum->tensors) continue;
    json_array_append_new(blocks,
                          json_pack("{s:s, s:I, s:I, s:I}", "type",
                                    attn_block_get_format((attn_block_type)type)->name, "tensors",
                                    (json_int_t)sum->tensors, "elements", (json_int_t)sum->elements,
                                    "bytes", (json_int_t)sum->bytes));
  }
  return blocks;
}

/* A single value. The getters cannot fail: the key exists and has the type. */
static json_t *json_value(const attn_gguf *file, const char *key, attn_gguf_type type) {
  attn_gguf_text text = {NULL, 0};
  int64_t integer = 0;
  double number = 0;
  bool flag = false;
  switch (type) {
  case ATTN_GGUF_STRING: attn_gguf_string(file, key, ATTN_REQUIRED, &text); return json_text(text);
  case ATTN_GGUF_BOOL: attn_gguf_bool(file, key, ATTN_REQUIRED, &flag); return json_boolean(flag);
  case ATTN_GGUF_F32:
  case ATTN_GGUF_F64: break;
  default: /* a uint64 beyond int64 becomes a real number */
    if (attn_gguf_int(file, key, ATTN_REQUIRED, INT64_MIN, INT64_MAX, &integer) == ATTN_OK)
      return json_integer(integer);
  }
  if (attn_gguf_double(file, key, ATTN_REQUIRED, -HUGE_VAL, HUGE_VAL, &number) != ATTN_OK)
    return json_null(); /* NaN */
  return attn_json_real(number);
}

/* Arrays may have 100,000 elements: they are described. */
static json_t *json_entry(const attn_gguf *file, int64_t index) {
  const char *key = attn_gguf_key(file, index);
  attn_gguf_type type = attn_gguf_key_type(file, index);
  attn_gguf_list list = {.count = 0};
  if (type != ATTN_GGUF_ARRAY) return json_value(file, key, type);
  attn_gguf_array(file, key, ATTN_REQUIRED, &list);
  return json_pack("{s:s, s:I}", "array", attn_gguf_type_name(list.type), "count",
                   (json_int_t)list.count);
}

static json_t *json_metadata(const attn_gguf *file) {
  json_t *metadata = json_object();
  for (int64_t i = 0; i < attn_gguf_key_count(file); ++i) {
    const char *key = attn_gguf_key(file, i);
    attn_text text = to_text(key, strlen(key), false);
    if (!text.failed) json_object_set_new(metadata, text.data, json_entry(file, i));
    attn_text_free(&text);
  }
  return metadata;
}

static json_t *file_json(const char *path, const summary *s) {
  return json_pack(
      "{s:s, s:s, s:i, s:o, s:o, s:I, s:I, s:I, s:s?, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:s?}",
      "model", path, "format", "GGUF", "version", attn_gguf_version(s->file), "type",
      json_text(s->architecture), "name", json_text(s->name), "parameters",
      (json_int_t)s->all.elements, "weight_bytes", (json_int_t)s->all.bytes, "tensors",
      (json_int_t)s->all.tensors, "file_type", s->file_type, "layers", json_number(s->layers),
      "hidden", json_number(s->hidden), "vocabulary", json_number(s->vocabulary), "context_length",
      json_number(s->context), "tokenizer", json_text(s->tokenizer), "blocks", json_blocks(s),
      "metadata", json_metadata(s->file), "not_loadable", s->reason);
}

/* What the model is takes the place of what the metadata say. */
static json_t *to_json(const char *path, const summary *s) {
  json_t *json = file_json(path, s);
  json_t *model = s->subject.model ? attn_info_json(&s->subject) : NULL;
  if (json && model) json_object_update(json, model);
  json_decref(model);
  return json;
}

/* -- For people -- */

static void print_bytes(attn_gguf_text bytes, const char *absent) {
  attn_text text = to_text(bytes.data, bytes.size, true);
  printf("%s", bytes.data && !text.failed ? text.data : absent);
  attn_text_free(&text);
}

static void print_number(const char *before, int64_t value) {
  if (value != ABSENT) printf("%s%lld", before, (long long)value);
}

static void print_blocks(const summary *s) {
  char count[ATTN_FORMAT_SIZE], bytes[ATTN_FORMAT_SIZE];
  for (int type = 0; type < ATTN_BLOCK_TYPES; ++type) {
    const block_sum *sum = &s->blocks[type];
    if (sum->tensors)
      printf("  %-8s %5lld tensors  %8s elements  %10s\n",
             attn_block_get_format((attn_block_type)type)->name, (long long)sum->tensors,
             attn_format_count((double)sum->elements, count, sizeof count),
             attn_format_bytes((double)sum->bytes, bytes, sizeof bytes));
  }
}

/* A value on one line; templates of a chat have pages. */
static void print_entry(const attn_gguf *file, int64_t index) {
  enum { SHOWN = 60 };
  const char *key = attn_gguf_key(file, index);
  attn_gguf_text bytes = {NULL, 0};
  attn_gguf_list list = {.count = 0};
  attn_text shown = to_text(key, strlen(key), true);
  printf("  %-40s ", shown.failed ? "?" : shown.data);
  attn_text_free(&shown);
  switch (attn_gguf_key_type(file, index)) {
  case ATTN_GGUF_ARRAY:
    attn_gguf_array(file, key, ATTN_REQUIRED, &list);
    printf("%s[%lld]\n", attn_gguf_type_name(list.type), (long long)list.count);
    break;
  case ATTN_GGUF_STRING:
    attn_gguf_string(file, key, ATTN_REQUIRED, &bytes);
    bool cut = bytes.size > SHOWN;
    if (cut) bytes.size = SHOWN; /* and back to where a character begins */
    while (cut && bytes.size && ((unsigned char)bytes.data[bytes.size] & 0xc0) == 0x80)
      --bytes.size;
    print_bytes(bytes, "");
    printf("%s\n", cut ? "..." : "");
    break;
  default: {
    json_t *value = json_entry(file, index);
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(7));
    printf("%s\n", text ? text : "?");
    free(text);
    json_decref(value);
  }
  }
}

/* A file that no model can be made of. */
static void print_unloadable(const char *path, const summary *s) {
  char count[ATTN_FORMAT_SIZE];
  printf("model           %s\n", path);
  printf("type            ");
  print_bytes(s->architecture, "unknown");
  print_number(", layers ", s->layers);
  print_number(", width ", s->hidden);
  print_number(", vocabulary ", s->vocabulary);
  printf("\nparameters      %s (%lld)\n",
         attn_format_count((double)s->all.elements, count, sizeof count),
         (long long)s->all.elements);
  attn_text reason = to_text(s->reason, strlen(s->reason), true);
  printf("not loadable    %s\n", reason.failed ? "?" : reason.data);
  attn_text_free(&reason);
}

static void print_text(const char *path, const summary *s) {
  char bytes[ATTN_FORMAT_SIZE];
  if (s->subject.model)
    attn_info_print(&s->subject);
  else
    print_unloadable(path, s);
  printf("name            ");
  print_bytes(s->name, "none");
  printf("\nfile            %s in %lld tensors, file type %s\n",
         attn_format_bytes((double)s->all.bytes, bytes, sizeof bytes), (long long)s->all.tensors,
         s->file_type ? s->file_type : "unknown");
  print_blocks(s);
  if (s->context != ABSENT) printf("context         %lld tokens\n", (long long)s->context);
  printf("tokenizer       ");
  print_bytes(s->tokenizer, "none");
  printf("\nmetadata        GGUF version %d\n", attn_gguf_version(s->file));
  for (int64_t i = 0; i < attn_gguf_key_count(s->file); ++i) print_entry(s->file, i);
}

int attn_info_gguf(const attn_command *command, const char *path, attn_dtype dtype, bool json) {
  summary s = {0};
  char *own = attn_strdup(path);
  attn_status status = own ? summarise(path, &s) : ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = load_model(own, dtype, &s);
  int code = ATTN_EXIT_OK;
  if (status != ATTN_OK)
    code = attn_report(command, status);
  else if (json)
    code = attn_print_json(command, to_json(path, &s), false);
  else
    print_text(path, &s);
  attn_model_destroy(s.subject.model);
  attn_gguf_close(s.file);
  attn_free(s.reason);
  attn_free(own);
  return code;
}
