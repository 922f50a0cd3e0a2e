"""Tests models/dqn/replay.py against a plain list of transitions."""

import collections
import errno
import os
import pathlib

import numpy as np
import pytest

from models.common.errors import UserError
from models.dqn import replay
from models.dqn.replay import CUT, LAST, TERMINAL, Replay


class Naive:
    """Keeps every step of every environment and builds each transition from scratch."""

    def __init__(self, environments):
        self.steps = [[] for _ in range(environments)]

    def add(self, frames, actions, rewards, ends):
        steps = zip(frames, actions, rewards, ends, strict=True)
        for ring, step in zip(self.steps, steps, strict=True):
            ring.append(step)

    def transitions(self, window, whole_stacks=False):
        """{(environment, t): (5 frames, action, reward, terminal)} of the last `window` steps."""
        result = {}
        for ring, steps in enumerate(self.steps):
            oldest = max(0, len(steps) - window)
            for t in range(oldest + (3 if oldest else 0), len(steps) - 1):
                _, action, reward, end = steps[t]
                if end & CUT:
                    continue
                frames = [steps[t + 1][0], steps[t][0]]
                game_began = False
                for before in (t - 1, t - 2, t - 3):
                    game_began |= before < 0 or bool(steps[before][3] & LAST)
                    frames.append(np.zeros_like(frames[0]) if game_began else steps[before][0])
                if not (whole_stacks and game_began):
                    frames = np.stack(frames[::-1])
                    result[ring, t] = (frames, action, reward, bool(end & TERMINAL))
        return result


def filled(rng, capacity, environments, steps, naive=None, **options):
    made = Replay(capacity, environments, **options)
    for _ in range(steps):
        content = random_step(rng, environments)
        made.add(*content)
        if naive:
            naive.add(*content)
    return made


def random_step(rng, environments):
    ends = rng.choice([0] * 12 + [TERMINAL, TERMINAL | LAST, LAST | CUT], environments)
    return (
        rng.integers(0, 256, (environments, 84, 84)).astype(np.uint8),
        rng.integers(0, 18, environments),
        rng.normal(size=environments).astype(np.float32),
        ends,
    )


def check_same(batch, index, expected):
    frames, action, reward, terminal = expected
    # The frame after a terminal step is never used.
    used = slice(0, 4 if terminal else 5)
    np.testing.assert_array_equal(batch.frames[index, used], frames[used])
    assert (batch.actions[index], batch.rewards[index]) == (action, reward)
    assert batch.terminals[index] == terminal


@pytest.mark.parametrize("whole_stacks", [False, True])
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("environments", "steps"), [(1, 3), (1, 30), (1, 31), (1, 100), (3, 10), (3, 37)]
)
def test_it_holds_the_naive_transitions_and_no_others(
    rng, tmp_path, environments, steps, in_memory, whole_stacks
):
    naive = Naive(environments)
    options = {"file": tmp_path / "ring", "in_memory": in_memory, "whole_stacks": whole_stacks}
    made = filled(rng, 30, environments, steps, naive, spare=6, **options)
    window = 30 // environments
    expected = naive.transitions(window, whole_stacks)
    assert len(made) == environments * min(window, steps)
    if not expected:
        return
    first, last = made.bounds()
    rings, times = np.meshgrid(np.arange(environments), np.arange(first, last + 1))
    rings, times = rings.ravel(), times.ravel()
    usable = made._usable(rings, times)
    keys = list(zip(rings[usable].tolist(), times[usable].tolist(), strict=True))
    assert set(keys) == set(expected)
    batch = made.gather(rings[usable], times[usable])
    for index, key in enumerate(keys):
        check_same(batch, index, expected[key])


def test_sampling_is_uniform_over_the_naive_transitions(rng):
    naive = Naive(2)
    made = filled(rng, 40, 2, 55, naive)
    expected = naive.transitions(20)
    known = {reward: key for key, (_, _, reward, _) in expected.items()}
    counts = collections.Counter()
    for _ in range(100):
        batch = made.sample(64)
        for index, reward in enumerate(batch.rewards):
            check_same(batch, index, expected[known[reward]])
        counts.update(known[reward] for reward in batch.rewards)
    mean = 6400 / len(expected)
    assert set(counts) == set(expected)
    # 6 standard deviations of a Poisson count.
    assert max(abs(n - mean) for n in counts.values()) < 6 * mean**0.5


