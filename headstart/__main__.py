"""Runs the command line: `python -m headstart`, and in every process of `accelerate launch -m headstart train ...`."""

from headstart.cli import main

if __name__ == "__main__":
    main()
