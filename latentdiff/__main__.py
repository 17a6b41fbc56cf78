"""`python -m latentdiff`: the `latentdiff` command."""

from latentdiff.commands.cli import main

if __name__ == "__main__":
    main()