def samples(made, rng_seed, steps):
    rng = np.random.default_rng(rng_seed)
    result = []
    for _ in range(steps):
        made.add(*random_step(rng, 2))
        result.append([array.copy() for array in made.sample(5)])
    return result


def test_what_is_prepared_is_what_would_have_been_drawn(tmp_path):
    """Preparing batches ahead of time must not change the sequence of samples."""
    options = {"file": tmp_path / "ring", "seed": 3}
    plain = filled(np.random.default_rng(1), 60, 2, 40, seed=3)
    ahead = filled(np.random.default_rng(1), 60, 2, 40, **options)
    expected = [plain.sample(8), plain.sample(8), plain.sample(5), plain.sample(8)]
    ahead.prepare(8, 2, lambda batch: batch)
    state = ahead.state_dict()
    got = [*ahead.batches(8, 2, lambda batch: batch)]
    ahead.prepare(8, 1, lambda batch: batch)
    got += [ahead.sample(5), *ahead.batches(8, 1, lambda batch: batch)]
    ahead.close()
    del ahead
    restored = Replay(60, 2, **options)
    restored.load_state_dict(state)
    got += restored.batches(8, 2, lambda batch: batch)
    for one, other in zip([*expected, *expected[:2]], got, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_cut_step_is_never_drawn_and_ends_a_game(rng):
    made = filled(rng, 40, 2, 10)
    made._ends[:] = 0
    made.cut(np.array([False, True]))
    made.add(*random_step(rng, 2))
    made._ends[:, 10] = 0
    assert made._usable(np.array([0, 1]), np.array([9, 9])).tolist() == [True, False]
    assert made._foreign(np.array([0, 1]), np.array([10, 10])).tolist() == [
        [False] * 4,
        [True] * 3 + [False],
    ]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("first", [4, 19, 60, 100])
def test_a_restored_memory_goes_on_as_it_would_have(rng, tmp_path, first, in_memory):
    """Restores the last checkpoint and the previous one, both after more steps were written."""
    options = {"file": tmp_path / "ring", "in_memory": in_memory, "spare": 20, "seed": 3}
    made = filled(rng, 60, 2, first, **options)
    states = []
    for seed in (0, 1):
        state = made.state_dict()
        states.append(state)
        expected = samples(made, seed, 5)
        if seed == 0:
            expected_first = expected
    del made
    for state, seed, want in ((states[1], 1, expected), (states[0], 0, expected_first)):
        other = Replay(60, 2, **options)
        other.load_state_dict(state)
        assert other.lost == 0
        for a, b in zip(samples(other, seed, 5), want, strict=True):
            for left, right in zip(a, b, strict=True):
                np.testing.assert_array_equal(left, right)
        del other


def test_frames_overwritten_since_the_checkpoint_are_left_out(rng, tmp_path):
    options = {"file": tmp_path / "ring", "in_memory": False, "spare": 4}
    naive = Naive(1)
    made = filled(rng, 30, 1, 50, naive, **options)
    state = made.state_dict()
    for _ in range(12):
        made.add(*random_step(rng, 1))
    del made
    other = Replay(30, 1, **options)
    other.load_state_dict(state)
    assert other.lost == 12 - 4 - 1
    first, last = other.bounds()
    expected = naive.transitions(30)
    for time in range(first, last + 1):
        if (0, time) in expected:
            batch = other.gather(np.array([0]), np.array([time]))
            check_same(batch, 0, expected[0, time])


def test_too_little_memory_says_how_much_and_the_remedy(monkeypatch):
    monkeypatch.setattr(replay, "available_memory", lambda: 2**30)
    told = r"1,000,000 frames needs 6.6 GiB and 1.0 GiB are free.*--replay-file"
    with pytest.raises(UserError, match=told):
        Replay(1_000_000)


def test_cached_files_count_as_free_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("anon 300\nactive_file 200\ninactive_file 2000\n")
    assert replay.available_memory() == 3000 - (2500 - 2000)


def test_a_million_frames_take_memory_only_as_they_are_filled(rng):
    if replay.available_memory() < 7 * 2**30:
        pytest.skip("needs 7 GiB of free memory")

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    made = filled(rng, 1_000_000, 1, 50)
    assert made._frames.nbytes > 6.5 * 2**30
    assert resident() - before < 2**28


def test_an_unwritable_or_foreign_file_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot write the replay memory there"):
        Replay(10, file=pathlib.Path("/proc/nowhere/ring"))
    other = tmp_path / "ring"
    other.write_bytes(b"something else")
    with pytest.raises(UserError, match="holds 14 bytes and not the"):
        Replay(10, file=other)


@pytest.mark.parametrize("in_memory", [True, False])
def test_mapped_bytes_have_their_place_on_the_disk_from_the_start(tmp_path, monkeypatch, in_memory):
    """Writing to a mapped hole kills the process when the disk is full."""
    ring = tmp_path / "ring"
    made = Replay(300, file=ring, in_memory=in_memory)
    mapped = 4096 if in_memory else ring.stat().st_size
    assert mapped <= ring.stat().st_blocks * 512
    made.close()
    made.file.unlink()

    def full(file, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"ring: cannot write .* \(No space left on device\)"):
        Replay(300, file=ring, in_memory=in_memory)


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_file_of_another_run_is_refused(rng, tmp_path, in_memory):
    options = {"file": tmp_path / "ring", "in_memory": in_memory}
    made = filled(rng, 30, 2, 20, **options)
    state = made.state_dict()
    made.close()
    with pytest.raises(UserError, match=r"ring: holds another run's replay memory; .* remove it"):
        Replay(30, 2, new=True, **options)
    (tmp_path / "ring").unlink()
    other = filled(rng, 30, 2, 25, new=True, **options)
    other.state_dict()
    with pytest.raises(UserError, match="does not hold the replay memory of this run"):
        other.load_state_dict(state)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_memory_that_takes_over_a_file_forgets_what_was_there(rng, tmp_path, in_memory):
    options = {"file": tmp_path / "ring", "in_memory": in_memory, "spare": 8}
    filled(rng, 30, 2, 500, **options).state_dict()
    made = filled(rng, 30, 2, 20, **options)
    state = made.state_dict()
    expected = samples(made, 0, 2)
    made.close()
    other = Replay(30, 2, **options)
    other.load_state_dict(state)
    assert (len(other), other.lost) == (30, 0)
    for a, b in zip(samples(other, 0, 2), expected, strict=True):
        for left, right in zip(a, b, strict=True):
            np.testing.assert_array_equal(left, right)


def test_a_checkpoint_of_which_nothing_is_left_begins_empty(rng, tmp_path):
    made = filled(rng, 30, 1, 20, file=tmp_path / "ring", in_memory=False, spare=4)
    state = made.state_dict()
    for _ in range(100):
        made.add(*random_step(rng, 1))
    made.close()
    other = Replay(30, 1, file=tmp_path / "ring", in_memory=False, spare=4)
    other.load_state_dict(state)
    assert (len(other), other.lost) == (0, 20)


def test_a_file_is_of_one_process(rng, tmp_path):
    """Two processes must not write to the same file."""
    made = filled(rng, 30, 1, 20, file=tmp_path / "ring")
    with pytest.raises(UserError, match="ring: is in use by another process"):
        Replay(30, 1, file=tmp_path / "ring")
    made.close()
    Replay(30, 1, file=tmp_path / "ring")


def test_a_memory_whose_file_was_removed_begins_empty(rng, tmp_path):
    made = filled(rng, 30, 2, 20, file=tmp_path / "ring")
    state = made.state_dict()
    (tmp_path / "ring").unlink()
    other = Replay(30, 2, file=tmp_path / "ring")
    other.load_state_dict(state)
    assert (len(other), other.lost) == (0, 0)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_memory_that_began_empty_and_was_killed_begins_empty_again(rng, tmp_path, in_memory):
    made = filled(rng, 30, 2, 20, file=tmp_path / "ring", in_memory=in_memory)
    state = made.state_dict()
    (tmp_path / "ring").unlink()
    for _ in range(2):
        again = Replay(30, 2, file=tmp_path / "ring", in_memory=in_memory)
        again.load_state_dict(state)
        assert len(again) == 0
        again.add(*random_step(rng, 2))
        later = again.state_dict()  # For a checkpoint that is never finished.
        again.close()
    again = Replay(30, 2, file=tmp_path / "ring", in_memory=in_memory)
    again.load_state_dict(later)
    assert again._written == 1


def test_a_memory_saved_from_memory_goes_on_in_its_file(rng, tmp_path):
    made = filled(rng, 30, 2, 40, file=tmp_path / "ring", spare=8)
    state = made.state_dict()
    expected = samples(made, 0, 5)
    del made
    other = Replay(30, 2, file=tmp_path / "ring", spare=8, in_memory=False)
    other.load_state_dict(state)
    for a, b in zip(samples(other, 0, 5), expected, strict=True):
        for left, right in zip(a, b, strict=True):
            np.testing.assert_array_equal(left, right)
