/* The compositional index of CAB: reading tables of metrics, and z-scores. */
#include "tasks/cab.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"

#include <math.h>
#include <string.h>

const char *const attn_cab_pattern_names[] = {"NS", "CS", "NC", "CC", NULL};

/* The constants of CAB's script: of the attentions that its paper compares. */
const attn_cab_metric attn_cab_published[] = {
    {ATTN_CAB_NS, "TTS", "FastSpeech 2 MCD", false, 3.4245, 0.06832},
    {ATTN_CAB_NS, "TTS", "FastSpeech 2 MSD", false, 1.97429, 0.03618},
    {ATTN_CAB_NS, "TTS", "Transformer-TTS MCD", false, 4.06947, 0.09422},
    {ATTN_CAB_NS, "TTS", "Transformer-TTS MSD", false, 2.19021, 0.03866},
    {ATTN_CAB_NS, "Sum", "ROUGE-1", true, 34.88667, 1.39697},
    {ATTN_CAB_NS, "Sum", "ROUGE-2", true, 6.79333, 1.41078},
    {ATTN_CAB_NS, "Sum", "ROUGE-L", true, 31.96889, 1.31499},
    {ATTN_CAB_NS, "SR", "PSNR", true, 23.208, 0.27499},
    {ATTN_CAB_NS, "SR", "SSIM", true, 0.6758, 0.01557},
    {ATTN_CAB_NS, "MLM", "perplexity", false, 36.292, 62.308},
    {ATTN_CAB_CS, "TTS", "MCD", false, 4.08325, 0.04529},
    {ATTN_CAB_CS, "TTS", "MSD", false, 2.20085, 0.01372},
    {ATTN_CAB_CS, "Sum", "ROUGE-1", true, 32.9575, 1.92754},
    {ATTN_CAB_CS, "Sum", "ROUGE-2", true, 6.0925, 0.41007},
    {ATTN_CAB_CS, "Sum", "ROUGE-L", true, 30.2575, 1.61951},
    {ATTN_CAB_CS, "LM", "perplexity", false, 22.26, 8.29944},
    {ATTN_CAB_NC, "PCC", "CD-l1", false, 7.7025, 0.64789},
    {ATTN_CAB_NC, "PCC", "CD-l2", false, 0.24775, 0.03366},
    {ATTN_CAB_NC, "PCC", "F-score", true, 0.7625, 0.03906},
    {ATTN_CAB_NC, "LSTF", "ETT MSE", false, 1.18933, 0.05615},
    {ATTN_CAB_NC, "LSTF", "ETT MAE", false, 0.80625, 0.02193},
    {ATTN_CAB_NC, "LSTF", "ECL MSE", false, 0.47575, 0.01057},
    {ATTN_CAB_NC, "LSTF", "ECL MAE", false, 0.511, 0.00601},
    {ATTN_CAB_NC, "LSTF", "Weather MSE", false, 0.62025, 0.18948},
    {ATTN_CAB_NC, "LSTF", "Weather MAE", false, 0.58075, 0.10312},
    {ATTN_CAB_CC, "TTS", "MCD", false, 5.5037, 1.29239},
    {ATTN_CAB_CC, "TTS", "MSD", false, 2.6278, 0.42726},
    {ATTN_CAB_CC, "Sum", "ROUGE-1", true, 31.35, 3.77103},
    {ATTN_CAB_CC, "Sum", "ROUGE-2", true, 5.26, 1.26028},
    {ATTN_CAB_CC, "Sum", "ROUGE-L", true, 28.8, 3.28638},
};
const int attn_cab_published_count = sizeof attn_cab_published / sizeof *attn_cab_published;

/* Scores ----------------------------------------------------------------------------------------
 */

double attn_cab_score(const attn_cab_metric *m, double value) {
  if (isnan(value)) return value;
  if (!(m->deviation > 0)) return 0;
  return (m->higher ? 1 : -1) * (value - m->mean) / m->deviation;
}

static bool same_task(const attn_cab_metric *a, const attn_cab_metric *b) {
  return a->pattern == b->pattern && strcmp(a->task, b->task) == 0;
}

int attn_cab_task_end(const attn_cab *cab, int first) {
  int end = first;
  while (end < cab->metric_count && same_task(&cab->metrics[first], &cab->metrics[end])) ++end;
  return end;
}

double attn_cab_task_score(const attn_cab *cab, const attn_cab_row *row, int first) {
  int end = attn_cab_task_end(cab, first);
  double sum = 0;
  for (int m = first; m < end; ++m) sum += attn_cab_score(&cab->metrics[m], row->values[m]);
  return sum / (end - first);
}

