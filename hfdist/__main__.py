"""`python -m hfdist` is the program `hfdist`."""

from hfdist.cli import main

if __name__ == "__main__":
    main()
