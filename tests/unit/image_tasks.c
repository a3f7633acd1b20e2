/* The tasks that read images: that their recipes are followed, and that what an example shows is
 * what its label says. */
#include "support/test.h"

#include "tasks/drawing.h"
#include "tasks/pathfinder.h"
#include "tasks/task.h"

#include <math.h>
#include <string.h>

/* Labels, a sum of pixels and random numbers of the published recipe, seed 1 of the training split.
 */
static void digits_follow_the_recipe(void **state) {
  (void)state;
  static const int labels[] = {4, 1, 8, 7, 0, 3, 7, 7, 5, 6, 0, 7, 0, 1, 7, 3};
  static float pixels[ATTN_DIGIT_SIZE * ATTN_DIGIT_SIZE];
  attn_image image = {.size = ATTN_DIGIT_SIZE, .pixels = pixels};
  attn_recipe r = attn_recipe_of(1, 0, 0);
  assert_float_equal(attn_recipe_uniform(&r), .4327449, 1e-6);
  assert_float_equal(attn_recipe_uniform(&r), .4256321, 1e-6);
  assert_int_equal(attn_recipe_below(&r, 10), 5);
  assert_float_equal(attn_recipe_normal(&r), .312509, 1e-5);
  for (int i = 0; i < 16; ++i) {
    r = attn_recipe_of(1, 0, (uint64_t)i);
    assert_int_equal(attn_draw_digit(&r, &image), labels[i]);
    double sum = 0;
    for (int n = 0; n < ATTN_DIGIT_SIZE * ATTN_DIGIT_SIZE; ++n) sum += pixels[n];
    if (i == 0) assert_float_equal(sum, 132.24, .006);
  }
}

static const attn_task *find(const char *name) {
  const attn_task *task;
  assert_ok(attn_task_find(name, &task));
  return task;
}

/* Of an image task: tokens in range, one label, at the end, all labels about equally often. */
static void check_examples(const char *name, int classes, int count) {
  enum { LENGTH = 1024, MOST = 400 };
  static int32_t inputs[MOST * LENGTH], labels[MOST * LENGTH];
  int times[16] = {0};
  attn_task_options o = {0};
  assert_ok(attn_task_generate(find(name), &o, 3, ATTN_TASK_TEST, 0, count, inputs, labels));
  for (int e = 0; e < count; ++e) {
    for (int t = 0; t < LENGTH; ++t) {
      int32_t token = inputs[e * LENGTH + t], label = labels[e * LENGTH + t];
      assert_true(token >= 1 && token < ATTN_IMAGE_TOKENS);
      if (t < LENGTH - 1)
        assert_int_equal(label, ATTN_NO_LABEL);
      else
        assert_true(label >= 1 && label <= classes);
    }
    ++times[labels[e * LENGTH + LENGTH - 1]];
  }
  double expected = (double)count / classes, deviation = sqrt(expected * (1 - 1.0 / classes));
  for (int c = 1; c <= classes; ++c) assert_true(fabs(times[c] - expected) < 4 * deviation);
}

static void examples_are_images_with_a_label(void **state) {
  (void)state;
  check_examples("digits", 10, 400);
  check_examples("pathfinder", 2, 200);
}

static double length_of(attn_point a, attn_point b) {
  return hypot((double)a.x - (double)b.x, (double)a.y - (double)b.y);
}

/* The least distance of two segments, by many points of each. */
static double distance(attn_point a, attn_point b, attn_point u, attn_point v) {
  double least = INFINITY;
  for (int i = 0; i <= 40; ++i)
    for (int j = 0; j <= 40; ++j) {
      float s = (float)i / 40, t = (float)j / 40;
      attn_point p = {a.x + s * (b.x - a.x), a.y + s * (b.y - a.y)};
      attn_point q = {u.x + t * (v.x - u.x), u.y + t * (v.y - u.y)};
      least = fmin(least, length_of(p, q));
    }
  return least;
}

