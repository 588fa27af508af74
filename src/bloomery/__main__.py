"""`python -m bloomery` is the console script."""

from bloomery.cli.main import main

main()