double attn_cab_index(const attn_cab *cab, const attn_cab_row *row, attn_cab_pattern pattern) {
  double sum = 0;
  int tasks = 0;
  for (int first = 0; first < cab->metric_count; first = attn_cab_task_end(cab, first)) {
    if (cab->metrics[first].pattern != pattern) continue;
    sum += attn_cab_task_score(cab, row, first);
    ++tasks;
  }
  return tasks ? sum / tasks : NAN;
}

/* Mean and deviation of a metric over the rows that have it. */
static void measure(attn_cab *cab, int m) {
  attn_cab_metric *metric = &cab->metrics[m];
  double sum = 0, squares = 0;
  int count = 0;
  for (int r = 0; r < cab->row_count; ++r)
    if (!isnan(cab->rows[r].values[m])) {
      sum += cab->rows[r].values[m];
      ++count;
    }
  metric->mean = count ? sum / count : 0;
  for (int r = 0; r < cab->row_count; ++r)
    if (!isnan(cab->rows[r].values[m])) {
      double off = cab->rows[r].values[m] - metric->mean;
      squares += off * off;
    }
  metric->deviation = count > 1 ? sqrt(squares / (count - 1)) : 0;
}

/* Reading ---------------------------------------------------------------------------------------
 */

static const double any = 1e300; /* of finite numbers */

/* A metric without constants has the deviation NaN until the rows are read. */
static attn_status read_metric(const json_t *object, attn_cab_metric *m) {
  static const char *const directions[] = {"lower", "higher"};
  static const char *const known[] = {"pattern", "task", "name", "better", "mean", "deviation"};
  int pattern = 0, higher = 0;
  char unknown[128];
  if (!json_is_object(object))
    return attn_fail(ATTN_BAD_FORMAT, "metrics: expected objects with pattern, task, name, better");
  if (attn_json_unknown(object, known, 6, unknown, sizeof unknown))
    return attn_fail(ATTN_BAD_FORMAT, "metrics: unknown keys: %s", unknown);
  *m = (attn_cab_metric){.mean = NAN, .deviation = NAN};
  ATTN_TRY(attn_json_choice(object, "pattern", ATTN_REQUIRED, attn_cab_pattern_names,
                            ATTN_CAB_PATTERNS, &pattern));
  ATTN_TRY(attn_json_choice(object, "better", ATTN_REQUIRED, directions, 2, &higher));
  ATTN_TRY(attn_json_string(object, "task", ATTN_REQUIRED, &m->task));
  ATTN_TRY(attn_json_string(object, "name", ATTN_REQUIRED, &m->name));
  ATTN_TRY(attn_json_double(object, "mean", ATTN_OPTIONAL, -any, any, &m->mean));
  ATTN_TRY(attn_json_double(object, "deviation", ATTN_OPTIONAL, 0, any, &m->deviation));
  m->pattern = (attn_cab_pattern)pattern;
  m->higher = higher != 0;
  if (isnan(m->mean) == isnan(m->deviation)) return ATTN_OK;
  return attn_fail(ATTN_BAD_FORMAT, "metric %s: mean and deviation go together", m->name);
}

/* Metrics of a task side by side, so that a task is a range. */
static attn_status check_order(const attn_cab *cab) {
  for (int m = 1; m < cab->metric_count; ++m)
    for (int earlier = 0; earlier < m - 1; ++earlier)
      if (same_task(&cab->metrics[earlier], &cab->metrics[m]) &&
          !same_task(&cab->metrics[m - 1], &cab->metrics[m]))
        return attn_fail(ATTN_BAD_FORMAT, "metrics of the task %s do not stand side by side",
                         cab->metrics[m].task);
  return ATTN_OK;
}

static attn_status read_metrics(const json_t *file, attn_cab *cab) {
  json_t *list = NULL;
  ATTN_TRY(attn_json_array(file, "metrics", ATTN_OPTIONAL, &list));
  if (!list) {
    memcpy(cab->metrics, attn_cab_published, sizeof attn_cab_published);
    cab->metric_count = attn_cab_published_count;
    return ATTN_OK;
  }
  size_t count = json_array_size(list);
  if (count < 1 || count > ATTN_CAB_METRICS)
    return attn_fail(ATTN_BAD_FORMAT, "metrics: there are %zu, expected 1 to %d", count,
                     ATTN_CAB_METRICS);
  for (size_t m = 0; m < count; ++m)
    ATTN_TRY(read_metric(json_array_get(list, m), &cab->metrics[m]));
  cab->metric_count = (int)count;
  return check_order(cab);
}

