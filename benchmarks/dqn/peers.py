"""DQN in PyTorch, for benchmarks.dqn: CleanRL's dqn_atari.py, Stable-Baselines3, and a tuned one.

Each returns a function that plays and learns for a given number of agent steps in the steady state:
Space Invaders, minibatches of 64, one update per 4 steps, 10% random actions.
"""

from collections.abc import Callable
from typing import Any

import ale_py
import gymnasium
import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common import atari_wrappers, buffers, vec_env
from torch import nn

from models.dqn.agent import FrameStack
from models.dqn.config import Config
from models.dqn.replay import LAST, TERMINAL, Replay
from models.dqn.vector import Games

gymnasium.register_envs(ale_py)
BATCH, EVERY, MEMORY, EPSILON, DISCOUNT = 64, 4, 10_000, 0.1, 0.99
GAME = "ALE/SpaceInvaders-v5"


def make_gymnasium() -> gymnasium.Env:
    """Returns a game in the wrappers that both peers use."""
    env = gymnasium.make(GAME, frameskip=1, repeat_action_probability=0.0)
    env = gymnasium.wrappers.RecordEpisodeStatistics(env)
    return atari_wrappers.AtariWrapper(env)


def _games(count: int) -> Any:
    env = vec_env.DummyVecEnv([make_gymnasium] * count)
    return vec_env.VecTransposeImage(vec_env.VecFrameStack(env, 4))


def network(actions: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, actions),
    )  # fmt: skip


def cleanrl(warm_up: int) -> Callable[[int], None]:
    """CleanRL's algorithm: one game, SB3's buffer, Adam, mean squared error, clipped rewards."""
    env = _games(1)
    online, target = network(env.action_space.n), network(env.action_space.n)
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), lr=1e-4)
    memory = buffers.ReplayBuffer(
        MEMORY, env.observation_space, env.action_space, "cpu",
        optimize_memory_usage=True, handle_timeout_termination=False,
    )  # fmt: skip
    random = np.random.default_rng(0)
    state: dict[str, Any] = {"observation": env.reset(), "step": 0}

    def play(steps: int, learning: bool = True) -> None:
        for _ in range(steps):
            observation = state["observation"]
            if not learning or random.random() < EPSILON:
                action = np.array([env.action_space.sample()])
            else:
                q = online(torch.Tensor(observation) / 255.0)
                action = torch.argmax(q, dim=1).numpy()
            following, reward, done, infos = env.step(action)
            real = following.copy()
            if done[0]:
                real[0] = infos[0]["terminal_observation"]
            memory.add(observation, real, action, reward, done, infos)
            state["observation"] = following
            state["step"] += 1
            if learning and state["step"] % EVERY == 0:
                data = memory.sample(BATCH)
                with torch.no_grad():
                    largest, _ = target(data.next_observations / 255.0).max(dim=1)
                    goal = data.rewards.flatten() + DISCOUNT * largest * (1 - data.dones.flatten())
                q = online(data.observations / 255.0).gather(1, data.actions).squeeze()
                loss = nn.functional.mse_loss(goal, q)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    with torch.no_grad():
        play(warm_up, learning=False)
    return play


def stable_baselines3(environments: int) -> Callable[[int], None]:
    """Stable-Baselines3's DQN with CnnPolicy."""
    env = _games(environments)
    model = DQN(
        "CnnPolicy", env, batch_size=BATCH, buffer_size=MEMORY, learning_starts=256,
        train_freq=max(1, EVERY // environments), gradient_steps=max(1, environments // EVERY),
        exploration_fraction=1e-9, exploration_final_eps=EPSILON, target_update_interval=10_000,
        optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False},
        device="cpu",
    )  # fmt: skip
    model.learn(512, log_interval=10**9)

    def play(steps: int) -> None:
        model.learn(steps, log_interval=10**9, reset_num_timesteps=False)

    return play


def tuned(warm_up: int, environments: int = 8) -> Callable[[int], None]:
    """PyTorch in channels-last bfloat16, with our memory, and our games running during updates."""
    games = Games(Config(game=GAME), environments, 0)
    memory = Replay(MEMORY, environments)
    stack = FrameStack(environments)
    stack.push(games.reset())
    online, target = (
        network(games.num_actions).to(memory_format=torch.channels_last) for _ in range(2)
    )
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), lr=1e-4, fused=True)
    random = np.random.default_rng(0)

    def q_of(net: nn.Module, frames: torch.Tensor) -> torch.Tensor:
        x = frames.to(torch.bfloat16, memory_format=torch.channels_last) / 255
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    def update() -> None:
        batch = memory.sample(BATCH)
        frames = torch.from_numpy(batch.frames)
        with torch.no_grad():
            largest = q_of(target, frames[:, 1:]).amax(1)
            keep = torch.from_numpy(~batch.terminals)
            goal = torch.from_numpy(batch.rewards) + DISCOUNT * largest * keep
        q = q_of(online, frames[:, :-1]).gather(1, torch.from_numpy(batch.actions).long()[:, None])
        loss = nn.functional.smooth_l1_loss(q[:, 0], goal, reduction="sum")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def play(steps: int, learning: bool = True) -> None:
        for _ in range(steps // environments):
            actions = random.integers(0, games.num_actions, environments)
            if learning:
                greedy = random.random(environments) >= EPSILON
                with torch.no_grad():
                    states = torch.from_numpy(stack.frames).permute(0, 3, 1, 2)
                    actions[greedy] = q_of(online, states).argmax(1).numpy()[greedy]
            games.send(actions)
            for _ in range(environments // EVERY if learning else 0):
                update()
            after = games.recv()
            ends = TERMINAL * (after.over | after.life_lost) + LAST * after.over
            memory.add(stack.newest, actions, np.clip(after.rewards, -1, 1), ends)
            stack.push(after.frames, after.over)

    play(warm_up, learning=False)
    return play
