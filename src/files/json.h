/* Reading configurations: typed getters over jansson whose messages name the key, what was expected
 * and what was found.
 *
 * Every getter leaves *value as it is when the key is absent or null, so that the caller's
 * initialiser is the default; when `required` is ATTN_REQUIRED an absent key is ATTN_BAD_FORMAT. */
#ifndef ATTN_FILES_JSON_H
#define ATTN_FILES_JSON_H

#include "attn/base.h"

#include <jansson.h>

typedef enum attn_json_need { ATTN_OPTIONAL = 0, ATTN_REQUIRED } attn_json_need;

/* Parses an object (the top level of every file we read); duplicate keys are refused. `origin`
 * stands in messages, e.g. the path. Freed by json_decref. */
attn_status attn_json_parse(const char *text, size_t size, const char *origin, json_t **object);
attn_status attn_json_load(const char *path, json_t **object);

attn_status attn_json_int(const json_t *object, const char *key, attn_json_need need,
                          int64_t minimum, int64_t maximum, int64_t *value);
/* Accepts integers too. The range is closed. */
attn_status attn_json_double(const json_t *object, const char *key, attn_json_need need,
                             double minimum, double maximum, double *value);
attn_status attn_json_bool(const json_t *object, const char *key, attn_json_need need, bool *value);
/* Borrowed from `object`. */
attn_status attn_json_string(const json_t *object, const char *key, attn_json_need need,
                             const char **value);
/* One of `count` names; *value is its index. */
attn_status attn_json_choice(const json_t *object, const char *key, attn_json_need need,
                             const char *const *names, int count, int *value);
/* Borrowed; NULL stays when absent. */
attn_status attn_json_array(const json_t *object, const char *key, attn_json_need need,
                            json_t **value);
attn_status attn_json_object(const json_t *object, const char *key, attn_json_need need,
                             json_t **value);

/* How many keys of `object` are not among `count` known ones; their names, each with the closest
 * known name, are written to `text` (cut off at `size`, always terminated). */
int attn_json_unknown(const json_t *object, const char *const *known, int count, char *text,
                      size_t size);

/* Writes the value with two spaces of indentation and a final newline, beside and renamed. */
attn_status attn_json_save(const char *path, const json_t *value);

#endif
