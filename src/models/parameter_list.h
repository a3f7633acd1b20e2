/* The parameters of a host that is not the decoder: one list, made from what the host says twice,
 * first to count and then to place; its values, files and gradients. */
#ifndef ATTN_MODELS_PARAMETER_LIST_H
#define ATTN_MODELS_PARAMETER_LIST_H

#include "files/json.h"
#include "files/safetensors.h"
#include "mixers/mixer.h"

typedef struct attn_parameter_list {
  int64_t count;
  attn_parameter *parameters;
  attn_parameter_shape *shapes; /* of each, with its full name, which is owned */
  attn_dtype compute;
  attn_device device;
} attn_parameter_list;

/* One walk over a host's parameters. */
typedef struct attn_inventory {
  attn_parameter_list *list;
  int64_t count;
  bool counting, failed;
} attn_inventory;

/* The next parameter, named prefix + shape.name; NULL while they are counted. */
attn_parameter *attn_inventory_add(attn_inventory *inventory, const char *prefix,
                                   attn_parameter_shape shape);

/* Walks twice; `walk` adds the same parameters both times and keeps what the second walk gives. */
attn_status attn_parameter_list_make(attn_parameter_list *list, attn_dtype compute,
                                     void (*walk)(attn_inventory *inventory, void *host),
                                     void *host);
/* Values: those of `file`, or, where it is NULL, fresh ones. ATTN_BAD_FORMAT for a tensor that is
 * missing or has another shape. */
attn_status attn_parameter_list_fill(attn_parameter_list *list, uint64_t seed,
                                     const attn_safetensors *file);
/* Values, gradients and products, to another device; nothing is changed after an error. */
attn_status attn_parameter_list_move(attn_parameter_list *list, attn_device device);
void attn_parameter_list_free(attn_parameter_list *list);
/* Gradients of zeros for the parameters that `chosen` says yes to (NULL: all), none for the others:
 * those that have one are what is trained. */
attn_status attn_parameter_list_add_gradients(attn_parameter_list *list,
                                              bool (*chosen)(const void *host, const char *name),
                                              const void *host);
void attn_parameter_list_drop_gradients(attn_parameter_list *list);
int64_t attn_parameter_list_numbers(const attn_parameter_list *list); /* that are learnt */

/* A directory with config.json and model.safetensors: written, made if needed; and opened: the
 * caller closes both. */
attn_status attn_parameter_list_save(const attn_parameter_list *list, const json_t *config,
                                     const char *directory);
attn_status attn_parameter_list_open(const char *directory, json_t **config,
                                     attn_safetensors **file);

/* A graph's input from host numbers [rows, columns], in the wide dtype; NULL after an error. */
attn_var *attn_graph_host_rows(attn_graph *graph, const void *values, attn_dtype dtype,
                               int64_t rows, int64_t columns);

#endif
