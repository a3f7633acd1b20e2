/* Models of a comparison: alike but for the mixer, with equal numbers of parameters.
 *
 * All begin with the same width of the feed-forward. The model that has most parameters then keeps
 * it; each other one gets a wider one, which adds 3 x width parameters a layer and unit (gate, up,
 * down), until it has as many. */
#include "base/memory.h"
#include "base/status.h"
#include "base/text.h"
#include "models/model.h"
#include "training/compare.h"

#include <stdio.h>
#include <stdlib.h>

enum { MATRICES = 3, PANEL = 8 }; /* PANEL: widths that are multiples of it suit the kernels */

/* How far totals may be apart, as a fraction of the largest; and how much of that a width may cost
 * that is a multiple of PANEL. */
static const double most_apart = 0.02, most_for_panels = 0.005;

char *attn_comparison_config(const attn_comparison *c, const attn_comparison_model *model) {
  const attn_comparison_options *o = &c->options;
  attn_text text = {0};
  char *result;
  attn_text_print(&text,
                  "{\n  \"model_type\": \"attn_decoder\",\n  \"vocab_size\": %lld,\n"
                  "  \"hidden_size\": %lld,\n  \"num_hidden_layers\": %lld,\n"
                  "  \"mixer\": \"%s\",\n  \"num_attention_heads\": %lld,\n"
                  "  \"feed_forward\": \"swiglu\",\n  \"intermediate_size\": %lld\n}\n",
                  (long long)o->task_options.vocabulary, (long long)o->width, (long long)o->layers,
                  model->mixer, (long long)o->heads, (long long)model->feed_forward);
  return attn_text_take(&text, &result) == ATTN_OK ? result : NULL;
}

/* Makes the model to see how large it is. */
static attn_status measure(const attn_comparison *c, attn_comparison_model *model) {
  char *config = attn_comparison_config(c, model);
  attn_model *made = NULL;
  attn_model_info info = {0};
  if (!config) return ATTN_OUT_OF_MEMORY;
  attn_status status = attn_model_create(config, 1, c->options.training.compute, &made);
  if (status == ATTN_OK) status = attn_model_get_info(made, &info);
  attn_model_destroy(made);
  attn_free(config);
  model->parameters = info.parameters;
  model->state_fixed_bytes = info.state_fixed_bytes;
  model->state_token_bytes = info.state_token_bytes;
  return status;
}

/* The width with which a model has about `total` parameters. */
static int64_t choose_width(const attn_comparison *c, const attn_comparison_model *model,
                            int64_t total) {
  int64_t unit = MATRICES * c->options.width * c->options.layers;
  int64_t missing = (total - model->parameters + unit / 2) / unit;
  int64_t width = model->feed_forward + missing;
  int64_t panels = (width + PANEL / 2) / PANEL * PANEL;
  int64_t cost = llabs(panels - width) * unit;
  return (double)cost <= most_for_panels * (double)total ? panels : width;
}

/* What is wrong with one mixer only is kept, and ATTN_OK; out of memory is no such thing. */
static attn_status keep_problem(attn_comparison *c, int model, attn_status status) {
  if (status == ATTN_OK || status == ATTN_OUT_OF_MEMORY) return status;
  snprintf(c->problems[model], ATTN_PROBLEM_SIZE, "%s", attn_error_message());
  return ATTN_OK;
}

static attn_status fit(const attn_comparison *c, attn_comparison_model *model, int64_t total) {
  if (model->parameters == total) return ATTN_OK;
  model->feed_forward = choose_width(c, model, total);
  ATTN_TRY(measure(c, model));
  if ((double)llabs(model->parameters - total) <= most_apart * (double)total) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "%s: %lld parameters, the largest model has %lld: no width of the feed-forward "
                   "makes them equal",
                   model->mixer, (long long)model->parameters, (long long)total);
}

attn_status attn_comparison_fit(attn_comparison *c) {
  int64_t total = 0;
  for (int m = 0; m < c->model_count; ++m) {
    attn_comparison_model *model = &c->models[m];
    model->mixer = c->options.mixers[m];
    model->feed_forward = c->options.feed_forward;
    ATTN_TRY(keep_problem(c, m, measure(c, model)));
    if (model->parameters > total) total = model->parameters;
  }
  for (int m = 0; m < c->model_count; ++m)
    if (!*c->problems[m]) ATTN_TRY(keep_problem(c, m, fit(c, &c->models[m], total)));
  return ATTN_OK;
}
