"""`python -m attnreuse`: the command line."""

from attnreuse.cli import main

main()
