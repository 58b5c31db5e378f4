"""`python -m polyserve`."""

from polyserve.cli import main

main()
