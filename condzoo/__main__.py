"""`python -m condzoo`: the same as the `condzoo` command, e.g. under torchrun."""

from condzoo.cli import main

if __name__ == "__main__":
    main()
