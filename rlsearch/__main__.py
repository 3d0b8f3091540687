"""``python -m rlsearch`` is ``rlsearch``."""

from rlsearch.cli import main

main()
