"""`python -m collapse` is the command `collapse`."""

from collapse.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
