/* Wisdom: what planning by measurement found, so that it measures once a machine.
 *
 * A text file: a line with the version, then one line an entry,
 *
 *   attn wisdom 1
 *   <value> <value> <value> <value> TAB <processor> TAB <key>
 *
 * In memory are the entries of this processor. Saving reads the file again and keeps what other
 * processes and other machines (a shared home directory) have put there. Lines that make no sense
 * are skipped: a cache must never make the library fail. */
#include "engines/plan.h"
#include "base/cpu.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "base/io.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char version_line[] = "attn wisdom 1";

enum {
  FILE_LIMIT = 16 << 20, /* bytes; far more than any machine's wisdom */
  LINE_LIMIT = 1024,     /* bytes of a key, or of a processor's name */
};

typedef struct entry {
  char *processor, *key;
  int64_t values[ATTN_WISDOM_VALUES];
} entry;

typedef struct entries {
  entry *data;
  size_t count, capacity;
} entries;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static entries known; /* of this processor */
static bool loaded;

static void entries_free(entries *list) {
  for (size_t i = 0; i < list->count; ++i) {
    attn_free(list->data[i].processor);
    attn_free(list->data[i].key);
  }
  attn_free(list->data);
  *list = (entries){0};
}

static entry *find(const entries *list, const char *processor, const char *key) {
  for (size_t i = 0; i < list->count; ++i)
    if (strcmp(list->data[i].key, key) == 0 && strcmp(list->data[i].processor, processor) == 0)
      return &list->data[i];
  return NULL;
}

static attn_status grow(entries *list) {
  if (list->count < list->capacity) return ATTN_OK;
  size_t capacity = list->capacity ? 2 * list->capacity : 16;
  entry *data = attn_realloc(list->data, capacity * sizeof *data);
  if (!data) return ATTN_OUT_OF_MEMORY;
  list->data = data;
  list->capacity = capacity;
  return ATTN_OK;
}

/* Adds the entry, or gives an existing one new values. */
static attn_status put(entries *list, const char *processor, const char *key,
                       const int64_t values[ATTN_WISDOM_VALUES]) {
  entry *place = find(list, processor, key);
  if (!place) {
    ATTN_TRY(grow(list));
    entry fresh = {.processor = attn_strdup(processor), .key = attn_strdup(key)};
    if (!fresh.processor || !fresh.key) {
      attn_free(fresh.processor);
      attn_free(fresh.key);
      return ATTN_OUT_OF_MEMORY;
    }
    place = &list->data[list->count++];
    *place = fresh;
  }
  memcpy(place->values, values, sizeof place->values);
  return ATTN_OK;
}

/* Spaces at both ends, which processors' names have, would not survive a text file's readers. */
static const char *this_processor(void) {
  static _Thread_local char name[sizeof attn_cpu_get()->name];
  const char *full = attn_cpu_get()->name;
  full += strspn(full, " \t");
  snprintf(name, sizeof name, "%s", full);
  for (size_t i = strlen(name); i > 0 && name[i - 1] == ' '; --i) name[i - 1] = '\0';
  return name;
}

/* --- The file --------------------------------------------------------------------------------- */

