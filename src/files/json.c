#include "files/json.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "base/io.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LARGEST_CONFIG = 64 << 20 };

/* jansson counts a line and column, which is what a person needs to find the place. */
attn_status attn_json_parse(const char *text, size_t size, const char *origin, json_t **object) {
  json_error_t error;
  *object = NULL;
  json_t *root = json_loadb(text, size, JSON_REJECT_DUPLICATES, &error);
  if (!root)
    return attn_fail(ATTN_BAD_FORMAT, "%s: not valid JSON at line %d, column %d: %s", origin,
                     error.line, error.column, error.text);
  if (!json_is_object(root)) {
    json_decref(root);
    return attn_fail(ATTN_BAD_FORMAT, "%s: expected a JSON object at the top level", origin);
  }
  *object = root;
  return ATTN_OK;
}

attn_status attn_json_load(const char *path, json_t **object) {
  char *text;
  size_t size;
  *object = NULL;
  ATTN_TRY(attn_file_read(path, LARGEST_CONFIG, &text, &size));
  attn_status status = attn_json_parse(text, size, path, object);
  attn_free(text);
  return status;
}

/* The value in a few characters, for messages. */
static const char *describe(const json_t *value, char *text, size_t size) {
  enum { SHOWN = 40 };
  switch (json_typeof(value)) {
  case JSON_OBJECT: snprintf(text, size, "an object"); break;
  case JSON_ARRAY: snprintf(text, size, "an array of %zu", json_array_size(value)); break;
  case JSON_STRING: snprintf(text, size, "\"%.*s\"", SHOWN, json_string_value(value)); break;
  case JSON_INTEGER:
    snprintf(text, size, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
    break;
  case JSON_REAL: snprintf(text, size, "%.17g", json_real_value(value)); break;
  case JSON_TRUE: snprintf(text, size, "true"); break;
  case JSON_FALSE: snprintf(text, size, "false"); break;
  case JSON_NULL: snprintf(text, size, "null"); break;
  }
  return text;
}

static attn_status fail_found(const char *key, const char *expected, const json_t *found) {
  char text[64];
  return attn_fail(ATTN_BAD_FORMAT, "\"%s\": expected %s, found %s", key, expected,
                   describe(found, text, sizeof text));
}

/* *found is NULL when the key is absent (or null) and optional. */
static attn_status look_up(const json_t *object, const char *key, attn_json_need need,
                           const char *expected, json_t **found) {
  *found = json_object_get(object, key);
  if (*found && json_is_null(*found)) *found = NULL;
  if (*found || need == ATTN_OPTIONAL) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "\"%s\" is missing: expected %s", key, expected);
}

attn_status attn_json_int(const json_t *object, const char *key, attn_json_need need,
                          int64_t minimum, int64_t maximum, int64_t *value) {
  char expected[96];
  json_t *found;
  snprintf(expected, sizeof expected, "an integer from %lld to %lld", (long long)minimum,
           (long long)maximum);
  ATTN_TRY(look_up(object, key, need, expected, &found));
  if (!found) return ATTN_OK;
  if (!json_is_integer(found) || json_integer_value(found) < minimum ||
      json_integer_value(found) > maximum)
    return fail_found(key, expected, found);
  *value = json_integer_value(found);
  return ATTN_OK;
}

attn_status attn_json_double(const json_t *object, const char *key, attn_json_need need,
                             double minimum, double maximum, double *value) {
  char expected[96];
  json_t *found;
  snprintf(expected, sizeof expected, "a number from %g to %g", minimum, maximum);
  ATTN_TRY(look_up(object, key, need, expected, &found));
  if (!found) return ATTN_OK;
  double number = json_number_value(found);
  if (!json_is_number(found) || !(number >= minimum && number <= maximum))
    return fail_found(key, expected, found);
  *value = number;
  return ATTN_OK;
}