static bool is_near(attn_point p, float x, float y) {
  return hypotf(p.x - x, p.y - y) < 0.71F;
}

/* Paddles follow each other as the rule says and keep away from all others, everything is inside,
 * and the brightest pixels lie where the label says. */
static void check_scene(const attn_path_scene *scene, const attn_image *image) {
  float size = (float)image->size, gap = size / 32;
  int count = scene->snake[0].paddles;
  assert_int_equal(scene->snake[1].paddles, count);
  assert_true(fabs(length_of(scene->snake[0].from[0], scene->snake[1].from[0]) - (double)size / 4) <
              1e-3);
  for (int s = 0; s < scene->snakes; ++s)
    for (int i = 0; i < scene->snake[s].paddles; ++i) {
      attn_point a = scene->snake[s].from[i], b = scene->snake[s].to[i];
      assert_true(fabs(length_of(a, b) - (double)size / 16) < 1e-3);
      assert_true(fminf(fminf(a.x, a.y), fminf(b.x, b.y)) >= 1);
      assert_true(fmaxf(fmaxf(a.x, a.y), fmaxf(b.x, b.y)) <= size - 2);
      if (i) assert_true(fabs(length_of(scene->snake[s].to[i - 1], a) - (double)gap) < 1e-3);
      for (int other = 0; other <= s; ++other)
        for (int j = 0; j < (other == s ? i - 1 : scene->snake[other].paddles); ++j)
          assert_true(distance(a, b, scene->snake[other].from[j], scene->snake[other].to[j]) >
                      (double)gap); /* the rule asks at five points: half a pixel more */
    }
  const attn_snake *marked = &scene->snake[scene->marked];
  const attn_snake *far_one = &scene->snake[scene->connected ? scene->marked : 1 - scene->marked];
  bool start = false, end = false;
  for (int y = 0; y < image->size; ++y)
    for (int x = 0; x < image->size; ++x)
      if (image->pixels[y * image->size + x] == 1) {
        start = start || is_near(marked->from[0], (float)x, (float)y);
        end = end || is_near(far_one->to[count - 1], (float)x, (float)y);
      }
  assert_true(start && end);
}

static void paths_follow_their_rule(void **state) {
  (void)state;
  enum { MOST = 128 };
  static float pixels[MOST * MOST];
  static const int sizes[] = {32, 64, 128}, distractors[] = {10, 6, 5};
  int connected = 0;
  for (int n = 0; n < 3; ++n)
    for (int i = 0; i < 20; ++i) {
      attn_path_scene scene;
      attn_image image = {.size = sizes[n], .pixels = pixels};
      attn_recipe r = attn_recipe_of(2, 0, (uint64_t)(20 * n + i));
      attn_path_draw(&r, &scene, &image);
      check_scene(&scene, &image);
      assert_true(scene.snakes <= 2 + distractors[n] && scene.snakes >= distractors[n]);
      connected += scene.connected;
    }
  assert_true(connected > 15 && connected < 45);
}

static void wrong_sizes_are_refused(void **state) {
  (void)state;
  static const struct {
    const char *name, *says;
    attn_task_options options;
  } wrong[] = {
      {"digits", "length", {.length = 1000}},     {"digits", "vocabulary", {.vocabulary = 256}},
      {"pathfinder", "length", {.length = 2048}}, {"pathfinder", "vocabulary", {.vocabulary = 100}},
      {"text", "length", {.length = 63}},         {"text", "vocabulary", {.vocabulary = 100}},
      {"retrieval", "length", {.length = 20}}};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; ++i) {
    attn_task_options o = wrong[i].options;
    assert_int_equal(attn_task_settle(find(wrong[i].name), &o), ATTN_INVALID_ARGUMENT);
    assert_non_null(strstr(attn_error_message(), wrong[i].says));
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(digits_follow_the_recipe),
      cmocka_unit_test(examples_are_images_with_a_label),
      cmocka_unit_test(paths_follow_their_rule),
      cmocka_unit_test(wrong_sizes_are_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
