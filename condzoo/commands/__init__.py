"""What the command line does and shows; condzoo/cli.py puts the commands together."""
