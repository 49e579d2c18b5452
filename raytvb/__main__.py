"""`python -m raytvb`."""

from raytvb.cli import main

if __name__ == "__main__":
    main()
