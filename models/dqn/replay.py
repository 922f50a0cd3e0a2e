"""The replay memory: a ring of single frames, in RAM or in a file.

Slot t of an environment holds frame x_t, action a_t, reward r_t and how step t ended. A state is
the last 4 frames up to x_t, with zeros before the first frame of its game. A transition needs slots
t - 3 to t + 1 in the window of the `capacity` latest slots, so it never crosses the ring's seam.

On disk, the ring has some spare slots. What is written after a checkpoint only overwrites slots
outside that checkpoint's window. So one file serves the last two checkpoints, and a checkpoint
itself contains only small arrays.
"""

import concurrent.futures
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.common.errors import UserError
from models.dqn.games import FRAME_SHAPE

TERMINAL = 1  # Nothing follows step t, so no value is bootstrapped.
LAST = 2  # Slot t + 1 holds the first frame of another game.
CUT = 4  # The game was stopped at t, so what would have followed is unknown.
STACK = 4  # Frames in a state.
FRAME = FRAME_SHAPE[0] * FRAME_SHAPE[1]
# Bytes before the frames in the file. They hold three numbers: how many slots were ever written,
# the id of the memory that wrote them, and the id of the lost memory that it replaced.
_HEADER = 4096
_CGROUP = Path("/sys/fs/cgroup")


class Batch(NamedTuple):
    """Transitions; the frames x_{t-3}..x_{t+1} hold both states."""

    frames: np.ndarray  # uint8 [batch, 5, 84, 84]
    actions: np.ndarray  # int32 [batch]
    rewards: np.ndarray  # float32 [batch]
    terminals: np.ndarray  # bool [batch]

    @property
    def states(self) -> np.ndarray:
        """The states s_t, uint8 [batch, 84, 84, 4]."""
        return np.ascontiguousarray(self.frames[:, :-1].transpose(0, 2, 3, 1))


