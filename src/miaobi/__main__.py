"""`python -m miaobi`, the form torchrun needs."""

from miaobi.cli import main

main()
