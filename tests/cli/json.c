/* Looks into JSON for the tests of the command:  json [--lines] [KEY or INDEX]... < input
 *
 * Checks that standard input is one JSON value (with --lines: one a line, of which the last is
 * taken) and prints what the keys lead to: strings as they are, arrays and objects by their number
 * of elements. Exit code 1 when it is no JSON or a key is missing. */
#include <jansson.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static json_t *read_lines(void) {
  char *line = NULL;
  size_t capacity = 0;
  json_t *last = NULL;
  json_error_t error;
  while (getline(&line, &capacity, stdin) > 0) {
    json_decref(last);
    last = json_loads(line, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
    if (!last) {
      fprintf(stderr, "json: %s in %s", error.text, line);
      break;
    }
  }
  free(line);
  return last;
}

static json_t *read_value(void) {
  json_error_t error;
  json_t *value = json_loadf(stdin, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
  if (!value) fprintf(stderr, "json: line %d: %s\n", error.line, error.text);
  return value;
}

static void print_value(const json_t *value) {
  if (json_is_string(value))
    fwrite(json_string_value(value), 1, json_string_length(value), stdout);
  else if (json_is_array(value))
    printf("%zu\n", json_array_size(value));
  else if (json_is_object(value))
    printf("%zu\n", json_object_size(value));
  else
    json_dumpf(value, stdout, JSON_ENCODE_ANY);
}

int main(int argc, char **argv) {
  int next = argc > 1 && strcmp(argv[1], "--lines") == 0 ? 2 : 1;
  json_t *root = next == 2 ? read_lines() : read_value(), *value = root;
  for (; value && next < argc; ++next) {
    value = json_is_array(value) ? json_array_get(value, strtoul(argv[next], NULL, 10))
                                 : json_object_get(value, argv[next]);
    if (!value) fprintf(stderr, "json: there is no %s\n", argv[next]);
  }
  if (value) print_value(value);
  json_decref(root);
  return value ? 0 : 1;
}
