"""REINFORCE in PyTorch on walkers that NumPy moves: their policy draws each action."""

import argparse

import numpy as np
import shared
import torch
from torch import nn

import lockstep

HORIZON, WALKERS, DISCOUNT = 12, 16, 0.95


def network() -> nn.Sequential:
    kernels = shared.dense(30, 2, 16, 3)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    for place, kernel in zip("02", kernels, strict=True):
        layer = model.get_submodule(place)
        assert isinstance(layer, nn.Linear)
        layer.weight.data.copy_(torch.from_numpy(kernel.T))
        nn.init.zeros_(layer.bias)
    return model


def play(model: nn.Module, episode: int, draws: np.ndarray):
    """States, actions and rewards of an episode, (HORIZON, WALKERS, ...) each."""
    walk = shared.Walk(episode, WALKERS)
    dtype = next(model.parameters()).dtype
    states, actions, rewards = [], [], []
    for draw in draws:
        states.append(walk.see())
        with torch.no_grad():
            chances = model(torch.from_numpy(states[-1]).to(dtype)).softmax(-1).numpy()
        actions.append((chances.cumsum(-1)[:, :2] < draw[:, None]).sum(-1))
        rewards.append(walk.act(actions[-1]))
    return np.stack(states), np.stack(actions), np.stack(rewards)


def returns(rewards: np.ndarray) -> np.ndarray:
    """What follows each step, discounted, without its mean."""
    found, following = np.zeros_like(rewards), np.zeros(WALKERS, rewards.dtype)
    for t in reversed(range(HORIZON)):
        following = rewards[t] + DISCOUNT * following
        found[t] = following
    return found - found.mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    options, _ = parser.parse_known_args()  # the other side may have options of its own

    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    run = lockstep.Run()
    run.begin(model, optimizer)
    for episode in range(options.steps):
        draws = run.random("action", (HORIZON, WALKERS), kind="uniform")
        states, actions, rewards = play(model, episode, draws.numpy())
        s, a, weight = run.batch(*map(torch.from_numpy, (states, actions, returns(rewards))))
        optimizer.zero_grad()
        chosen = model(s).log_softmax(-1).gather(-1, a[..., None])[..., 0]
        loss = -(chosen * weight).mean()
        loss.backward()
        optimizer.step()
        run.step(loss)
    print(f"reward after {options.steps} episodes: {rewards.mean():.4f}")
    run.finish(reward=rewards.mean())


if __name__ == "__main__":
    main()
