/* Pathfinder, as Long Range Arena has it (arXiv 2011.04006, section 2.4), by a recipe of its own:
 * whether two discs mark the ends of one dashed path among others, in an image of 32 x 32, 64 x 64
 * or 128 x 128 pixels (Path-X) that is read row by row.
 *
 * A path, or snake, is a chain of paddles of length S / 16 with gaps of S / 32; from one to the
 * next it turns by an angle d with a density in proportion to cos^2(1.5 d), and it keeps away from
 * all others. Two snakes have 6, 9 or 14 paddles, distractors a third of that. Tokens: 1 .. 256 are
 * pixels. The label, at the last pixel, is 2 where the discs are at two ends of the same snake,
 * else 1. */
#include "tasks/pathfinder.h"

#include "base/status.h"
#include "tasks/task.h"

#include <math.h>
#include <string.h>

enum { SIZES = 3 };
static const int sizes[SIZES] = {32, 64, 128}, paddles_of[SIZES] = {6, 9, 14};

static const float half_pi = 1.57079632679489661923F;

/* What a scene is drawn with. */
typedef struct canvas {
  attn_recipe *r;
  attn_path_scene *scene;
  float size, paddle, gap;
} canvas;

static bool inside(const canvas *c, attn_point p) {
  return p.x >= 1 && p.x <= c->size - 2 && p.y >= 1 && p.y <= c->size - 2;
}

/* The least distance of five points of each segment from the other one. */
static float apart(attn_point a, attn_point b, attn_point u, attn_point v) {
  enum { PIECES = 4 };
  float least = INFINITY;
  for (int i = 0; i <= PIECES; ++i) {
    float t = (float)i / PIECES;
    attn_point p = {a.x + t * (b.x - a.x), a.y + t * (b.y - a.y)};
    attn_point q = {u.x + t * (v.x - u.x), u.y + t * (v.y - u.y)};
    least = fminf(least, fminf(attn_distance(p, u, v), attn_distance(q, a, b)));
  }
  return least;
}

/* Whether paddle a b may be the next one of `own`, which has no place in the scene yet. */
static bool is_free(const canvas *c, const attn_snake *own, attn_point a, attn_point b) {
  float least = c->gap + 0.5F;
  for (int s = 0; s < c->scene->snakes; ++s)
    for (int i = 0; i < c->scene->snake[s].paddles; ++i)
      if (apart(a, b, c->scene->snake[s].from[i], c->scene->snake[s].to[i]) < least) return false;
  for (int i = 0; i + 1 < own->paddles; ++i)
    if (apart(a, b, own->from[i], own->to[i]) < least) return false;
  return true;
}

static float draw_turn(attn_recipe *r) {
  const float continuity = 1.5F;
  for (;;) {
    float turn = attn_recipe_between(r, -half_pi, half_pi);
    float c = cosf(fminf(continuity * fabsf(turn), half_pi));
    if (attn_recipe_uniform(r) < c * c) return turn;
  }
}

static attn_point ahead(attn_point p, float length, float angle) {
  return (attn_point){p.x + length * cosf(angle), p.y + length * sinf(angle)};
}

/* One try at a snake of `count` paddles from `start`, or from anywhere. */
static bool try_snake(const canvas *c, int count, const attn_point *start, attn_snake *own) {
  const int tries = 20;
  attn_point at;
  if (start)
    at = *start;
  else {
    at.x = attn_recipe_between(c->r, .1F * c->size, .9F * c->size);
    at.y = attn_recipe_between(c->r, .1F * c->size, .9F * c->size);
  }
  float angle = attn_recipe_between(c->r, 0, 4 * half_pi);
  own->paddles = 0;
  while (own->paddles < count) {
    bool placed = false;
    for (int i = 0; i < tries && !placed; ++i) {
      if (i && !own->paddles) angle = attn_recipe_between(c->r, 0, 4 * half_pi);
      float towards = own->paddles ? angle + draw_turn(c->r) : angle;
      attn_point end = ahead(at, c->paddle, towards);
      if (!inside(c, at) || !inside(c, end) || !is_free(c, own, at, end)) continue;
      own->from[own->paddles] = at;
      own->to[own->paddles++] = end;
      at = ahead(end, c->gap, towards);
      angle = towards;
      placed = true;
    }
    if (!placed) return false;
  }
  return true;
}

