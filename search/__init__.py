"""The search engine and the command."""

PROJECT = "bitfront"
