"""``python -m luthier``."""

from luthier.commands import main

if __name__ == "__main__":
    main()
