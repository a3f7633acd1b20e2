/* attn convert --to MIXER: exact attention becomes another mixer. */
#include "base/io.h"
#include "base/memory.h"
#include "base/progress.h"
#include "cli/convert.h"

#include <math.h>

typedef struct reporter {
  const convert_options *options;
  bool terminal;
  double printed; /* when the last line was */
} reporter;

static bool report(void *context, int64_t step, double error) {
  reporter *r = context;
  const attn_linearise_options *o = &r->options->linearise;
  const double seconds_between_lines = 10;
  if (r->options->quiet) return true;
  if (r->terminal) {
    fprintf(stderr, "\r\033[Kstep %lld/%lld  error %.4f", (long long)step, (long long)o->steps,
            error);
    if (step == o->steps) fputc('\n', stderr);
  } else if (step == 1 || step == o->steps || attn_now() - r->printed > seconds_between_lines) {
    fprintf(stderr, "step %lld/%lld  error %.4f\n", (long long)step, (long long)o->steps, error);
    r->printed = attn_now();
  }
  return true;
}

static bool print_json(const attn_linearise_options *o, const attn_linearise_result *r) {
  json_t *json = json_pack(
      "{s:s, s:s, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o}", "model", o->output, "mixer",
      o->mixer, "parameters", (json_int_t)r->parameters, "trained", (json_int_t)r->trained,
      "validation_tokens", (json_int_t)r->validation_tokens, "loss_before",
      attn_json_real(r->loss_before), "loss_swapped", attn_json_real(r->loss_swapped), "loss_after",
      attn_json_real(r->loss_after), "first_error", attn_json_real(r->first_error), "last_error",
      attn_json_real(r->last_error), "seconds", attn_json_real(r->seconds));
  bool written = json && json_dumpf(json, stdout, JSON_INDENT(2)) == 0 && putchar('\n') != EOF;
  json_decref(json);
  return written;
}

static void print_loss(const char *what, double loss) {
  if (isfinite(loss)) printf("%-28s%.3f\n", what, exp(loss));
}

static void print_text(const attn_linearise_options *o, const attn_linearise_result *r) {
  char all[ATTN_FORMAT_SIZE], trained[ATTN_FORMAT_SIZE], time[ATTN_FORMAT_SIZE];
  printf("%s: %s parameters, %s of them new%s, in %s\n", o->output,
         attn_format_count((double)r->parameters, all, sizeof all),
         attn_format_count((double)r->trained, trained, sizeof trained),
         o->steps ? " and learnt" : "", attn_format_duration(r->seconds, time, sizeof time));
  if (r->validation_tokens)
    printf("perplexity of %lld tokens in windows of %lld\n", (long long)r->validation_tokens,
           (long long)o->length);
  print_loss("  before", r->loss_before);
  print_loss("  swapped, nothing learnt", r->loss_swapped);
  print_loss("  after attention transfer", r->loss_after);
  if (isfinite(r->first_error))
    printf("error of the heads           %.4f at first, %.4f at the end\n", r->first_error,
           r->last_error);
}

int attn_convert_mixer(const attn_command *command, const convert_options *o,
                       const attn_words *words) {
  attn_linearise_options options = o->linearise;
  attn_linearise_result result;
  reporter r = {.options = o, .terminal = attn_is_terminal(stderr)};
  char *path = NULL;
  attn_status status = attn_set_threads((int)o->threads);
  if (status == ATTN_OK) status = attn_device_parse(o->device, &options.device);
  if (status == ATTN_OK) {
    path = attn_find_model(words->items[0]);
    status = path ? ATTN_OK : ATTN_NOT_FOUND;
  }
  if (status != ATTN_OK) return attn_report(command, status);
  options.model = path;
  options.output = words->items[1];
  options.data = o->data.items;
  options.data_count = o->data.count;
  options.interrupt = &attn_interrupted;
  options.sliding = o->window_kind == 1;
  attn_catch_interrupts();
  status = attn_linearise(&options, report, &r, &result);
  attn_free(path);
  if (status == ATTN_INTERRUPTED) {
    attn_complain(command, "stopped: nothing was written");
    return ATTN_EXIT_INTERRUPTED;
  }
  if (status != ATTN_OK) return attn_report(command, status);
  if (!o->json)
    print_text(&options, &result);
  else if (!print_json(&options, &result))
    return ATTN_EXIT_FAILURE;
  return ATTN_EXIT_OK;
}
