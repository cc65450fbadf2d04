"""Mazes: an agent that sees its surroundings only is to find a goal, and to go there straight the next time.

After Duan et al., 2016, section 3.3. https://arxiv.org/abs/1611.02779. Rewards and the size of 5 × 5 cells are the
paper's. Its agent turns and walks in a three-dimensional maze and gets pictures; here it moves on a grid and sees a
part of it from above, so the lengths of trajectories cannot be compared with the published ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maml_jax.types import Environment, check_integer

STEP_REWARD, WALL_REWARD, GOAL_REWARD = -0.04, -0.001, 1.0
"""What a time step brings, what is added when the agent hits a wall, and what is added at the goal."""
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)], np.int32)
"""The directions (row, column) of the actions: up, right, down, left."""


class Maze(NamedTuple):
    """A task: n × n cells on a grid of squares. Cells are the squares with odd coordinates, walls are between them.

    Attributes:
      walls: which squares are wall, bool [2n+1, 2n+1].
      start: the square (row, column) where every trajectory begins, int32 [2].
      goal: the square where it ends, int32 [2].
    """

    walls: jax.Array
    start: jax.Array
    goal: jax.Array


def mazes(*, size: int = 5, view: int = 5) -> Environment:
    """The environment: a random maze in which a single path joins any two cells.

    All walls stand at first. They are looked at in a random order, and one is removed if no path joins the cells at its
    sides yet (Kruskal's algorithm with random weights). So mazes that are turned or mirrored are equally probable; from
    3 × 3 cells on, not all mazes are. Start and goal are uniform among the ordered pairs of different cells.

    The action is an index of `MOVES`; the agent goes to the next cell, two squares away, or stays if there is a wall.
    The state is its square, int32 [2]. The observation, float32 [2 view²], is two planes [view, view] with the agent in
    the middle: first the walls, then the goal. Walls hide nothing, and outside of the maze all is wall. Its length does
    not depend on `size`, so one policy can act in mazes of all sizes.

    Args:
      size: n, cells along a side.
      view: squares along a side of what the agent sees, an odd number. With 3 it sees the four walls around it, and the
        goal only where the trajectory ends; with 5 also the eight cells around it.

    Returns:
      An `Environment` whose tasks are `Maze`s.

    Raises:
      ValueError: if `size` is no integer of at least 2, or `view` no odd integer of at least 3.
    """
    size = check_integer("size", size, at_least=2)
    view = check_integer("view", view, at_least=3)
    if view % 2 == 0:
        raise ValueError(f"view={view} must be odd, because the agent is in the middle; use {view - 1} or {view + 1}")
    cells = np.arange(size * size).reshape(size, size)
    squares = np.stack(np.divmod(cells.ravel(), size), -1).astype(np.int32) * 2 + 1
    sides = np.stack([np.append(cells[:, :-1], cells[:-1]), np.append(cells[:, 1:], cells[1:])], -1)
    between = squares[sides].sum(1) // 2
    all_walls = np.ones((2 * size + 1, 2 * size + 1), bool)
    all_walls[1::2, 1::2] = False
    rows, columns = np.mgrid[:view, :view] - view // 2

    def sample_task(key):
        wall_key, start_key, goal_key = jax.random.split(key, 3)
        order = jax.random.permutation(wall_key, len(sides))

        def remove(regions, sides):
            one, other = regions[sides]
            return jnp.where(regions == other, one, regions), one == other

        _, is_kept = jax.lax.scan(remove, jnp.arange(cells.size), jnp.asarray(sides)[order])
        row, column = jnp.asarray(between)[order].T
        start = jax.random.randint(start_key, (), 0, cells.size)
        goal = (start + jax.random.randint(goal_key, (), 1, cells.size)) % cells.size
        walls = jnp.asarray(all_walls).at[row, column].set(is_kept)
        return Maze(walls, jnp.asarray(squares)[start], jnp.asarray(squares)[goal])

    def observe(maze, square):
        walls = jnp.pad(maze.walls, view // 2, constant_values=True)
        nearby = jax.lax.dynamic_slice(walls, square, (view, view))
        away = maze.goal - square
        is_goal = (rows == away[0]) & (columns == away[1])
        return jnp.stack([nearby, is_goal]).ravel().astype(jnp.float32)

    def reset(maze, key):
        return maze.start, observe(maze, maze.start)

    def step(maze, square, action, key):
        move = jnp.asarray(MOVES)[action]
        hits = maze.walls[tuple(square + move)]
        square = jnp.where(hits, square, square + 2 * move)
        done = jnp.all(square == maze.goal)
        return square, observe(maze, square), STEP_REWARD + WALL_REWARD * hits + GOAL_REWARD * done, done

    return Environment(sample_task, reset, step)


def shortest_path(maze: Maze) -> jax.Array:
    """The least number of time steps from start to goal, int32 scalar.

    Args:
      maze: a task of `mazes`, or another one whose goal can be reached.
    """

    def spread(reached, _):
        beside = [jnp.roll(reached, shift, axis) for shift in (-1, 1) for axis in (0, 1)]
        return (reached | jnp.any(jnp.stack(beside), 0)) & ~maze.walls, reached[tuple(maze.goal)]

    # Two squares a step; the longest path visits every cell.
    num_cells = (len(maze.walls) // 2) ** 2
    start = jnp.zeros_like(maze.walls).at[tuple(maze.start)].set(True)
    _, is_found = jax.lax.scan(spread, start, length=2 * (num_cells - 1))
    return jnp.sum(~is_found, dtype=jnp.int32) // 2
