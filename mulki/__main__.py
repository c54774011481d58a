"""``python -m mulki`` is the command ``mulki``."""

from mulki.cli import main

main()