/* To be freed by attn_free. */
static attn_status wisdom_path(char **path) {
  const char *own = getenv("ATTN_WISDOM"), *cache = getenv("XDG_CACHE_HOME"),
             *home = getenv("HOME");
  if (own && *own)
    *path = attn_strdup(own);
  else if (cache && *cache == '/') /* relative ones are to be ignored, says the XDG specification */
    *path = attn_path_join(cache, "attn/wisdom");
  else if (home && *home)
    *path = attn_path_join(home, ".cache/attn/wisdom");
  else
    return attn_fail(ATTN_NOT_FOUND, "wisdom: none of ATTN_WISDOM, XDG_CACHE_HOME and HOME is set");
  return *path ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

/* Splits "v v v v TAB processor TAB key" in place; false when it is anything else. */
static bool parse_line(char *line, char **processor, char **key,
                       int64_t values[ATTN_WISDOM_VALUES]) {
  *processor = strchr(line, '\t');
  if (!*processor) return false;
  *(*processor)++ = '\0';
  *key = strchr(*processor, '\t');
  if (!*key) return false;
  *(*key)++ = '\0';
  if (!**processor || !**key || strchr(*key, '\t')) return false;
  if (strlen(*processor) > LINE_LIMIT || strlen(*key) > LINE_LIMIT) return false;
  char *rest = line;
  for (int i = 0; i < ATTN_WISDOM_VALUES; ++i) {
    char *end;
    values[i] = strtoimax(rest, &end, 10);
    if (end == rest || (*end != ' ' && *end != '\0')) return false;
    rest = end;
  }
  return *rest == '\0';
}

/* Adds the lines of `text` (which is taken apart) for which wanted() holds. */
static attn_status parse(char *text, bool (*wanted)(const char *processor), entries *list) {
  char *position = NULL, *line = strtok_r(text, "\n", &position);
  if (!line || strcmp(line, version_line) != 0) return ATTN_OK; /* a foreign file: nothing known */
  while ((line = strtok_r(NULL, "\n", &position)) != NULL) {
    char *processor, *key;
    int64_t values[ATTN_WISDOM_VALUES];
    if (parse_line(line, &processor, &key, values) && wanted(processor))
      ATTN_TRY(put(list, processor, key, values));
  }
  return ATTN_OK;
}

static bool everyone(const char *processor) {
  (void)processor;
  return true;
}

static bool this_machine(const char *processor) {
  return strcmp(processor, this_processor()) == 0;
}

static bool other_machine(const char *processor) {
  return !this_machine(processor);
}

/* A file that does not exist, or is no wisdom, holds nothing. One that cannot be read now is an
 * error: it must not be written over. */
static attn_status read_file(const char *path, bool (*wanted)(const char *), entries *list) {
  char *text;
  if (!attn_path_exists(path)) return ATTN_OK;
  attn_status status = attn_file_read(path, FILE_LIMIT, &text, NULL);
  if (status == ATTN_BAD_FORMAT) return ATTN_OK;
  if (status != ATTN_OK) return status;
  status = parse(text, wanted, list);
  attn_free(text);
  return status;
}

static attn_status write_file(const char *path, const entries *list) {
  attn_text text = {0};
  attn_text_print(&text, "%s\n", version_line);
  for (size_t i = 0; i < list->count; ++i) {
    const entry *e = &list->data[i];
    for (int v = 0; v < ATTN_WISDOM_VALUES; ++v)
      attn_text_print(&text, v ? " %" PRId64 : "%" PRId64, e->values[v]);
    attn_text_print(&text, "\t%s\t%s\n", e->processor, e->key);
  }
  size_t size = text.length;
  char *bytes, *directory = attn_path_directory(path);
  attn_status status = attn_text_take(&text, &bytes);
  if (status == ATTN_OK && !directory) status = ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = attn_make_directories(directory);
  if (status == ATTN_OK) status = attn_file_write(path, bytes, size);
  attn_free(directory);
  attn_free(bytes);
  return status;
}

/* --- What the planners and the public see ------------------------------------------------------
 */

/* Under the lock. Without a readable file there is just no wisdom yet. */
static void load_once(void) {
  if (loaded) return;
  loaded = true;
  char *path;
  if (wisdom_path(&path) != ATTN_OK) return;
  if (read_file(path, this_machine, &known) != ATTN_OK) entries_free(&known);
  attn_free(path);
}

bool attn_wisdom_lookup(const char *key, int64_t values[ATTN_WISDOM_VALUES]) {
  pthread_mutex_lock(&lock);
  load_once();
  const entry *found = find(&known, this_processor(), key);
  if (found) memcpy(values, found->values, sizeof found->values);
  pthread_mutex_unlock(&lock);
  return found != NULL;
}

attn_status attn_wisdom_record(const char *key, const int64_t values[ATTN_WISDOM_VALUES]) {
  if (!key || !*key || strlen(key) > LINE_LIMIT || strpbrk(key, "\t\n"))
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "wisdom: a key has 1 to %d characters, none of them a tab or a newline",
                     LINE_LIMIT);
  pthread_mutex_lock(&lock);
  load_once();
  attn_status status = put(&known, this_processor(), key, values);
  pthread_mutex_unlock(&lock);
  return status;
}

/* Under the lock: the file's entries for which wanted() holds, and over them those in memory. */
static attn_status merge_into_file(bool (*wanted)(const char *)) {
  char *path;
  ATTN_TRY(wisdom_path(&path));
  entries merged = {0};
  bool exists = attn_path_exists(path);
  attn_status status = read_file(path, wanted, &merged);
  for (size_t i = 0; i < known.count && status == ATTN_OK; ++i)
    status = put(&merged, known.data[i].processor, known.data[i].key, known.data[i].values);
  if (status == ATTN_OK && (exists || merged.count)) status = write_file(path, &merged);
  entries_free(&merged);
  attn_free(path);
  return status;
}

attn_status attn_wisdom_save(void) {
  pthread_mutex_lock(&lock);
  load_once();
  attn_status status = merge_into_file(everyone);
  pthread_mutex_unlock(&lock);
  return status;
}

attn_status attn_wisdom_forget(void) {
  pthread_mutex_lock(&lock);
  entries_free(&known);
  loaded = true;
  attn_status status = merge_into_file(other_machine);
  pthread_mutex_unlock(&lock);
  return status;
}

void attn_wisdom_reload(void) {
  pthread_mutex_lock(&lock);
  entries_free(&known);
  loaded = false;
  pthread_mutex_unlock(&lock);
}
