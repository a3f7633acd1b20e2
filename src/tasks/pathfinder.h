/* The scenes of the task pathfinder. */
#ifndef ATTN_TASKS_PATHFINDER_H
#define ATTN_TASKS_PATHFINDER_H

#include "tasks/drawing.h"

#include <stdbool.h>

enum { ATTN_PATH_MOST_SNAKES = 12, ATTN_PATH_MOST_PADDLES = 14 };

typedef struct attn_snake {
  int paddles;
  attn_point from[ATTN_PATH_MOST_PADDLES], to[ATTN_PATH_MOST_PADDLES];
} attn_snake;

/* The first two snakes are those that discs may mark: one at the start of snake `marked`, the other
 * one at the far end of the same snake (`connected`), or of the other one. */
typedef struct attn_path_scene {
  int snakes, marked;
  bool connected;
  attn_snake snake[ATTN_PATH_MOST_SNAKES];
} attn_path_scene;

/* A scene for size x size pixels (32, 64 or 128), and its image. */
void attn_path_draw(attn_recipe *r, attn_path_scene *scene, const attn_image *image);

#endif
