/* attn compare --cab: the compositional index of CAB for a file of metrics (tasks/cab.h). */
#include "cli/compare.h"
#include "tasks/cab.h"

#include <math.h>

enum { NAME_COLUMNS = 18, SCORE_COLUMNS = 10 };

/* Whether anything of the pattern was measured: of a row, of any. */
static bool row_has_pattern(const attn_cab *cab, const attn_cab_row *row,
                            attn_cab_pattern pattern) {
  for (int m = 0; m < cab->metric_count; ++m)
    if (cab->metrics[m].pattern == pattern && !isnan(row->values[m])) return true;
  return false;
}

static bool has_pattern(const attn_cab *cab, attn_cab_pattern pattern) {
  for (int r = 0; r < cab->row_count; ++r)
    if (row_has_pattern(cab, &cab->rows[r], pattern)) return true;
  return false;
}

static void print_score(double score) {
  if (isnan(score))
    printf("%*s", SCORE_COLUMNS, "-");
  else
    printf("%*.3f", SCORE_COLUMNS, score);
}

/* Rows of attentions, columns of tasks, then the index and how far it is above the baseline's. */
static void print_pattern(const attn_cab *cab, attn_cab_pattern pattern) {
  printf("%-*s", NAME_COLUMNS, attn_cab_pattern_names[pattern]);
  for (int m = 0; m < cab->metric_count; m = attn_cab_task_end(cab, m))
    if (cab->metrics[m].pattern == pattern) printf("%*s", SCORE_COLUMNS, cab->metrics[m].task);
  printf("%*s%*s\n", SCORE_COLUMNS, "index", SCORE_COLUMNS, "delta");
  double baseline = attn_cab_index(cab, &cab->rows[cab->baseline], pattern);
  for (int r = 0; r < cab->row_count; ++r) {
    if (!row_has_pattern(cab, &cab->rows[r], pattern)) continue;
    printf("%-*s", NAME_COLUMNS, cab->rows[r].name);
    for (int m = 0; m < cab->metric_count; m = attn_cab_task_end(cab, m))
      if (cab->metrics[m].pattern == pattern)
        print_score(attn_cab_task_score(cab, &cab->rows[r], m));
    double index = attn_cab_index(cab, &cab->rows[r], pattern);
    print_score(index);
    print_score(index - baseline);
    putchar('\n');
  }
}

static json_t *pattern_json(const attn_cab *cab, const attn_cab_row *row,
                            attn_cab_pattern pattern) {
  double index = attn_cab_index(cab, row, pattern);
  double baseline = attn_cab_index(cab, &cab->rows[cab->baseline], pattern);
  json_t *tasks = json_object();
  for (int m = 0; m < cab->metric_count; m = attn_cab_task_end(cab, m))
    if (cab->metrics[m].pattern == pattern)
      json_object_set_new(tasks, cab->metrics[m].task,
                          attn_json_real(attn_cab_task_score(cab, row, m)));
  return json_pack("{s:o, s:o, s:o}", "tasks", tasks, "index", attn_json_real(index), "delta",
                   attn_json_real(index - baseline));
}

static json_t *to_json(const attn_cab *cab) {
  json_t *attentions = json_object(), *metrics = json_array();
  for (int r = 0; r < cab->row_count; ++r) {
    json_t *patterns = json_object();
    for (int p = 0; p < ATTN_CAB_PATTERNS; ++p)
      if (row_has_pattern(cab, &cab->rows[r], (attn_cab_pattern)p))
        json_object_set_new(patterns, attn_cab_pattern_names[p],
                            pattern_json(cab, &cab->rows[r], (attn_cab_pattern)p));
    json_object_set_new(attentions, cab->rows[r].name, patterns);
  }
  for (int m = 0; m < cab->metric_count; ++m) {
    const attn_cab_metric *metric = &cab->metrics[m];
    json_array_append_new(metrics, json_pack("{s:s, s:s, s:s, s:s, s:o, s:o}", "pattern",
                                             attn_cab_pattern_names[metric->pattern], "task",
                                             metric->task, "name", metric->name, "better",
                                             metric->higher ? "higher" : "lower", "mean",
                                             attn_json_real(metric->mean), "deviation",
                                             attn_json_real(metric->deviation)));
  }
  return json_pack("{s:s, s:o, s:o}", "baseline", cab->rows[cab->baseline].name, "metrics", metrics,
                   "attentions", attentions);
}

int attn_compare_cab(const attn_command *command, const char *path, bool json) {
  attn_cab cab;
  attn_status status = attn_cab_load(path, &cab);
  if (status != ATTN_OK) return attn_report(command, status);
  int code = ATTN_EXIT_OK;
  bool first = true;
  if (json) code = attn_print_json(command, to_json(&cab), false);
  for (int p = 0; !json && p < ATTN_CAB_PATTERNS; ++p) {
    if (!has_pattern(&cab, (attn_cab_pattern)p)) continue;
    if (!first) putchar('\n');
    print_pattern(&cab, (attn_cab_pattern)p);
    first = false;
  }
  attn_cab_close(&cab);
  return code;
}
