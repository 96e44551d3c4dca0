"""`python -m node` is `covey`."""

from node.cli import main

if __name__ == "__main__":
    main()
