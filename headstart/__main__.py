"""`python -m headstart`, which is also what `accelerate launch -m headstart train ...` runs on every process."""

from headstart.cli import main

if __name__ == "__main__":
    main()
