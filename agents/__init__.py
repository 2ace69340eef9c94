"""Reinforcement-learning strategies on gymnasium and stable-baselines3."""

import gymnasium

PROJECT = "bitfront"

gymnasium.register("bitfront/LayerController-v0", entry_point="agents.layer_env:LayerEnv")
gymnasium.register("bitfront/ChannelController-v0", entry_point="agents.channel_env:ChannelEnv")
