"""``python -m tclora_cli`` is the command ``tclora``."""

from tclora_cli.main import main

main()
