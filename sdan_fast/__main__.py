"""`python -m sdan_fast` is the command line `sdan-fast`."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="python -m sdan_fast")
