"""`python -m zipr1.cli`, which is what torchrun starts."""

from zipr1.cli import main

main()
