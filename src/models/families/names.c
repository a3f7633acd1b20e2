/* What files call the decoder's parameters, and which rows of a stored tensor are whose. */
#include "base/status.h"
#include "models/families/family.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* "model.layers.12.rest" taken apart. */
typedef struct layer_name {
  const char *digits;
  int digit_count;
  const char *part; /* ".rest" */
} layer_name;

static const char layer_prefix[] = "model.layers.";

static bool split(const char *name, layer_name *split) {
  if (strncmp(name, layer_prefix, sizeof layer_prefix - 1) != 0) return false;
  split->digits = name + sizeof layer_prefix - 1;
  split->digit_count = (int)strspn(split->digits, "0123456789");
  split->part = split->digits + split->digit_count;
  return split->digit_count && *split->part == '.';
}

/* How far `pattern` matches the beginning of `text`: its length there, 0 when it does not. A '#'
 * stands for the digits of a number, which *number receives. */
static size_t match(const char *pattern, const char *text, int64_t *number) {
  const char *at = text;
  for (; *pattern; ++pattern) {
    if (*pattern == '#') {
      size_t digits = strspn(at, "0123456789");
      if (digits == 0) return 0;
      *number = strtoll(at, NULL, 10);
      at += digits;
    } else if (*pattern != *at++) {
      return 0;
    }
  }
  return (size_t)(at - text);
}

static const attn_family_name *find_in(const attn_family_name *names, const char *part,
                                       const char **rest, int64_t *number) {
  for (const attn_family_name *row = names; row && row->host; ++row) {
    size_t length = match(row->host, part, number);
    if (!length) continue;
    *rest = part + length;
    return row;
  }
  return NULL;
}

static const attn_family_name *find_row(const attn_family *family, attn_naming naming,
                                        const char *mixer, const char *part, const char **rest,
                                        int64_t *number) {
  if (naming == ATTN_IN_OLDER_GGUF) {
    const attn_family_name *row = find_in(family->gguf_older, part, rest, number);
    if (row) return row;
  }
  for (const attn_mixer_names *own = family->mixer_names; mixer && own && own->mixer; ++own) {
    if (strcmp(own->mixer, mixer) != 0) continue;
    const attn_family_name *row = find_in(own->names, part, rest, number);
    if (row) return row;
  }
  return find_in(family->names, part, rest, number);
}

/* Writes `pattern` with the number in place of '#'; false: it has none. */
static bool fill_in(const char *pattern, int64_t number, char *text, size_t size) {
  const char *mark = strchr(pattern, '#');
  if (!mark)
    snprintf(text, size, "%s", pattern);
  else
    snprintf(text, size, "%.*s%lld%s", (int)(mark - pattern), pattern, (long long)number, mark + 1);
  return mark != NULL;
}

/* Queries and keys whose rotated channels lie side by side in GGUF files. */
static bool in_pairs(const attn_family *family, const char *part) {
  return family->gguf_pairs_together && (strstr(part, ".q_proj.") || strstr(part, ".k_proj."));
}

attn_status attn_family_place(const attn_model_config *config, const attn_parameter_shape *shape,
                              attn_naming naming, attn_place *place) {
  const attn_family *family = config->family;
  bool in_gguf = naming != ATTN_IN_SAFETENSORS;
  const char *host = shape->name, *rest = "", *mixer = NULL;
  layer_name layer = {0};
  bool in_layer = split(host, &layer);
  int64_t l = in_layer ? strtoll(layer.digits, NULL, 10) : -1, number = -1;
  *place = (attn_place){0};
  if (in_layer) mixer = config->layers[l].mixer->info.name;
  const attn_family_name *row =
      find_row(family, naming, mixer, in_layer ? layer.part : host, &rest, &number);
  if (in_gguf && (!row || !row->gguf))
    return attn_fail(ATTN_UNSUPPORTED, "%s has no name in GGUF files", host);
  if (!row) {
    snprintf(place->name, sizeof place->name, "%s", host);
    return ATTN_OK;
  }
  char middle[96];
  const char *layers = family->layers ? family->layers : layer_prefix;
  bool numbered = fill_in(in_gguf ? row->gguf : row->checkpoint, number, middle, sizeof middle);
  if (!in_layer)
    snprintf(place->name, sizeof place->name, "%s%s", middle, rest);
  else
    snprintf(place->name, sizeof place->name, "%s%.*s%s%s", in_gguf ? "blk." : layers,
             layer.digit_count, layer.digits, middle, rest);
  if (number >= 0 && !numbered) /* one tensor for all of them, one behind the other */
    place->rows = (attn_row_map){.offset = number * shape->shape[0], .part = true};
  if (in_gguf && in_layer && in_pairs(family, layer.part))
    place->rows.head = config->layers[l].options.dim;
  if (in_layer && family->store) family->store(config, l, layer.part, naming, place);
  return ATTN_OK;
}

int64_t attn_row_map_at(const attn_row_map *map, int64_t r) {
  if (map->head > map->turned_from + 1) {
    int64_t head = r / map->head, i = r % map->head - map->turned_from;
    int64_t half = (map->head - map->turned_from) / 2;
    if (i >= 0) r = head * map->head + map->turned_from + i % half * 2 + i / half;
  }
  if (map->run) r = r / map->run * map->period + r % map->run;
  return map->offset + r;
}