/* The task that begins with metric `first`, out of {"NS": {"TTS": [..], ..}, ..}. */
static attn_status read_task(const attn_cab *cab, const json_t *patterns, int first,
                             attn_cab_row *row) {
  const attn_cab_metric *m = &cab->metrics[first];
  int count = attn_cab_task_end(cab, first) - first;
  const json_t *tasks = json_object_get(patterns, attn_cab_pattern_names[m->pattern]);
  const json_t *values = json_object_get(tasks, m->task);
  if (values && (!json_is_array(values) || json_array_size(values) != (size_t)count))
    return attn_fail(ATTN_BAD_FORMAT, "%s, %s, %s: expected an array of %d numbers", row->name,
                     attn_cab_pattern_names[m->pattern], m->task, count);
  for (int i = 0; values && i < count; ++i) {
    const json_t *value = json_array_get(values, (size_t)i);
    if (json_is_null(value)) continue;
    if (!json_is_number(value) || !(fabs(json_number_value(value)) <= any))
      return attn_fail(ATTN_BAD_FORMAT, "%s, %s, %s: element %d is not a number or null", row->name,
                       attn_cab_pattern_names[m->pattern], m->task, i);
    row->values[first + i] = json_number_value(value);
  }
  return ATTN_OK;
}

/* Patterns and tasks that no metric is about are mistakes of spelling. */
static attn_status check_names(const attn_cab *cab, const char *row, json_t *patterns) {
  const char *pattern, *task;
  json_t *tasks, *values;
  if (!json_is_object(patterns))
    return attn_fail(ATTN_BAD_FORMAT, "%s: expected an object of patterns", row);
  json_object_foreach(patterns, pattern, tasks) {
    if (!json_is_object(tasks))
      return attn_fail(ATTN_BAD_FORMAT, "%s, %s: expected an object of tasks", row, pattern);
    json_object_foreach(tasks, task, values) {
      bool known = false;
      for (int m = 0; m < cab->metric_count; ++m)
        known |= strcmp(attn_cab_pattern_names[cab->metrics[m].pattern], pattern) == 0 &&
                 strcmp(cab->metrics[m].task, task) == 0;
      if (!known)
        return attn_fail(ATTN_BAD_FORMAT, "%s: no metric is of the pattern %s and the task %s", row,
                         pattern, task);
    }
  }
  return ATTN_OK;
}

static attn_status read_row(attn_cab *cab, const char *name, json_t *patterns) {
  attn_cab_row *row = &cab->rows[cab->row_count++];
  row->name = name;
  for (int m = 0; m < ATTN_CAB_METRICS; ++m) row->values[m] = NAN;
  ATTN_TRY(check_names(cab, name, patterns));
  for (int first = 0; first < cab->metric_count; first = attn_cab_task_end(cab, first))
    ATTN_TRY(read_task(cab, patterns, first, row));
  return ATTN_OK;
}

static attn_status read_baseline(const json_t *file, attn_cab *cab) {
  const char *name = NULL;
  ATTN_TRY(attn_json_string(file, "baseline", ATTN_OPTIONAL, &name));
  if (!name) return ATTN_OK;
  for (int r = 0; r < cab->row_count; ++r)
    if (strcmp(cab->rows[r].name, name) == 0) {
      cab->baseline = r;
      return ATTN_OK;
    }
  return attn_fail(ATTN_BAD_FORMAT, "baseline: no attention is called %s", name);
}

static attn_status read_file(const json_t *file, attn_cab *cab) {
  static const char *const known[] = {"metrics", "attentions", "baseline"};
  json_t *attentions = NULL, *patterns;
  const char *name;
  char unknown[128];
  if (attn_json_unknown(file, known, 3, unknown, sizeof unknown))
    return attn_fail(ATTN_BAD_FORMAT, "unknown keys: %s", unknown);
  ATTN_TRY(read_metrics(file, cab));
  ATTN_TRY(attn_json_object(file, "attentions", ATTN_REQUIRED, &attentions));
  size_t count = json_object_size(attentions);
  if (!count) return attn_fail(ATTN_BAD_FORMAT, "attentions: there are none");
  cab->rows = attn_alloc_array(count, sizeof *cab->rows);
  if (!cab->rows) return ATTN_OUT_OF_MEMORY;
  json_object_foreach(attentions, name, patterns) ATTN_TRY(read_row(cab, name, patterns));
  for (int m = 0; m < cab->metric_count; ++m)
    if (isnan(cab->metrics[m].deviation)) measure(cab, m);
  return read_baseline(file, cab);
}

attn_status attn_cab_read(json_t *file, attn_cab *cab) {
  *cab = (attn_cab){.file = json_incref(file)};
  attn_status status = read_file(file, cab);
  if (status != ATTN_OK) attn_cab_close(cab);
  return status;
}

attn_status attn_cab_load(const char *path, attn_cab *cab) {
  json_t *file;
  ATTN_TRY(attn_json_load(path, &file));
  attn_status status = attn_cab_read(file, cab);
  json_decref(file);
  return status;
}

void attn_cab_close(attn_cab *cab) {
  attn_free(cab->rows);
  json_decref(cab->file);
  *cab = (attn_cab){0};
}
