"""`python -m melayer`."""

from melayer.cli import main

main()
