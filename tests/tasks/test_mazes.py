"""Mazes written out as text, and random ones against breadth-first search, symmetry and the exact distribution."""

import collections
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from key_use import assert_every_key_has_one_purpose

from maml_jax.tasks.mazes import MOVES, Maze, mazes, shortest_path
from maml_jax.types import Episode

UP, RIGHT, DOWN, LEFT = range(4)
KEY = jax.random.key(0)

SNAKE = """
#######
#S....#
#####.#
#.....#
#.#####
#....G#
#######
"""
"""The longest path of a 3 × 3 maze: it visits every cell."""


def parse(text):
    squares = np.array([list(line) for line in text.split()])
    start, goal = (jnp.asarray(np.argwhere(squares == letter)[0], jnp.int32) for letter in "SG")
    return Maze(jnp.asarray(squares == "#"), start, goal)


def draw(observation):
    """The two planes as text."""
    walls, goal = observation.reshape(2, 5, 5)
    return ["".join(row) for row in np.where(walls == 1, "#", np.where(goal == 1, "G", "."))]


def distances(walls, source):
    """Time steps from a square to every cell that can be reached, by breadth-first search: {square: steps}."""
    found, queue = {source: 0}, collections.deque([source])
    while queue:
        row, column = queue.popleft()
        for down, right in MOVES.tolist():
            cell = row + 2 * down, column + 2 * right
            if not walls[row + down, column + right] and cell not in found:
                found[cell] = found[row, column] + 1
                queue.append(cell)
    return found


def sample(size, count):
    keys = jax.random.split(jax.random.key(size), count)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(mazes(size=size).sample_task))(keys))


def unstack(tasks):
    return [Maze(*leaves) for leaves in zip(*tasks, strict=True)]


@pytest.fixture(scope="module")
def tasks():
    return sample(5, 300)


@pytest.fixture(scope="module")
def small_tasks():
    return sample(2, 8000)


@pytest.mark.parametrize("size", [2, 5])
def test_a_maze_is_a_spanning_tree_with_two_different_cells(size, request):
    for walls, start, goal in unstack(request.getfixturevalue("tasks" if size == 5 else "small_tasks"))[:300]:
        chex.assert_shape([walls, start, goal], [(2 * size + 1,) * 2, (2,), (2,)])
        assert walls[[0, -1]].all()
        assert walls[:, [0, -1]].all()
        assert walls[::2, ::2].all()
        cells = set(itertools.product(range(1, 2 * size, 2), repeat=2))
        # The cells are open and as many passages as a tree has join them all.
        assert (~walls).sum() == len(cells) + len(cells) - 1
        assert distances(walls, (1, 1)).keys() == cells
        assert {tuple(start), tuple(goal)} < cells
        assert tuple(start) != tuple(goal)


def test_keys_draw_different_mazes(tasks):
    assert len({walls.tobytes() for walls in tasks.walls}) == 300


def test_every_key_has_one_purpose():
    def sample_episode(key):
        task_key, episode_key = jax.random.split(key)
        return Episode(mazes().sample_task(task_key), None, episode_key)

    assert_every_key_has_one_purpose(sample_episode, KEY)


def assert_frequencies(found, probabilities, total):
    """Each frequency is that of a binomial variable: within five standard deviations."""
    bound = 5 * np.sqrt(probabilities * (1 - probabilities) / total)
    np.testing.assert_array_less(np.abs(found - probabilities), bound + 1e-9)


