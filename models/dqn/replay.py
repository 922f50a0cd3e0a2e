"""The replay memory: single frames in a ring, in memory or in a file; without TensorFlow.

Slot t of an environment holds frame x_t, action a_t, reward r_t and how step t ended. A state is
the last 4 frames up to x_t, zeros before the first frame of its game. A transition needs slots
t - 3 to t + 1 within the window of the `capacity` latest, so the ring's seam is never crossed.

On disk the ring is a little longer than the window. What is written after a checkpoint goes over
slots that its window does not hold, so that one file serves the last two checkpoints, and each
of them needs only small arrays besides: see `spare`.
"""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.common.errors import UserError
from models.dqn.games import FRAME_SHAPE

TERMINAL = 1  # Nothing follows step t: no value is bootstrapped.
LAST = 2  # Slot t + 1 holds the first frame of another game.
CUT = 4  # The game was stopped at t; what would have followed is not known.
# Bytes before the frames in the file. They hold three numbers: how many slots have ever been
# written, which memory wrote them, and of which memory, lost with its file, that took the place.
_HEADER = 4096


class Batch(NamedTuple):
    """Transitions; x_{t-3}..x_{t+1} as one array holds both states."""

    frames: np.ndarray  # uint8 [batch, 5, 84, 84]
    actions: np.ndarray  # int32 [batch]
    rewards: np.ndarray  # float32 [batch]
    terminals: np.ndarray  # bool [batch]


