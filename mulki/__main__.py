"""``python -m mulki`` is the command ``mulki``."""

from mulki.app.cli import main

main()