attn_status attn_json_bool(const json_t *object, const char *key, attn_json_need need,
                           bool *value) {
  static const char expected[] = "true or false";
  json_t *found;
  ATTN_TRY(look_up(object, key, need, expected, &found));
  if (!found) return ATTN_OK;
  if (!json_is_boolean(found)) return fail_found(key, expected, found);
  *value = json_is_true(found);
  return ATTN_OK;
}

attn_status attn_json_string(const json_t *object, const char *key, attn_json_need need,
                             const char **value) {
  static const char expected[] = "a string";
  json_t *found;
  ATTN_TRY(look_up(object, key, need, expected, &found));
  if (!found) return ATTN_OK;
  if (!json_is_string(found)) return fail_found(key, expected, found);
  *value = json_string_value(found);
  return ATTN_OK;
}

attn_status attn_json_choice(const json_t *object, const char *key, attn_json_need need,
                             const char *const *names, int count, int *value) {
  char expected[512];
  json_t *found;
  size_t used = (size_t)snprintf(expected, sizeof expected, "one of");
  for (int i = 0; i < count && used < sizeof expected; ++i)
    used += (size_t)snprintf(expected + used, sizeof expected - used, "%s \"%s\"", i ? "," : "",
                             names[i]);
  ATTN_TRY(look_up(object, key, need, expected, &found));
  if (!found) return ATTN_OK;
  for (int i = 0; i < count && json_is_string(found); ++i)
    if (strcmp(json_string_value(found), names[i]) == 0) {
      *value = i;
      return ATTN_OK;
    }
  return fail_found(key, expected, found);
}

attn_status attn_json_array(const json_t *object, const char *key, attn_json_need need,
                            json_t **value) {
  static const char expected[] = "an array";
  json_t *found;
  ATTN_TRY(look_up(object, key, need, expected, &found));
  if (!found) return ATTN_OK;
  if (!json_is_array(found)) return fail_found(key, expected, found);
  *value = found;
  return ATTN_OK;
}

attn_status attn_json_object(const json_t *object, const char *key, attn_json_need need,
                             json_t **value) {
  static const char expected[] = "an object";
  json_t *found;
  ATTN_TRY(look_up(object, key, need, expected, &found));
  if (!found) return ATTN_OK;
  if (!json_is_object(found)) return fail_found(key, expected, found);
  *value = found;
  return ATTN_OK;
}

static const char *name_at(const void *context, int64_t i) {
  return ((const char *const *)context)[i];
}

int attn_json_unknown(const json_t *object, const char *const *known, int count, char *text,
                      size_t size) {
  const char *key;
  json_t *value;
  int unknown = 0;
  size_t used = 0;
  if (size) text[0] = '\0';
  json_object_foreach((json_t *)(uintptr_t)object, key, value) {
    int i = 0;
    while (i < count && strcmp(key, known[i]) != 0) ++i;
    if (i < count) continue;
    char hint[ATTN_HINT_SIZE];
    attn_close_names(key, name_at, known, count, hint);
    if (used < size)
      used +=
          (size_t)snprintf(text + used, size - used, "%s\"%s\"%s", unknown ? ", " : "", key, hint);
    ++unknown;
  }
  return unknown;
}

attn_status attn_json_save(const char *path, const json_t *value) {
  char *text = json_dumps(value, JSON_INDENT(2) | JSON_REAL_PRECISION(17) | JSON_ENCODE_ANY);
  if (!text) return attn_fail(ATTN_OUT_OF_MEMORY, "%s: out of memory while writing JSON", path);
  size_t length = strlen(text);
  attn_file_writer *writer;
  attn_status status = attn_file_writer_open(path, &writer);
  if (status == ATTN_OK) {
    attn_file_writer_write(writer, text, length);
    attn_file_writer_write(writer, "\n", 1);
    status = attn_file_writer_commit(writer);
  }
  free(text); /* jansson's own allocation */
  return status;
}