def test_mazes_of_two_by_two_cells_are_uniform(small_tasks):
    # One of the four inner walls stands, by symmetry each as often; it, start and goal are independent.
    wall = small_tasks.walls[:, [1, 2, 2, 3], [2, 1, 3, 2]].argmax(1)
    start, goal = (square[:, 0] // 2 * 2 + square[:, 1] // 2 for square in small_tasks[1:])
    found = np.zeros((4, 4, 4))
    np.add.at(found, (wall, start, goal), 1 / len(wall))
    assert_frequencies(found, (1 - np.eye(4))[None].repeat(4, 0) / 48, len(wall))


def test_walls_stand_as_often_as_a_random_order_says():
    # A wall is removed if taking away all walls before it would not join the cells at its sides. Give walls independent
    # uniform times t: s of the 11 others, and only those, come before it with ∫ tˢ (1 − t)¹¹⁻ˢ dt = s! (11 − s)! / 12!.
    cells = list(itertools.product(range(3), repeat=2))
    edges = [(a, b) for a, b in itertools.combinations(cells, 2) if abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1]
    others = [edge for edge in edges if edge != ((0, 0), (0, 1))]
    outer = 0.0
    for is_before in itertools.product([False, True], repeat=11):
        region = {cell: cell for cell in cells}
        for a, b in itertools.compress(others, is_before):
            region = {cell: region[a] if region[cell] == region[b] else region[cell] for cell in cells}
        if region[0, 0] != region[0, 1]:
            outer += 1 / (12 * math.comb(11, sum(is_before)))
    # By symmetry the eight walls that touch the outer wall are alike, and so are the four others; eight are removed.
    inner = (8 - 8 * outer) / 4
    expected = np.pad(
        [
            [1, outer, 1, outer, 1],
            [outer, 0, inner, 0, outer],
            [1, inner, 1, inner, 1],
            [outer, 0, inner, 0, outer],
            [1, outer, 1, outer, 1],
        ],
        1,
    )
    assert_frequencies((~sample(3, 8000).walls).mean(0), expected, 8000)


def test_shortest_path_is_that_of_a_breadth_first_search(tasks):
    found = jax.jit(jax.vmap(shortest_path))(tasks)
    assert found.dtype == np.int32
    expected = [distances(task.walls, tuple(task.start))[tuple(task.goal)] for task in unstack(tasks)]
    np.testing.assert_array_equal(found, expected)


def test_shortest_path_of_mazes_that_are_written_out():
    assert shortest_path(parse(SNAKE)) == 8
    assert shortest_path(parse("##### #S.G# #.#.# #...# #####")) == 1  # the direct one of two paths


def test_a_walker_that_knows_the_maze_takes_the_shortest_path(tasks):
    environment = mazes()
    lengths = np.asarray(jax.jit(jax.vmap(shortest_path))(tasks))
    actions = np.zeros((lengths.max(), len(lengths)), np.int32)
    for i, task in enumerate(unstack(tasks)):
        to_goal = distances(task.walls, tuple(task.goal))
        square = tuple(task.start.tolist())
        for t in range(lengths[i]):
            nexts = [(square[0] + 2 * down, square[1] + 2 * right) for down, right in MOVES.tolist()]
            is_open = [not task.walls[tuple(square + move)] for move in MOVES]
            actions[t, i] = min(itertools.compress(range(4), is_open), key=lambda action: to_goal[nexts[action]])
            square = nexts[actions[t, i]]

    def act(state, action):
        state, _, reward, done = jax.vmap(environment.step, (0, 0, 0, None))(tasks, state, action, KEY)
        return state, (reward, done)

    _, (reward, done) = jax.jit(lambda: jax.lax.scan(act, jnp.asarray(tasks.start), actions))()
    np.testing.assert_array_equal(done.argmax(0) + 1, lengths)
    before = np.arange(len(actions))[:, None] < lengths
    np.testing.assert_allclose((reward * before).sum(0), 1 - 0.04 * lengths, rtol=1e-5)


def test_moves_rewards_and_views_of_a_maze_that_is_written_out():
    maze = parse(SNAKE)
    environment = mazes(size=3, view=5)
    step = jax.jit(environment.step)
    state, observation = environment.reset(maze, KEY)
    np.testing.assert_array_equal(state, (1, 1))
    assert draw(observation) == ["#####", "#####", "##...", "#####", "##..."]
    for action, square, reward, view in [
        (UP, (1, 1), -0.041, ["#####", "#####", "##...", "#####", "##..."]),
        (LEFT, (1, 1), -0.041, ["#####", "#####", "##...", "#####", "##..."]),
        (DOWN, (1, 1), -0.041, ["#####", "#####", "##...", "#####", "##..."]),
        (RIGHT, (1, 3), -0.04, ["#####", "#####", ".....", "####.", "....."]),
        (RIGHT, (1, 5), -0.04, ["#####", "#####", "...##", "##.##", "...##"]),
        (DOWN, (3, 5), -0.04, ["...##", "##.##", "...##", "#####", "..G##"]),
        (DOWN, (3, 5), -0.041, ["...##", "##.##", "...##", "#####", "..G##"]),
        (LEFT, (3, 3), -0.04, [".....", "####.", ".....", ".####", "....G"]),
        (LEFT, (3, 1), -0.04, ["##...", "#####", "##...", "##.##", "##..."]),
        (DOWN, (5, 1), -0.04, ["##...", "##.##", "##...", "#####", "#####"]),
        (RIGHT, (5, 3), -0.04, [".....", ".####", "....G", "#####", "#####"]),
        (RIGHT, (5, 5), 0.96, ["...##", "#####", "..G##", "#####", "#####"]),
    ]:
        state, observation, found, done = step(maze, state, action, KEY)
        np.testing.assert_array_equal(state, square)
        np.testing.assert_allclose(found, reward, rtol=1e-6)
        assert draw(observation) == view
        assert done == (square == (5, 5))


@pytest.mark.parametrize("view", [3, 7])
def test_the_view_is_a_part_of_the_maze_and_shows_nothing_beyond_it(view, tasks):
    task = unstack(tasks)[0]
    reach = view // 2
    padded = np.pad(task.walls, reach, constant_values=True)
    reset = jax.jit(mazes(view=view).reset)
    for row, column in itertools.product(range(1, 10, 2), repeat=2):
        walls = padded[row : row + view, column : column + view]
        goal = np.zeros_like(padded)
        goal[tuple(task.goal + reach)] = True
        goal = goal[row : row + view, column : column + view]
        start = np.array([row, column], np.int32)
        _, observation = reset(task._replace(start=start), KEY)
        np.testing.assert_array_equal(observation, np.concatenate([walls.ravel(), goal.ravel()]))
        assert goal.any() == (np.abs(task.goal - start).max() <= reach)


@pytest.mark.parametrize("size", [2, 9])
def test_shapes_and_dtypes_stay_and_the_observation_does_not_depend_on_the_size(size, x64):
    environment = mazes(size=size, view=5)
    task = jax.eval_shape(environment.sample_task, KEY)
    before = jax.eval_shape(environment.reset, task, KEY)
    *after, reward, done = jax.eval_shape(environment.step, task, before[0], jnp.int32(UP), KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, tuple(after))
    chex.assert_shape([before[0], before[1], reward, done], [(2,), (50,), (), ()])
    assert (before[0].dtype, before[1].dtype, done.dtype) == (np.int32, np.float32, bool)
    assert jnp.issubdtype(reward.dtype, jnp.floating)


def test_vmap_is_a_loop():
    environment = mazes(size=3)

    def walk(key):
        task_key, action_key = jax.random.split(key)
        task = environment.sample_task(task_key)

        def act(state, action):
            state, *rest = environment.step(task, state, action, KEY)
            return state, rest

        return task, jax.lax.scan(act, environment.reset(task, KEY)[0], jax.random.randint(action_key, (20,), 0, 4))

    keys = jax.random.split(jax.random.key(3), 4)
    one = jax.jit(walk)
    at_once = jax.jit(jax.vmap(walk))(keys)
    chex.assert_trees_all_equal(at_once, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(one, keys)))


@pytest.mark.parametrize("size", [1, 0, -1, 2.0, True])
def test_a_size_that_makes_no_maze(size):
    with pytest.raises(ValueError, match=f"size must be an integer of at least 2, got {size}"):
        mazes(size=size)


@pytest.mark.parametrize(
    ("view", "message"),
    [(1, "view must be an integer of at least 3, got 1"), (4, "view=4 must be odd, .* use 3 or 5")],
)
def test_a_view_without_a_middle_or_without_walls(view, message):
    with pytest.raises(ValueError, match=message):
        mazes(view=view)
