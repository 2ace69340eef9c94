"""What a user can do wrong, each with the exit code the command ends with.

A message says what was wanted, what came, where, and what to do about it.
"""


class BitfrontError(Exception):
    """Base of every error that is the user's or the environment's, not a fault of this program."""

    exit_code = 2


class UsageError(BitfrontError):
    """An argument, a task or a model that cannot be used as given."""


class BudgetError(BitfrontError):
    """A budget that is not a size, or that no candidate can meet."""


class NothingFeasibleError(BitfrontError):
    """The search ended without a candidate inside every budget."""

    exit_code = 3


class EnvironmentFault(BitfrontError):
    """The machine lacks something: disk space, permission, a data set, a tool."""

    exit_code = 4


class VerificationError(BitfrontError):
    """A file is not what it claims to be, or an artefact computes something else."""

    exit_code = 5