class Replay:
    """The replay memory of several environments, each with its own ring.

    A file belongs to one memory, identified by a random number in its state, and to one process
    until close(). A memory that is not restored overwrites the file's contents, unless it is `new`.

    Args:
      capacity: number of transitions, over all environments.
      environments: number of environments.
      file: stores the frames, or a copy of them.
      in_memory: True: the frames are in RAM and state_dict() copies the new ones to `file`, if
        there is one. False: they are in `file`, memory-mapped.
      new: refuse a file that already holds a memory.
      spare: slots of the file, over all environments, that can be written after a checkpoint
        without damaging it; twice the steps between saves protect the last two checkpoints.
      whole_stacks: sample only states with 4 frames of the same game.
      seed: seeds the sampling.
    """

    def __init__(
        self,
        capacity: int,
        environments: int = 1,
        *,
        file: Path | None = None,
        in_memory: bool = True,
        new: bool = False,
        spare: int = 0,
        whole_stacks: bool = False,
        seed: int = 0,
    ):
        self._window = -(-capacity // environments)
        self._file_slots = self._window + -(-spare // environments) + 1
        self._slots = self._window + 1 if in_memory else self._file_slots
        self.file, self._in_memory, self._whole_stacks = file, in_memory, whole_stacks
        self._generator = np.random.default_rng([seed, 2])
        self._written = 0  # Slots ever written, per environment.
        self._saved = 0  # How many of them are on disk.
        self._floor = 0  # Slots before this one are lost.
        self._id = 0  # 0 until slots are written to the file.
        self._before = 0  # The id of the memory that this one replaced.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "replay")
        self._ahead: tuple[concurrent.futures.Future, Any] | None = None
        shape = (environments, self._slots)
        if in_memory:
            _check_memory(self._slots * environments * FRAME, capacity)
        if file is not None:
            _make_file(file, self._file_slots * environments * FRAME, mapped=not in_memory)
            self._header = _lock_header(file)
            if new and self._header[0]:
                raise UserError(
                    f"{file}: holds another run's replay memory; name another file, or remove it"
                )
        if in_memory:
            self._frames = np.zeros((*shape, *FRAME_SHAPE), np.uint8)
        else:
            assert file is not None, "frames that are not in memory need a file"
            self._frames = np.memmap(file, np.uint8, "r+", _HEADER, (*shape, *FRAME_SHAPE))
        self._actions = np.zeros(shape, np.uint8)
        self._rewards = np.zeros(shape, np.float32)
        self._ends = np.zeros(shape, np.uint8)

    def close(self) -> None:
        """Releases the file; this memory must not be used afterwards."""
        self._thread.shutdown()
        if self.file is not None:
            del self._header

    def __len__(self) -> int:
        return (self._written - self._oldest()) * len(self._frames)

    def add(
        self, frames: np.ndarray, actions: np.ndarray, rewards: np.ndarray, ends: np.ndarray
    ) -> None:
        """Adds a step of each environment: x_t, a_t, r_t, and TERMINAL | LAST | CUT."""
        assert self._ahead is None, "add() between prepare() and batches()"
        slot = self._written % self._slots
        if not self._in_memory:
            self._mark(self._written + 1)
        self._frames[:, slot] = frames
        self._actions[:, slot] = actions
        self._rewards[:, slot] = rewards
        self._ends[:, slot] = ends
        self._written += 1

    def cut(self, rings: np.ndarray) -> None:
        """Marks the latest step in some rings as stopped, because another game follows."""
        if self._written:
            self._ends[rings, (self._written - 1) % self._slots] |= CUT | LAST

    def sample(self, size: int) -> Batch:
        """Draws transitions uniformly, with replacement."""
        if self._ahead is not None:  # What was prepared is drawn again after this sample.
            (drawn, before), self._ahead = self._ahead, None
            drawn.result()
            self._generator.bit_generator.state = before
        return self._sample(size)

    def prepare(self, size: int, count: int, convert: Callable[[Batch], Any]) -> None:
        """Starts a thread that draws what batches() will return for the same arguments.

        Until then, add() must not be called. A state saved in between is the one before prepare(),
        so a memory restored from it draws the same batches again.
        """
        before = self._generator.bit_generator.state
        self._ahead = self._thread.submit(self._draw, size, count, convert), before

    def batches(self, size: int, count: int, convert: Callable[[Batch], Any]) -> tuple[Any, ...]:
        """Draws `count` batches, each converted by `convert`."""
        if self._ahead is None:
            return self._draw(size, count, convert)
        (drawn, _), self._ahead = self._ahead, None
        return drawn.result()

    def _draw(self, size: int, count: int, convert: Callable[[Batch], Any]) -> tuple[Any, ...]:
        return tuple(convert(self._sample(size)) for _ in range(count))

    def _sample(self, size: int) -> Batch:
        chosen = self._choose(size)
        while (bad := ~self._usable(*chosen)).any():
            for kept, new in zip(chosen, self._choose(int(bad.sum())), strict=True):
                kept[bad] = new
        return self.gather(*chosen)

    def gather(self, rings: np.ndarray, times: np.ndarray) -> Batch:
        """Returns the transitions in these rings at these times, counted from the first slot."""
        slots = (times[:, None] + np.arange(1 - STACK, 2)) % self._slots
        frames = self._frames[rings[:, None], slots]
        frames[:, :STACK][self._foreign(rings, times)] = 0
        at = slots[:, STACK - 1]
        ends = self._ends[rings, at]
        return Batch(
            frames,
            self._actions[rings, at].astype(np.int32),
            self._rewards[rings, at],
            (ends & TERMINAL) != 0,
        )

    def bounds(self) -> tuple[int, int]:
        """Returns the first and last time that may be sampled, inclusive."""
        oldest = self._oldest()
        return oldest + (STACK - 1 if oldest else 0), self._written - 2

    def state_dict(self) -> dict[str, Any]:
        """Writes new frames to the file and returns the rest of the state."""
        if self._in_memory and self.file is not None:
            self._write_new()
        elif self.file is not None:
            self._frames.flush()  # type: ignore[attr-defined]
        slots = np.arange(self._oldest(), self._written) % self._slots
        return {
            "id": self._id,
            "written": self._written,
            "floor": self._floor,
            "generator": self._ahead[1] if self._ahead else self._generator.bit_generator.state,
            "actions": self._actions[:, slots],
            "rewards": self._rewards[:, slots],
            "ends": self._ends[:, slots],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved state, except for frames that were overwritten since.

        The memory starts empty if there is no file, or the file was removed.
        """
        self._generator.bit_generator.state = state["generator"]
        if self.file is None:
            return
        ever, owner, before = map(int, self._header)
        if ever == 0 or (before and before == state["id"]):
            # New, or started from this same state by a process that was killed before it saved.
            self._before = state["id"]
            return
        if owner != state["id"] or ever < state["written"]:
            raise UserError(
                f"{self.file}: does not hold the replay memory of this run; resume with the "
                "run's own --replay-file, or name a new one to start with an empty memory"
            )
        self._id = owner
        self._written = self._saved = state["written"]
        self._floor = min(max(state["floor"], ever - self._file_slots), self._written)
        slots = np.arange(self._written - state["actions"].shape[1], self._written) % self._slots
        self._actions[:, slots], self._rewards[:, slots] = state["actions"], state["rewards"]
        self._ends[:, slots] = state["ends"]
        if self._in_memory:
            with open(self.file, "rb") as file:
                for part, offset in self._pieces(self._oldest()):
                    file.seek(offset)
                    file.readinto(part.data)

    @property
    def lost(self) -> int:
        """Transitions lost because an older checkpoint was restored; normally 0."""
        return max(0, self._floor - max(0, self._written - self._window)) * len(self._frames)

    def _oldest(self) -> int:
        return max(0, self._written - self._window, self._floor)

    def _choose(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        first, last = self.bounds()
        assert last >= first, "sampled from an empty replay memory"
        rings = self._generator.integers(0, len(self._frames), size)
        return rings, self._generator.integers(first, last + 1, size)

    def _usable(self, rings: np.ndarray, times: np.ndarray) -> np.ndarray:
        good = (self._ends[rings, times % self._slots] & CUT) == 0
        if self._whole_stacks:
            good &= ~self._foreign(rings, times).any(1) & (times >= STACK - 1)
        return good

    def _foreign(self, rings: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Returns which frames of each state are from another game, bool [batch, 4]."""
        before = times[:, None] + np.arange(1 - STACK, 0)
        ends = (self._ends[rings[:, None], before % self._slots] & LAST) != 0
        ends |= before < 0
        foreign = np.zeros((len(times), STACK), bool)
        # If a game ended at slot j, slot j and all before it are foreign.
        foreign[:, :-1] = np.logical_or.accumulate(ends[:, ::-1], 1)[:, ::-1]
        return foreign

    def _write_new(self) -> None:
        self._mark(self._written)
        with open(self.file, "r+b") as file:  # type: ignore[arg-type]
            for part, offset in self._pieces(max(self._saved, self._oldest())):
                file.seek(offset)
                file.write(part.data)
            file.flush()
            os.fsync(file.fileno())
        self._saved = self._written

    def _pieces(self, begin: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yields pieces of what was written since slot `begin`, with their offsets in the file.

        A piece is contiguous in both rings, which have different lengths.
        """
        for number, ring in enumerate(self._frames):
            at = begin
            while at < self._written:
                here, there = at % self._slots, at % self._file_slots
                count = min(self._written - at, self._slots - here, self._file_slots - there)
                offset = _HEADER + (number * self._file_slots + there) * FRAME
                yield ring[here : here + count], offset
                at += count

    def _mark(self, written: int) -> None:
        """Records in the file, before the frames are written, how many slots were ever written."""
        if not self._id:
            self._id = 1 + int.from_bytes(os.urandom(7), "little")
            self._header[:] = 0, self._id, self._before
        self._header[0] = max(int(self._header[0]), written)


def _check_memory(needed: int, capacity: int) -> None:
    free = available_memory()
    if free is not None and needed > free:
        raise UserError(
            f"the replay memory of {capacity:,} frames needs {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free: keep it on disk with --replay-file FILE, "
            "or lower --replay"
        )


def available_memory() -> int | None:
    """Returns the bytes of memory that this process can still allocate, None if unknown."""
    free = None
    try:
        with open("/proc/meminfo") as file:
            free = next(int(x.split()[1]) * 1024 for x in file if x.startswith("MemAvailable"))
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            stat = dict(map(str.split, (_CGROUP / "memory.stat").read_text().splitlines()))
            # The kernel drops cached files, such as a replay file, when memory is needed.
            free = min(free, int(limit) - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError, StopIteration):
        pass
    return free


def _make_file(path: Path, needed: int, mapped: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size not in (0, _HEADER + needed):
                raise UserError(
                    f"{path}: holds {size} bytes and not the {_HEADER + needed} bytes of this "
                    "replay memory; name another file, or remove it"
                )
            stat = os.statvfs(path)
            free = stat.f_bavail * stat.f_frsize + os.fstat(file.fileno()).st_blocks * 512
            if needed > free:
                raise UserError(
                    f"{path}: the replay memory needs {needed / 2**30:.1f} GiB and "
                    f"{free / 2**30:.1f} GiB are free there: lower --replay, or name a file on "
                    "another disk with --replay-file"
                )
            # What is mapped is allocated now: later, a full disk would kill the process (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, _HEADER + needed * mapped)
            file.truncate(_HEADER + needed)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the replay memory there ({error.strerror}); name another file"
        ) from None


def _lock_header(path: Path) -> np.ndarray:
    """Returns the numbers in the file's header; the file is locked while they are mapped."""
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            text = f"{path}: is in use by another process; wait for it, or name another file"
            raise UserError(text) from None
        return np.memmap(file, np.uint64, "r+", 0, (3,))  # With a duplicate of the descriptor.
