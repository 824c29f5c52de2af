"""`python -m nugget2d` is the `nugget2d` command."""

from nugget2d.cli.app import main

if __name__ == "__main__":
    main()