static bool add_snake(const canvas *c, int count, const attn_point *start) {
  const int restarts = 50;
  for (int i = 0; i <= restarts; ++i)
    if (try_snake(c, count, start, &c->scene->snake[c->scene->snakes])) {
      ++c->scene->snakes;
      return true;
    }
  return false;
}

/* The second snake begins near the first one. */
static bool add_second(const canvas *c, int count) {
  const int angles = 20;
  for (int i = 0; i < angles; ++i) {
    attn_point start =
        ahead(c->scene->snake[0].from[0], c->size / 4, attn_recipe_between(c->r, 0, 4 * half_pi));
    if (add_snake(c, count, &start)) return true;
  }
  return false;
}

static int paddles_for(int size) {
  for (int i = 0; i < SIZES; ++i)
    if (sizes[i] == size) return paddles_of[i];
  return 0;
}

void attn_path_draw(attn_recipe *r, attn_path_scene *scene, const attn_image *image) {
  const int count = paddles_for(image->size), few = count / 3, distractors = 20 / few;
  float size = (float)image->size;
  canvas c = {.r = r, .scene = scene, .size = size, .paddle = size / 16, .gap = size / 32};
  scene->connected = attn_recipe_below(r, 2);
  do {
    scene->snakes = 0;
  } while (!add_snake(&c, count, NULL) || !add_second(&c, count));
  for (int i = 0; i < distractors; ++i) add_snake(&c, few, NULL);
  scene->marked = attn_recipe_below(r, 2);

  memset(image->pixels, 0, (size_t)image->size * (size_t)image->size * sizeof *image->pixels);
  for (int s = 0; s < scene->snakes; ++s)
    for (int i = 0; i < scene->snake[s].paddles; ++i)
      attn_draw_capsule(image, scene->snake[s].from[i], scene->snake[s].to[i], size / 128, .8F);
  const attn_snake *far_one = &scene->snake[scene->connected ? scene->marked : 1 - scene->marked];
  attn_point start = scene->snake[scene->marked].from[0], end = far_one->to[count - 1];
  attn_draw_capsule(image, start, start, size / 20, 1);
  attn_draw_capsule(image, end, end, size / 20, 1);
}

/* The task --------------------------------------------------------------------------------------
 */

static int size_of(int64_t length) {
  for (int i = 0; i < SIZES; ++i)
    if (length == (int64_t)sizes[i] * sizes[i]) return sizes[i];
  return 0;
}

static attn_status check(const attn_task *task, const attn_task_options *o) {
  if (o->vocabulary < ATTN_IMAGE_TOKENS)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%s: a vocabulary of %lld, expected at least %d",
                     task->name, (long long)o->vocabulary, ATTN_IMAGE_TOKENS);
  if (size_of(o->length)) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "%s: a length of %lld, expected 1024, 4096 or 16384: the pixels of an image",
                   task->name, (long long)o->length);
}

static size_t scratch_bytes(const attn_task *task, const attn_task_options *o) {
  (void)task;
  return sizeof(attn_path_scene) + (size_t)o->length * sizeof(float);
}

static void example(const attn_task *task, const attn_task_options *o, attn_random *random,
                    void *scratch, int32_t *inputs, int32_t *labels) {
  attn_recipe r = attn_recipe_from(random);
  attn_path_scene *scene = scratch;
  attn_image image = {.size = size_of(o->length), .pixels = (float *)(scene + 1)};
  (void)task;
  attn_path_draw(&r, scene, &image);
  attn_image_tokens(&image, inputs);
  labels[o->length - 1] = scene->connected ? 2 : 1;
}

static double chance(const attn_task_options *o) {
  (void)o;
  return 0.5;
}

const attn_task attn_task_pathfinder = {
    .name = "pathfinder",
    .summary = "whether discs mark one path's ends, Long Range Arena's Pathfinder (2011.04006)",
    .usual = {.vocabulary = ATTN_IMAGE_TOKENS, .length = 1024},
    .check = check,
    .scratch = scratch_bytes,
    .example = example,
    .chance = chance,
};
