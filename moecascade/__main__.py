"""`python -m moecascade`: the command line."""

from moecascade.cli.app import run

if __name__ == "__main__":
    run()