class Replay:
    """The replay memory of several environments, each with its own ring.

    A file belongs to one memory, known by a random number in its state, and until close() to one
    process. A memory that is not restored takes over what it finds, unless it is `new`.

    Args:
      capacity: transitions, over all environments.
      environments: how many.
      file: where the frames are saved by state_dict(), or live.
      in_memory: True: in memory, and copied to `file`, if given, at each save. False: in `file`,
        memory-mapped, and the operating system keeps in memory what it has room for.
      new: refuse a file that holds a memory already.
      spare: slots of the file, over all environments, that may be written after a checkpoint
        without hurting it: twice the steps between saves protect the last two checkpoints.
      whole_stacks: sample only states whose 4 frames are of one game.
      seed: of the sampling.
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
        stack: int = 4,
        seed: int = 0,
    ):
        self._window = -(-capacity // environments)
        self._file_slots = self._window + -(-spare // environments) + 1
        self._slots = self._window + 1 if in_memory else self._file_slots
        self._stack, self._whole_stacks = stack, whole_stacks
        self.file, self._in_memory = file, in_memory
        self._generator = np.random.default_rng([seed, 2])
        self._written = 0  # Slots ever written, per environment.
        self._saved = 0  # Of these, on disk.
        self._floor = 0  # Slots before this one are lost.
        self._id: int | None = None  # The memory's number, None before it has slots in the file.
        self._before = 0  # The number of the memory whose place it took.
        shape = (environments, self._slots)
        slot = environments * FRAME_SHAPE[0] * FRAME_SHAPE[1]
        if in_memory:
            _check_memory(self._slots * slot, capacity)
        if file is not None:
            _make_file(file, self._file_slots * slot)
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
        """Lets other processes have the file; this memory is of no use then."""
        if self.file is not None:
            del self._header

    def __len__(self) -> int:
        return (self._written - self._oldest()) * len(self._frames)

    def add(
        self, frames: np.ndarray, actions: np.ndarray, rewards: np.ndarray, ends: np.ndarray
    ) -> None:
        """Adds a step of each environment: x_t, a_t, r_t, and TERMINAL | LAST | CUT."""
        slot = self._written % self._slots
        if not self._in_memory:
            self._mark(self._written + 1)
        self._frames[:, slot] = frames
        self._actions[:, slot] = actions
        self._rewards[:, slot] = rewards
        self._ends[:, slot] = ends
        self._written += 1

    def sample(self, size: int) -> Batch:
        """Draws transitions uniformly, with replacement."""
        chosen = self._choose(size)
        while (bad := ~self._usable(*chosen)).any():
            for kept, new in zip(chosen, self._choose(int(bad.sum())), strict=True):
                kept[bad] = new
        return self.gather(*chosen)

    def gather(self, rings: np.ndarray, times: np.ndarray) -> Batch:
        """Returns the transitions at given times, counted from the first slot ever written."""
        slots = (times[:, None] + np.arange(1 - self._stack, 2)) % self._slots
        frames = self._frames[rings[:, None], slots]
        frames[:, : self._stack][self._foreign(rings, times)] = 0
        at = slots[:, self._stack - 1]
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
        return oldest + (self._stack - 1 if oldest else 0), self._written - 2

    def state_dict(self) -> dict[str, Any]:
        """Brings the file up to date and returns the rest of the state."""
        if self._in_memory and self.file is not None:
            self._write_new()
        elif self.file is not None:
            self._frames.flush()  # type: ignore[attr-defined]
        slots = np.arange(self._oldest(), self._written) % self._slots
        return {
            "id": self._id,
            "written": self._written,
            "floor": self._floor,
            "generator": self._generator.bit_generator.state,
            "actions": self._actions[:, slots],
            "rewards": self._rewards[:, slots],
            "ends": self._ends[:, slots],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state; frames that the file has lost since are left out.

        Without a file, or where it was removed and is new, the memory begins empty.
        """
        self._generator.bit_generator.state = state["generator"]
        if self.file is None:
            return
        ever, owner, before = map(int, self._header)
        if ever == 0 or (before and before == state.get("id")):
            # Empty, or begun empty from this very state, by a process that did not get to save.
            self._before = state.get("id") or 0
            return
        # Runs from before memories had numbers have none, nor have their files.
        if owner != state.get("id", 0) or ever < state["written"]:
            raise UserError(
                f"{self.file}: does not hold the replay memory of this run; resume with the "
                "run's own --replay-file, or name a new one to begin with an empty memory"
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
        """Transitions missing since an older checkpoint was restored; 0 as a rule."""
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
            good &= ~self._foreign(rings, times).any(1) & (times >= self._stack - 1)
        return good

    def _foreign(self, rings: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Tells, bool [batch, 4], which frames of a stack are of an earlier game, or none."""
        before = times[:, None] + np.arange(1 - self._stack, 0)
        ends = (self._ends[rings[:, None], before % self._slots] & LAST) != 0
        ends |= before < 0
        foreign = np.zeros((len(times), self._stack), bool)
        # A game that ended at slot j makes j and all before it foreign.
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
        """Yields what was written since `begin`, in pieces whole in both rings, and its place."""
        frame = FRAME_SHAPE[0] * FRAME_SHAPE[1]
        for number, ring in enumerate(self._frames):
            at = begin
            while at < self._written:
                here, there = at % self._slots, at % self._file_slots
                count = min(self._written - at, self._slots - here, self._file_slots - there)
                offset = _HEADER + (number * self._file_slots + there) * frame
                yield ring[here : here + count], offset
                at += count

    def _mark(self, written: int) -> None:
        """Notes in the file, before they are written, how many slots ever were."""
        if self._id is None:
            self._id = 1 + int.from_bytes(os.urandom(7), "little")
            self._header[:] = 0, self._id, self._before
        self._header[0] = max(int(self._header[0]), written)


def _check_memory(needed: int, capacity: int) -> None:
    free = available_memory()
    if free is not None and needed > free:
        raise UserError(
            f"the replay memory of {capacity:,} frames needs {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free: keep it on disk by --replay-file FILE, "
            "or lower --replay"
        )


def available_memory() -> int | None:
    """Returns the bytes of memory this process may still take, None where that is not known."""
    free = None
    try:
        with open("/proc/meminfo") as file:
            free = next(int(x.split()[1]) * 1024 for x in file if x.startswith("MemAvailable"))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free = min(free, int(limit) - used)
    except (OSError, ValueError, StopIteration):
        pass
    return free


def _make_file(path: Path, needed: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size not in (0, _HEADER + needed):
                raise UserError(
                    f"{path}: holds {size} bytes and not the {_HEADER + needed} of this replay "
                    "memory; name another file, or remove it"
                )
            stat = os.statvfs(path)
            free = stat.f_bavail * stat.f_frsize + os.fstat(file.fileno()).st_blocks * 512
            if needed > free:
                raise UserError(
                    f"{path}: the replay memory needs {needed / 2**30:.1f} GiB and "
                    f"{free / 2**30:.1f} GiB are free there: lower --replay, or name a file on "
                    "another disk by --replay-file"
                )
            file.truncate(_HEADER + needed)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the replay memory there ({error.strerror})"
        ) from None


def _lock_header(path: Path) -> np.ndarray:
    """Returns the numbers in the file's header; the file is locked as long as they are mapped."""
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{path}: is in use by another process; wait for it, or name another file"
            ) from None
        return np.memmap(file, np.uint64, "r+", 0, (3,))  # With a duplicate of the descriptor.
