"""The commands of `calcformer`: a file for each, with its flags and what it does, and its name here.

None of them imports torch before it runs, so that `--help` answers at once.
"""

from calcformer.commands import attention, evaluate, explain, generate, listing, solve, sweep, train, translate

__all__ = ["COMMANDS"]

COMMANDS = train, sweep, evaluate, solve, translate, generate, attention, listing, explain  # as --help lists them
