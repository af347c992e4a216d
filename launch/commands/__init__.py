"""The commands of `weft`, one file each, named as the command and found by scanning this folder.

A file defines COMMAND: a `launch.command.Command`, or a mapping of them for a command that has parts. At import it
loads nothing heavy, so that `weft --help` is quick; what a command needs is imported when it runs.
"""
