"""`python -m search` does what `search` does."""

from search.cli import command

command()
