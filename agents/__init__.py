"""Reinforcement-learning strategies on gymnasium and stable-baselines3."""

PROJECT = "bitfront"
