"""`python main.py` is the main job; `python main.py VERB` its parts (see qll/cli.py)."""

from qll.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
