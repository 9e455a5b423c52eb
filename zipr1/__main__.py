"""`python -m zipr1`, and `torchrun -m zipr1`: the same as the command `zipr1`."""

from zipr1.cli import program

if __name__ == "__main__":
    program()
